"""Convert the answers of an owner to results and errors, and stored values to their form in a message. This module does no I/O."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import msgspec
from msgspec import Raw

from lab_state._entries import DELETED, Absent, Expiring, StoredOrGone, Value
from lab_state._following import stored_of
from lab_state._values import encode
from lab_state.exceptions import (
    FencedError,
    InvalidValueError,
    LabStateError,
    StorageError,
    TypeMismatchError,
    UnavailableError,
    UnsupportedError,
)
from lab_state.shared._messages import Changes, Failed, Ok, Raised, Refused

_ERRORS: dict[str, type[StorageError]] = {
    kind.__name__: kind for kind in (FencedError, UnavailableError, UnsupportedError, StorageError)
}
"""The classes of the error of a failed commit, by name. An error of any other class becomes a `StorageError`."""


class Settled(NamedTuple):
    """The end of a call without an error: the revision of the call, and its result as JSON."""

    revision: int
    result: bytes | Raw


class Refusal(NamedTuple):
    """A check that did not hold.

    Attributes:
        revision: The revision of the owner's layer at the refusal.
        values: The values of the checked keys at this revision, with `DELETED` for a missing key. `None` if the
            values are too many or too large.
        connection: The connection on which the refusal came; see `OpenCalls.connection`.
    """

    revision: int
    values: dict[str, StoredOrGone] | None
    connection: int


Ended: TypeAlias = Settled | Refusal


def ended(answer: Ok | Raised | Refused | Failed, keys: list[str], connection: int) -> Ended:
    """Return the end of a call from its answer.

    Args:
        answer: The answer.
        keys: The keys of the check of the call.
        connection: The number of the connection on which the answer came.

    Raises:
        TypeMismatchError: The stored value does not allow the call. Nothing was changed.
        InvalidValueError: The new value cannot be stored. Nothing was changed.
        StorageError: The commit of the call failed. The change may still become durable.
    """
    if isinstance(answer, Ok):
        return Settled(answer.revision, answer.result)
    if isinstance(answer, Refused):
        return Refusal(answer.revision, _values(answer, keys), connection)
    if isinstance(answer, Raised):
        error = TypeMismatchError if answer.error == "TypeMismatchError" else InvalidValueError
        raise error(answer.message, answer.path)
    raise failure(answer)


def failure(answer: Failed) -> LabStateError:
    """Return the error of a commit that failed, with the message of the error in the owner."""
    return _ERRORS.get(answer.error, StorageError)(answer.message)


def relative(
    error: TypeMismatchError | InvalidValueError, key: str, prefix: str
) -> TypeMismatchError | InvalidValueError:
    """Return a copy of an error for the caller of a handle. Its message names the key without the prefix of the handle."""
    return error.__class__(error.args[0].replace(repr(key), repr(key[len(prefix) :]), 1), error.path)


def _values(answer: Refused, keys: list[str]) -> dict[str, StoredOrGone] | None:
    if answer.values is None:
        return None
    values: dict[str, StoredOrGone] = dict.fromkeys(keys, DELETED)
    for key, (raw, at) in answer.values.items():
        value = stored_of(raw)
        values[key] = value if at is None else Expiring(value, at)
    return values


def raw_of(value: Value) -> Raw:
    """Return a stored value in the form of a message."""
    return value if isinstance(value, Raw) else Raw(value if isinstance(value, bytes) else encode(value))


def size_of(key: str, raw: Raw | None = None) -> int:
    """Return an upper bound of the size of a key and its value in a message, in bytes. JSON needs at most 6 bytes for a character."""
    return 6 * len(key) + 32 + (0 if raw is None else memoryview(raw).nbytes)


def changes_of(changes: dict[str, StoredOrGone], *, cleared: bool) -> tuple[Changes, int]:
    """Return the changes of a draft in the form of a message, and an upper bound of their size in bytes."""
    values: dict[str, Raw] = {}
    expires: dict[str, int] = {}
    deleted: list[str] = []
    size = 0
    for key, to in changes.items():
        if isinstance(to, Absent):
            deleted.append(key)
            size += size_of(key)
            continue
        if isinstance(to, Expiring):
            expires[key], to = to.at, to.value
            size += size_of(key)
        values[key] = raw = raw_of(to)
        size += size_of(key, raw)
    return Changes(clear=cleared, set=values, delete=deleted, expires=expires), size


def result_of(ended: Settled) -> object:
    """Return the result of a call, decoded."""
    return msgspec.json.decode(ended.result)
