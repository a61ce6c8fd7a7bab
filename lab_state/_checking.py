"""The reasons why stored values are not of a type. This module does no I/O."""

from __future__ import annotations

from typing import Any, NamedTuple

from lab_state._entries import Value
from lab_state._types import decode_value
from lab_state.exceptions import TypeMismatchError


class Misfit(NamedTuple):
    """A value that is not of the expected type.

    Attributes:
        key: The key.
        path: The JSON path to the part that does not fit; `$` is the value itself.
        expected: The expected type, and the difference at the path. The text contains no value.
    """

    key: str
    path: str
    expected: str


def misfit(key: str, value: Value, type_: Any) -> Misfit | None:
    """Return the reason why a stored value is not of a type; `None` if it is of the type."""
    try:
        decode_value(value, type_)
    except TypeMismatchError as error:
        return misfit_of(key, error)
    return None


def misfit_of(key: str, error: TypeMismatchError) -> Misfit:
    """Return the reason that an error of `decode_value` contains."""
    return Misfit(key, error.path, str(error).removesuffix(f" - at `{error.path}`"))
