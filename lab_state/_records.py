"""A check of flat lists and dicts, which takes about as long as encoding them. This module does no I/O.

A flat list or dict has only scalars, or only rows. A row is a dict with scalars only. The rows
are converted to Structs, slice by slice, and the Structs are dropped. Their class has a field for each
key of the first row. A field accepts a `str`, an `int`, a `bool`, `None` or a finite float, and
nothing else. So if all rows can be converted, each key is a `str`, and there is no NaN, no time, no
`msgspec.Raw`, and no third level of nesting. Such a value needs no other check.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import msgspec

from lab_state._entries import SCALARS
from lab_state._json_keys import have_own_texts

_Finite = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
_Scalar = str | int | _Finite | bool | None

_LEAST = 4 * 1024
"""The smallest size in bytes of a value that is converted. With a smaller value, a failure would cost more than a success saves."""

_SLICE = 256
"""The number of items that are converted in one call. The memory of one slice is reused for the next."""

_ENOUGH = 64 * 1024
"""After this many bytes of rows with the same keys, a class is made for them, in 100 to 700 microseconds."""

_MOST_FIELDS, _LONGEST_NAMES = 32, 1024  # for more keys, or more characters in all keys, no class is made
_MOST_CLASSES = 256  # when `_classes` has this many items, all of them are dropped

_classes: dict[tuple[str, ...], Any] = {}
"""The type of a list of rows, by the keys of the rows; `None` if msgspec refuses the keys.

Until `_ENOUGH` bytes of rows with these keys were seen, the item is the number of these bytes.
"""


def is_flat(value: Any, size: int) -> bool:
    """Return True if a value is known to be a flat list or dict. Otherwise it needs other checks.

    Args:
        value: The value.
        size: The number of bytes of its JSON. Below `_LEAST`, the value is not examined and the result is False.
    """
    if size < _LEAST:
        return False
    items = value
    if value.__class__ is dict:
        if not have_own_texts(value):
            return False
        items = [*value.values()]
    elif value.__class__ is not list:
        return False
    kind = _type_of(items[0], size)
    if kind is None:
        return False
    try:
        for start in range(0, len(items), _SLICE):
            msgspec.convert(items[start : start + _SLICE], kind)
    except msgspec.ValidationError:
        return False
    return True


def _type_of(first: Any, size: int) -> Any:
    """Return the type of a list whose first item is `first`; `None` if the list must be checked in another way."""
    if first.__class__ in SCALARS:
        return list[_Scalar]
    if first.__class__ is not dict or len(first) > _MOST_FIELDS:
        return None
    names = tuple(first)
    kind = _classes.get(names, 0)
    if kind.__class__ is not int:
        return kind
    if {*map(type, names)} != {str} or sum(map(len, names)) > _LONGEST_NAMES:
        return None
    if len(_classes) >= _MOST_CLASSES:
        _classes.clear()
    _classes[names] = kind = _list_of(names) if kind + size >= _ENOUGH else kind + size
    return None if kind.__class__ is int else kind


def _list_of(names: tuple[str, ...]) -> Any:
    """Return the type of a list of rows with these keys; `None` if msgspec does not accept one of the keys."""
    fields = {f"f{number}": name for number, name in enumerate(names)}
    try:
        record = msgspec.defstruct(
            "Record", [(field, _Scalar, None) for field in fields], rename=fields, forbid_unknown_fields=True, gc=False
        )
    except ValueError:
        return None
    return list[record]  # type: ignore[valid-type]
