"""The error tree: what is what, what it says, and that it travels."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from lab_state import exceptions
from lab_state.exceptions import (
    ClosedError,
    ConflictError,
    CorruptionError,
    FencedError,
    InvalidKeyError,
    InvalidNameError,
    InvalidValueError,
    KeyNotFoundError,
    LabStateError,
    LockedError,
    MigrationError,
    SchemaError,
    StorageError,
    TypeMismatchError,
    UnavailableError,
    UnsupportedError,
    WaitTimeoutError,
)

ERRORS: list[LabStateError] = [
    LabStateError("what failed"),
    KeyNotFoundError("some key"),
    InvalidNameError("what failed"),
    InvalidKeyError("what failed"),
    InvalidValueError("what failed"),
    InvalidValueError("what failed", "$.a[0]"),
    TypeMismatchError("what failed at `$.a`", "$.a"),
    SchemaError("what failed"),
    MigrationError("what failed", 3),
    MigrationError("what failed at `$.a`", 3, "some key", "$.a"),
    ClosedError("what failed"),
    ConflictError("what failed"),
    StorageError("what failed"),
    UnavailableError("what failed"),
    WaitTimeoutError("what failed"),
    UnsupportedError("what failed"),
    LockedError("what failed"),
    FencedError("what failed"),
    CorruptionError("/state/a.json", 12, "what failed"),
]


def all_classes() -> set[type]:
    return {each for each in vars(exceptions).values() if inspect.isclass(each)}


def test_every_error_is_tried_here() -> None:
    """This file tries every class of the module."""
    assert {type(error) for error in ERRORS} == all_classes()


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (LabStateError, (Exception,)),
        (KeyNotFoundError, (LabStateError, KeyError)),
        (InvalidNameError, (LabStateError, ValueError)),
        (InvalidKeyError, (LabStateError, ValueError)),
        (InvalidValueError, (LabStateError, ValueError)),
        (TypeMismatchError, (LabStateError,)),
        (SchemaError, (LabStateError,)),
        (MigrationError, (LabStateError,)),
        (ClosedError, (LabStateError,)),
        (StorageError, (LabStateError,)),
        (UnavailableError, (StorageError,)),
        (WaitTimeoutError, (UnavailableError, TimeoutError)),
        (UnsupportedError, (StorageError,)),
        (LockedError, (StorageError,)),
        (FencedError, (StorageError,)),
        (CorruptionError, (StorageError,)),
    ],
)
def test_the_tree(error: type[BaseException], bases: tuple[type[BaseException], ...]) -> None:
    """Each error stands where the design puts it in the tree."""
    assert error.__bases__ == bases


def test_a_key_error_catches_a_missing_key_only() -> None:
    """KeyError is what a missing key is, and no other error."""
    found: set[type] = {type(error) for error in ERRORS if isinstance(error, KeyError)}
    assert found == {KeyNotFoundError}


def test_a_value_error_catches_bad_arguments_only() -> None:
    """ValueError is what a bad argument is, and no other error."""
    found = {type(error) for error in ERRORS if isinstance(error, ValueError)}
    assert found == {InvalidNameError, InvalidKeyError, InvalidValueError}


def test_a_timeout_error_catches_a_wait_only() -> None:
    """TimeoutError, and so OSError, is what a wait that took too long is, and no other error."""
    for caught in (TimeoutError, OSError):
        found: set[type] = {type(error) for error in ERRORS if isinstance(error, caught)}
        assert found == {WaitTimeoutError}


@pytest.mark.parametrize("error", ERRORS, ids=range(len(ERRORS)))
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_can_be_pickled(error: LabStateError, protocol: int) -> None:
    """An error goes to another process with its message, its attributes and its notes."""
    noted = copy.copy(error)
    noted.add_note("a note")
    found = pickle.loads(pickle.dumps(noted, protocol))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert found.args == error.args
    assert vars(found) == {**vars(error), "__notes__": ["a note"]}


@pytest.mark.parametrize("error", ERRORS, ids=range(len(ERRORS)))
def test_an_error_can_be_copied(error: LabStateError) -> None:
    """An error can be copied, deeply or not, with its message and its attributes."""
    for found in (copy.copy(error), copy.deepcopy(error)):
        assert found is not error
        assert (type(found), str(found), found.args, vars(found)) == (type(error), str(error), error.args, vars(error))


def test_a_missing_key_is_a_sentence() -> None:
    """KeyNotFoundError says what to do, where KeyError would quote its argument, and knows the key."""
    error = KeyNotFoundError("some key")
    assert str(error) == "no key 'some key' in the state; to read a key that may be missing, pass a default"
    assert error.key == "some key"
    assert str(KeyNotFoundError("a\ud800")).encode()


@pytest.mark.parametrize(("path", "message"), [("$", "what failed"), ("$.a[0]", "what failed - at `$.a[0]`")])
def test_an_invalid_value_says_where(path: str, message: str) -> None:
    """InvalidValueError says where in the value, unless that is the value itself."""
    error = InvalidValueError("what failed", path)
    assert str(error) == message
    assert error.path == path
    assert InvalidValueError("what failed").path == "$"


def test_a_type_mismatch_says_its_message() -> None:
    """TypeMismatchError says its message alone, and knows the path."""
    error = TypeMismatchError("what failed at `$.a`", "$.a")
    assert str(error) == "what failed at `$.a`"
    assert error.path == "$.a"
    assert TypeMismatchError("what failed").path == "$"


def test_corruption_says_where_and_what() -> None:
    """CorruptionError says which file, at which byte, and what is wrong."""
    error = CorruptionError("/state/a.json", 12, "a frame is missing")
    assert str(error) == "/state/a.json cannot be loaded (byte 12): a frame is missing"
    assert (error.path, error.offset, error.detail) == ("/state/a.json", 12, "a frame is missing")
