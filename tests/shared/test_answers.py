"""Answers of an owner as results and errors, and values in the form of a message."""

from __future__ import annotations

import pytest
from msgspec import Raw

from lab_state import InvalidValueError, StorageError, TypeMismatchError, UnavailableError, UnsupportedError
from lab_state._entries import DELETED, EXPIRED, Expiring, Json, StoredOrGone, Value
from lab_state.exceptions import FencedError
from lab_state.shared._answers import Refusal, Settled, changes_of, ended, raw_of, relative, result_of, size_of
from lab_state.shared._messages import Changes, Failed, MakeChanges, Ok, Raised, Refused
from lab_state.shared._wire import encode_for_owner


def test_a_result() -> None:
    """The end of a call has the revision and the result of its answer."""
    settled = ended(Ok(1, 7, Raw(b"[1,true]")), [], 3)
    assert settled == Settled(7, Raw(b"[1,true]"))
    assert isinstance(settled, Settled)
    assert result_of(settled) == [1, True]


def test_a_refusal() -> None:
    """It has the value of each key of the check, and the connection. A key that is left out is missing."""
    values = {"a": (Raw(b"5"), None), "b": (Raw(b'{"x":1}'), 99)}
    assert ended(Refused(1, 7, values), ["a", "b", "c"], 3) == Refusal(
        7, {"a": 5, "b": Expiring(Json(b'{"x":1}'), 99), "c": DELETED}, 3
    )
    assert ended(Refused(1, 7, None), ["a"], 3) == Refusal(7, None, 3)


@pytest.mark.parametrize("kind", [TypeMismatchError, InvalidValueError])
def test_an_error_of_the_stored_value(kind: type[TypeMismatchError]) -> None:
    """It has the class, the text and the path."""
    with pytest.raises(kind) as caught:
        ended(Raised(1, 7, kind.__name__, "a text", "$[0]"), ["a"], 3)  # type: ignore[arg-type]
    assert (caught.value.args, caught.value.path) == (("a text", "$[0]"), "$[0]")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("FencedError", FencedError),
        ("UnavailableError", UnavailableError),
        ("UnsupportedError", UnsupportedError),
        ("StorageError", StorageError),
        ("ErrorOfAnotherStorage", StorageError),
    ],
)
def test_a_failed_commit(name: str, kind: type[StorageError]) -> None:
    """The error has the class of the owner's error. A class that this process does not know is a `StorageError`."""
    with pytest.raises(StorageError) as caught:
        ended(Failed(1, name, "the disk is full"), [], 3)
    assert (type(caught.value), str(caught.value)) == (kind, "the disk is full")


def test_an_error_names_the_key_of_its_handle() -> None:
    """The prefix of a namespace is left out, once."""
    error = relative(TypeMismatchError("key 'a/b': not 'a/b' - at `$`", "$"), "a/b", "a/")
    assert (type(error), error.args) == (TypeMismatchError, ("key 'b': not 'a/b' - at `$`", "$"))
    other = relative(InvalidValueError("the sum is too large"), "a/b", "a/")
    assert (type(other), str(other)) == (InvalidValueError, "the sum is too large")


@pytest.mark.parametrize(
    ("value", "data"),
    [("é", '"é"'.encode()), (5, b"5"), (1.0, b"1.0"), (True, b"true"), (None, b"null"), (Json(b"[1]"), b"[1]")],
)
def test_a_value_in_a_message(value: Value, data: bytes) -> None:
    """A scalar is encoded, and JSON stays as it is."""
    assert bytes(raw_of(value)) == data
    raw = Raw(b"[2]")
    assert raw_of(raw) is raw


def test_the_changes_of_a_draft() -> None:
    """They are those of a record. An expired key is a deleted one."""
    changes: dict[str, StoredOrGone] = {"a": 1, "b": Expiring("x", 99), "c": DELETED, "d": EXPIRED}
    made, _ = changes_of(changes, cleared=True)
    assert made == Changes(clear=True, set={"a": Raw(b"1"), "b": Raw(b'"x"')}, delete=["c", "d"], expires={"b": 99})
    assert changes_of({}, cleared=False) == (Changes(), 0)


@pytest.mark.parametrize("key", ["a", "\x01" * 50, "é" * 50, "\U0001f600" * 50, '"\\' * 25], ids=range(5))
def test_the_bound_of_a_size(key: str) -> None:
    """No message is larger, whatever its keys need in JSON."""
    for to in (1, "x" * 100, Expiring(None, 10**13), DELETED):
        changes, size = changes_of({key: to}, cleared=False)
        call = MakeChanges(2**63 - 1, 2**63 - 1, 2**63 - 1, [key], [key], changes)
        assert sum(map(len, encode_for_owner(call))) <= size + 2 * size_of(key) + 256
