"""The types of the values of a schema. This module does no I/O.

A member is *unknown* to a type if the decoder of the type ignores it. If the decoded value is then written, the member is lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from msgspec import Raw

from lab_state._arguments import check_prefix
from lab_state._checking import Misfit, misfit_of
from lab_state._entries import JSON_CLASSES, Expiring, Json, Stored, Value
from lab_state._models import path_of
from lab_state._parts import shortened
from lab_state._types import check_type, decode_json, decode_value
from lab_state._values import encode
from lab_state.exceptions import InvalidValueError, TypeMismatchError

_MARK = "$lab_state probe"
_PROBES = ({_MARK: _MARK}, _MARK)
"""Values that take the place of a member, one after the other, to find out whether a type reads the member. Most types refuse one of them."""


class Types:
    """The types of the values under some prefixes. If several prefixes fit a key, the longest one counts.

    With `strict`, a value with an unknown member does not fit.
    """

    def __init__(self, types: Mapping[str, Any], *, strict: bool) -> None:
        """Check and keep the types.

        Raises:
            TypeError: A prefix is not a `str`, or a type cannot be decoded.
        """
        for prefix, type_ in types.items():
            check_prefix(prefix)
            check_type(type_)
        self._strict = strict
        self._by_length = sorted(types.items(), key=lambda item: len(item[0]), reverse=True)

    def of(self, key: str) -> tuple[Any] | None:
        """Return the type of a key, in a tuple, because the type itself may be `None`. Return `None` if the key has no type."""
        for prefix, type_ in self._by_length:
            if key.startswith(prefix):
                return (type_,)
        return None

    def misfit(self, key: str, value: Value) -> Misfit | None:
        """Return the reason why a value does not fit the type of its key; `None` if it fits, or if the key has no type."""
        found = self.of(key)
        if found is None:
            return None
        try:
            decoded = decode_value(value, found[0])
        except TypeMismatchError as error:
            return misfit_of(key, error)
        if self._strict and isinstance(value, bytes | Raw):
            try:
                path = _unknown_member(value, decoded, found[0])
            except (MemoryError, RecursionError):
                raise
            except Exception as error:  # noqa: BLE001 -- a serializer of the caller may raise any error, with the value in its text
                return _not_written(key, error)
            if path is not None:
                return Misfit(key, path, "the type does not know this member")
        return None

    def fit(self, entries: Sequence[tuple[str, Stored]]) -> bool:
        """Return True if all of these values are known to be of the types of their keys. This takes less time than `misfits`.

        There must be one entry or more. The result may be False even if all values are of their types. It is False if the
        keys may have different types, if a key has no type, if a value has an expiry, and for a strict schema. It is also
        False if a list of the type cannot be decoded.
        """
        keys, values = zip(*entries, strict=True)
        type_ = self._type_of_all(min(keys), max(keys))
        if type_ is None or self._strict or Expiring in set(map(type, values)):
            return False
        return _all_fit(cast("Sequence[Value]", values), type_[0])

    def _type_of_all(self, low: str, high: str) -> tuple[Any] | None:
        """Return the type of all keys from `low` to `high`, in a tuple; `None` if they have no type, or may have different types."""
        for number, (prefix, type_) in enumerate(self._by_length):
            if low.startswith(prefix) and high.startswith(prefix):
                is_only = not any(longer.startswith(prefix) for longer, _ in self._by_length[:number])
                return (type_,) if is_only else None
        return None

    def misfits(self, values: Sequence[tuple[str, Value]]) -> Iterator[Misfit]:
        """Yield a misfit for each value that does not fit the type of its key. They are grouped by prefix."""
        by_type: dict[int, tuple[Any, list[tuple[str, Value]]]] = {}
        for key, value in values:
            for number, (prefix, type_) in enumerate(self._by_length):
                if key.startswith(prefix):
                    by_type.setdefault(number, (type_, []))[1].append((key, value))
                    break
        for type_, some in by_type.values():
            if self._strict or not _all_fit([value for _, value in some], type_):
                yield from filter(None, itertools.starmap(self.misfit, some))

    def check(self, key: str, value: Value) -> None:
        """Check a value before it is stored.

        Raises:
            InvalidValueError: The value does not fit the type of its key.
        """
        if (wrong := self.misfit(key, value)) is not None:
            raise InvalidValueError(f"the value of {key!r} does not fit the schema: {wrong.expected}", wrong.path)


def _not_written(key: str, error: Exception) -> Misfit:
    """Return the misfit of a value that its type reads, and cannot write."""
    what = "with a strict schema, a type must be able to write what it reads"
    if isinstance(error, InvalidValueError):
        return Misfit(key, error.path, f"{what}, and {error.args[0]}")
    return Misfit(key, "$", f"{what}, and this one raises {type(error).__name__}")


def _all_fit(values: Sequence[Value], type_: Any) -> bool:
    """Return True if all values are known to be of a type. One call for many values takes less time than one for each."""
    if set(map(type, values)) <= JSON_CLASSES:
        data = cast("Sequence[bytes]", values)
    else:
        data = [value if isinstance(value, bytes | Raw) else encode(value) for value in values]
    try:
        decode_value(Json(b"[%b]" % b",".join(data)), list[type_])
    except (TypeError, TypeMismatchError):  # for example, there is no list of a `TypeAdapter`
        return False
    return True


def _unknown_member(value: bytes | Raw, decoded: object, type_: Any) -> str | None:
    """Return the path of the first member that a type does not know; `None` if it knows all.

    Raises:
        Exception: The decoded value cannot be written.
    """
    tree = decode_json(value)
    for way, holder in _dropped(tree, decode_json(encode(decoded)), ()):
        # A type may know a member that is not written again, such as one with its default value.
        kept, is_known = holder[way[-1]], False
        for probe in _PROBES:
            holder[way[-1]] = probe
            is_known = is_known or _is_read(tree, way, type_)
        holder[way[-1]] = kept
        if not is_known:
            return shortened(path_of([*way]))
    return None


def _is_read(tree: object, way: tuple[Any, ...], type_: Any) -> bool:
    """Return whether a type reads the probe in decoded JSON: it refuses the probe, or writes it again. `way` is the path to the probe."""
    try:
        again = encode(decode_value(Json(encode(tree)), type_))
    except (TypeMismatchError, TypeError, ValueError):  # Pydantic raises a `ValueError` for each error of a serializer
        return True
    # A type that reads the probe under an alias writes it under another name.
    return _MARK.encode() in again or _has(decode_json(again), way)


def _dropped(before: Any, after: Any, way: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], dict[Any, Any]]]:
    """Yield each member of decoded JSON that is missing in other decoded JSON: the path to it, and the dict that has it."""
    if before.__class__ is dict and after.__class__ is dict:
        for name, part in list(before.items()):
            if name in after:
                yield from _dropped(part, after[name], (*way, name))
            else:
                yield (*way, name), before
    elif before.__class__ is list and after.__class__ is list:
        for index, (part, other) in enumerate(zip(before, after, strict=False)):
            yield from _dropped(part, other, (*way, index))


def _has(tree: Any, way: tuple[Any, ...]) -> bool:
    """Return whether decoded JSON has a part at the path `way`."""
    for step in way:
        try:
            tree = tree[step]
        except (KeyError, IndexError, TypeError):
            return False
    return True
