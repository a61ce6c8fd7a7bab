"""The parts of a value, the search for the part that causes a refusal, and two checks of all parts.

The checks find NaN and infinity, and times that JSON would change. A part is an item of a list, tuple or set, a value of
a dict, or a field of an object. The step of a part is its text in a path, such as `[3]`. This module does no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, time, timezone
from math import isfinite
from typing import Any, cast

import msgspec

from lab_state._entries import SCALARS
from lab_state._models import step_of
from lab_state._nesting import MAX_DEPTH

PLAIN = frozenset({dict, list, tuple, set, frozenset})
"""The built-in classes of containers. A subclass of them is not plain."""

_TIMES = (datetime, time)
_MAX_PATH = 200  # characters

_ODD_OFFSET = "a time whose offset has seconds cannot be kept: JSON would change it; use .astimezone(timezone.utc)"
_ZONE_OF_A_TIME = (
    "a time of day with a zone cannot be kept: it has no offset without a date; keep the zone's key in another field"
)


def first_part(container: Any, refused: Callable[[Any], bool]) -> tuple[object, object] | None:
    """Return the first part that is refused, as a pair of `parts_of`. If there are no parts, return `None`.

    This is a binary search. `refused` is called with half of the remaining parts, as one list or tuple.
    The part that remains is returned without a call. So if no part is refused, the result is the last part.
    """
    kind = container.__class__
    if kind in SCALARS:
        return None
    steps: Sequence[object]
    values: Sequence[object]
    if kind is list or kind is tuple:
        values, steps = container, range(len(container))
    elif kind is dict:
        values, steps = [*container.values()], [*container]
    else:
        steps, values = tuple(zip(*parts_of(container), strict=True)) or ((), ())
    first, end = 0, len(values)
    while end - first > 1:
        middle = (first + end) // 2
        if refused(values[first:middle]):
            end = middle
        else:
            first = middle
    return (steps[first], values[first]) if values else None


def innermost(value: Any, refused: Callable[[Any], bool], *, fields: bool) -> tuple[list[str], Any]:
    """Return the steps to the innermost part that is refused, and that part. If no part is refused, return no steps and the value.

    Args:
        value: The value, which is refused itself.
        refused: A function that returns whether a part is refused. Its argument is one part, or a list or tuple of parts.
        fields: Whether to examine the fields of objects whose class is not in `PLAIN`. Pass False if `refused` encodes
            the parts: a model may write a field in another form than the field alone would have.
    """
    steps: list[str] = []
    while True:
        chain = _single_parts(value, refused, fields=fields)
        # If a part of the chain is refused, all parts before it are refused, too. The last part is tried first,
        # because it is refused in most cases. If it is not refused, a binary search finds the last refused part.
        first, end = (len(chain),) * 2 if chain and refused(chain[-1][1]) else (0, max(0, len(chain) - 1))
        while first < end:
            middle = (first + end + 1) // 2
            if refused(chain[middle - 1][1]):
                first = middle
            else:
                end = middle - 1
        steps += [step for step, _ in chain[:first]]
        if first:
            value = chain[first - 1][1]
        if first < len(chain) or not (fields or value.__class__ in PLAIN):
            return steps, value
        found = first_part(value, refused)
        if found is None or not refused(found[1]):
            return steps, value
        steps.append(step_in(value, found[0]))
        value = found[1]


def _single_parts(value: Any, refused: Callable[[Any], bool], *, fields: bool) -> list[tuple[str, Any]]:
    """Return a chain of parts, from the outermost to the innermost. Each is the only part of its level that is not a scalar.

    The chain ends at a level that has no such part, or whose scalars are refused. Only scalars are checked. So a
    large part deep inside is not checked again for each level above it.
    """
    chain: list[tuple[str, Any]] = []
    while len(chain) <= MAX_DEPTH and (fields or value.__class__ in PLAIN) and (only := single_part(value, refused)):
        chain.append((step_in(value, only[0]), only[1]))
        value = only[1]
    return chain


def single_part(value: Any, refused: Callable[[Any], bool]) -> tuple[object, Any] | None:
    """Return the only part that is not a scalar, as a pair of `parts_of`.

    If there is not exactly one such part, or if a scalar is refused, return `None`.
    """
    parts = [*parts_of(value)]
    inner = [pair for pair in parts if pair[1].__class__ not in SCALARS]
    if len(inner) != 1 or (len(parts) > 1 and refused([part for _, part in parts if part is not inner[0][1]])):
        return None
    return inner[0]


def parts_of(container: Any) -> Iterable[tuple[object, object]]:
    """Return a pair for each part: a place, and the part itself.

    The place is the key in a dict, the position in a list, tuple or set, and otherwise the step.
    """
    kind: Any = container.__class__
    if kind is dict:
        items: Iterable[tuple[object, object]] = container.items()
        return items
    sequence: Iterable[object] = container
    return enumerate(sequence) if kind in PLAIN else _children(container)


def step_in(container: Any, step: object) -> str:
    """Return the step as text, from the first item of a pair of `parts_of`."""
    kind = container.__class__
    return step_of(step) if kind is dict else f"[{step}]" if kind in PLAIN else str(step)


def joined(steps: list[str]) -> str:
    """Return the path with these steps, shortened if it is long."""
    return shortened("$" + "".join(steps))


def _children(value: object) -> Iterator[tuple[str, object]]:
    """Yield the parts of a value whose class is not in `PLAIN`, each with its step in the path."""
    if isinstance(value, dict):
        members = cast("dict[object, object]", value)
        yield from ((step_of(key), child) for key, child in members.items())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        items = cast("Iterable[object]", value)
        yield from ((f"[{index}]", child) for index, child in enumerate(items))
    else:
        for name in _field_names(value):
            yield f".{name}", getattr(value, name, None)


def _field_names(value: object) -> Iterator[str]:
    """Yield the field names of a Struct, a dataclass, an attrs object or a model of Pydantic. For any other object, yield none."""
    kind = type(value)
    if isinstance(value, msgspec.Struct):
        yield from kind.__struct_fields__  # type: ignore[attr-defined]
    elif (fields := getattr(kind, "__dataclass_fields__", None)) is not None:
        yield from fields
    elif (attributes := getattr(kind, "__attrs_attrs__", None)) is not None:
        yield from (attribute.name for attribute in attributes)
    else:
        yield from getattr(kind, "model_fields", ())  # Pydantic


def shortened(path: str) -> str:
    """Return the path, or its beginning and three dots if it is long."""
    return path if len(path) <= _MAX_PATH else f"{path[:_MAX_PATH]}..."


def first_not_finite(tree: object) -> str | None:
    """Return the path of a NaN or an infinity; `None` if there is none."""
    stack: list[tuple[str, object, int]] = [("$", [tree], 0)]  # in a list, `tree` is a part; its step is removed below
    while stack:
        path, item, depth = stack.pop()
        for step, child in parts_of(item):
            kind: Any = child.__class__
            if kind is float and not isfinite(cast("float", child)):
                return shortened(path + step_in(item, step)).replace("$[0]", "$", 1)
            if kind not in SCALARS and depth <= MAX_DEPTH:  # a bound, because the value may contain itself
                stack.append((path + step_in(item, step), child, depth + 1))
    return None


def moved_time(value: Any, *, keys: bool = True) -> str | None:
    """Return the reason why a time in the value would be written as another time; `None` if there is no such time.

    Args:
        value: The value. It does not contain itself.
        keys: Whether to examine the keys of dicts, too.
    """
    level, fixed = [value], None
    while level:
        below: list[Any] = []
        for item in level:
            kind = item.__class__
            if kind is dict:
                parts = (*item, *item.values()) if keys else item.values()
                below += [part for part in parts if part.__class__ not in SCALARS]
            elif kind is list:
                below += [part for part in item if part.__class__ not in SCALARS]
            elif kind is datetime or kind is time or isinstance(item, _TIMES):
                if (zone := item.tzinfo) is None or zone is UTC or zone is fixed:
                    continue
                if (why := _moved(item)) is not None:
                    return why
                if zone.__class__ is timezone:
                    fixed = zone  # this zone has one offset: other times in it need no check
            else:
                below += [part for _, part in parts_of(item) if part.__class__ not in SCALARS]
        level = below
    return None


def _moved(item: datetime | time) -> str | None:
    """Return the reason why a time with a zone would be written as another time; `None` if it would not."""
    if (offset := item.utcoffset()) is None:
        return _ZONE_OF_A_TIME
    return _ODD_OFFSET if offset.total_seconds() % 60 else None
