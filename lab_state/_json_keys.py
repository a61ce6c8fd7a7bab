"""Two keys of one dict that are one key in JSON: `{7: …, "7": …}`. Pure.

msgspec would write both, and a read would find the last. A dict whose keys are all `str`
cannot have two such keys. An encoder that sorts takes no other keys, at any depth: it
tells at the price of a second encoding, whose output shows NaN and times with a zone, too.
Where it refuses, the JSON is looked at.
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


def _other(value: object) -> object:
    """Encode a deque as a list, and a model as NaN: a model checks its own JSON."""
    if isinstance(value, deque):
        return list(cast("deque[object]", value))
    return nan if hasattr(value, "model_dump_json") else None


check_str_keys = msgspec.msgpack.Encoder(order="deterministic", enc_hook=_other).encode
"""Raises if a dict has a key that is not a `str`, at any depth; and for what MessagePack cannot hold."""


def double_key(data: bytes) -> tuple[list[str | int], str] | None:
    """Find the first object of valid JSON that has a member twice. Return the path to it, and the name; or `None`."""
    try:
        if len(_encode(_decode(data))) == len(data):  # without the second member it would be shorter
            return None
        whole = json.loads(data, object_pairs_hook=_Object)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # refused for this elsewhere
        return None
    stack: list[tuple[list[str | int], Any]] = [([], whole)]
    while stack:
        way, item = stack.pop()
        if isinstance(item, _Object):
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


class _Object:
    """The members of an object as they were written."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs
