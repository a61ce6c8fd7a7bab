"""Copies of a state that follow its owner step by step: the followers of a shared state, and local readers of a mirror.

Pure and synchronous. A step has the new values of keys, the deleted keys, and whether all keys were deleted
before. It is applied to a `State`, so indexes, views and watches work as in the owner. The caller decides
which steps to apply.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import TypeVar

import msgspec
from msgspec import Raw

from lab_state import _batch
from lab_state._batch import Batch, in_parts
from lab_state._entries import DELETED, EXPIRED, SCALARS, Absent, Expiring, Json, StoredOrGone, Value
from lab_state._not_json import NOT_JSON
from lab_state._state import State

T = TypeVar("T")

_OBJECT_OR_ARRAY = (b"{", b"[")


def stored_of(data: bytes | bytearray | memoryview | Raw) -> Value:
    """Return a value as a manager stores it: a scalar decoded, any other value as JSON.

    The result does not keep `data` alive. If `data` is invalid JSON, so is the result, and a read raises an error.
    """
    held = bytes(data)
    if held[:1] in _OBJECT_OR_ARRAY:
        return Json(held)
    try:
        value: Value = msgspec.json.decode(held)
    except NOT_JSON:
        return Json(held)
    return value if value.__class__ in SCALARS else Json(held)  # a foreign client may have put spaces before an object


def changes_of(
    values: Mapping[str, Raw], expires: Mapping[str, int], deleted: Iterable[str]
) -> dict[str, StoredOrGone]:
    """Return the changes of a step at once; see `changes_in_steps`."""
    return result_of(changes_in_steps(values, expires, deleted))


def changes_in_steps(
    values: Mapping[str, Raw], expires: Mapping[str, int], deleted: Iterable[str]
) -> Generator[None, None, dict[str, StoredOrGone]]:
    """Return the changes of a step, from its JSON. Yield after each 500 keys.

    Args:
        values: The new values of keys.
        expires: The expiry times of the keys that expire, in milliseconds since 1970.
        deleted: The keys that are deleted.
    """
    changes: dict[str, StoredOrGone] = {}
    for part in in_parts(values.items()):
        for key, raw in part:
            value = stored_of(raw)
            changes[key] = Expiring(value, expires[key]) if key in expires else value
        yield
    for keys in in_parts(deleted):
        changes.update(dict.fromkeys(keys, DELETED))
        yield
    return changes


def result_of(steps: Generator[None, None, T]) -> T:
    """Run all steps at once, and return their result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result


class Step:
    """A step that is being applied to a copy. Other code must not change the copy between `prepare` and `finish`."""

    def __init__(
        self, copy: State, changes: Mapping[str, StoredOrGone], revision: int, *, cleared: bool, time: int = 0
    ) -> None:
        """Set the step. Nothing is changed yet.

        Args:
            copy: The copy. All of its changes are taken.
            changes: The last effect on each key. A key that is deleted need not exist.
            revision: The revision of the copy after the step.
            cleared: Whether all keys are deleted first.
            time: The time of the owner at the step, in milliseconds since 1970. A deleted key with an expiry up to
                this time counts as expired. With 0, no key does.
        """
        self._copy = copy
        self._changes = changes
        self._revision = revision
        self._cleared = cleared
        self._time = time
        self._expired = 0
        self._batch: Batch | None = None

    def prepare(self) -> Iterator[None]:
        """Prepare the step in parts, and yield between two parts. Reads do not see the step before `finish`."""
        copy, source = self._copy, dict[str, StoredOrGone]()
        for part in in_parts(self._changes.items()):
            source.update(self._effects(part))
            if len(self._changes) >= _batch.MANY:
                yield
        self._batch = Batch(copy, source, cleared=self._cleared, expired=True)
        yield from self._batch.prepare()

    def _effects(self, part: Iterable[tuple[str, StoredOrGone]]) -> Iterator[tuple[str, StoredOrGone]]:
        """Yield the changes without deletions of missing keys. Mark the deletions of expired keys as `EXPIRED`."""
        entries = self._copy.entries
        for key, to in part:
            if not isinstance(to, Absent):
                yield key, to
            elif not self._cleared and key in entries:
                stored = entries[key]
                has_expired = isinstance(stored, Expiring) and stored.at <= self._time
                self._expired += has_expired
                yield key, EXPIRED if has_expired else DELETED

    def finish(self) -> None:
        """Make the prepared changes at once. From now on reads see them."""
        assert self._batch is not None  # `prepare` has made it
        self._show(self._batch.switch)

    def apply(self) -> None:
        """Make the whole step at once, without `prepare` and `finish`."""
        self._show(self._apply)

    def _apply(self) -> int | None:
        copy, effects = self._copy, dict(self._effects(self._changes.items()))
        if effects or (self._cleared and len(copy.entries)):
            return copy.apply(effects, cleared=self._cleared)
        return None

    def _show(self, change: Callable[[], int | None]) -> None:
        """Call `change`, which returns `None` if it has changed nothing. Set the revision, and count the expired keys."""
        copy, before = self._copy, self._copy.revision
        copy.skip_to(self._revision - 1)
        try:
            if change() is None:
                copy.skip_to(self._revision)
        except BaseException:  # such as a MemoryError: a part of the step may be missing, so it is repeated
            copy.take()
            copy.skip_to(before)
            raise
        copy.deleted -= self._expired
        copy.swept += self._expired
        copy.free(copy.take().changes)
        if copy.expiries:
            copy.expiries.advance(copy.now())
