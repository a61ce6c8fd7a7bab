"""Find two keys of one dict that are one key in JSON, as in `{7: 1, "7": 2}`. This module does no I/O.

msgspec writes both members, and a reader of the JSON finds only the last one. A dict whose
keys are all `str` cannot have two such keys. With `order="deterministic"`, msgspec's encoders
accept only `str` keys, at any depth. So a value is encoded a second time, as MessagePack with this
option, unless it is a scalar, or `is_flat` of `_records.py` accepts it. If the encoder refuses a value, its JSON is
examined. `_values.py` also searches the MessagePack for NaN, infinity and times, because JSON has them
as `null` or as text.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from math import nan
from typing import Any, cast

import msgspec

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode

_MANY = 32
"""If the outermost dict has more keys than this, `have_own_texts` checks them, because the encoder would also sort them."""


class _Keys(msgspec.Struct, gc=False):
    """A class without fields. The conversion of a dict to it checks that each key is a `str`, and ignores the values."""


def _other(value: object) -> object:
    """Return a value to encode in place of an object that msgspec cannot encode: a list for a deque, NaN for a model, else `None`."""
    if isinstance(value, deque):
        return list(cast("deque[object]", value))
    return nan if hasattr(value, "model_dump_json") else None


check_str_keys = msgspec.msgpack.Encoder(order="deterministic", enc_hook=_other).encode
"""Encode a value as MessagePack. Raise an error if MessagePack cannot hold the value, or if a key of a dict at any depth is not a `str`."""


def pack(value: Any) -> bytes | None:
    """Return a value in MessagePack. Return `None` if `check_str_keys` refuses the value.

    The keys of a large outermost dict are left out if `have_own_texts` accepts them, because this takes less time than
    encoding them.
    """
    try:
        if value.__class__ is dict and len(value) > _MANY and have_own_texts(value):
            value = [*value.values()]
        return check_str_keys(value)
    except Exception:  # noqa: BLE001 -- the caller then examines the JSON, whatever the error is
        return None


def have_own_texts(keys: dict[Any, Any]) -> bool:
    """Return whether all keys are `str`, or all are `int`. If so, no two keys have the same text in JSON.

    An object of a subclass of `str` or `int` could have any text, so such keys are not accepted.
    """
    try:
        msgspec.convert(keys, _Keys)
    except msgspec.ValidationError:
        return set(map(type, keys)) == {int}
    return True


def is_canonical(data: bytes) -> bool:
    """Return whether msgspec decodes JSON, and encodes it to the same bytes. The result is False if an object has a member twice."""
    try:
        return _encode(_decode(data)) == data
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False


def double_key(data: bytes) -> tuple[list[str | int], str] | None:
    """Find the first object of valid JSON that has a member twice. Return its path and the name of the member, or `None`."""
    if is_canonical(data):
        return None
    try:
        whole = json.loads(data, object_pairs_hook=_Members)
    except (ValueError, RecursionError):  # another check refuses such a value
        return None
    stack: list[tuple[list[str | int], Any]] = [([], whole)]
    while stack:
        way, item = stack.pop()
        if isinstance(item, _Members):
            seen: set[str] = set()
            for name, _ in item.pairs:
                if name in seen:
                    return way, name
                seen.add(name)
            stack.extend(([*way, name], child) for name, child in reversed(item.pairs))
        elif isinstance(item, list):
            stack.extend(([*way, place], child) for place, child in _backwards(cast("Iterable[Any]", item)))
    return None


def _backwards(items: Iterable[Any]) -> list[tuple[int, Any]]:
    return list(enumerate(items))[::-1]


class _Members:
    """The members of an object as they were written."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs
