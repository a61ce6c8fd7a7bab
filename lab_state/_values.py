"""Encode one value as JSON, and refuse values that would not be read back. This module does no I/O.

A scalar is stored as it is, and any other value as JSON. A value is refused if JSON cannot hold it,
or if some reader would get another value. Among the refused values are:

- NaN and infinity, because msgspec writes them as `null`
- a dict with two keys that are one key in JSON
- times that JSON would change
- a value that contains itself
- more than 128 levels of nesting, because Python's limit depends on the version of Python and on
  the caller's stack
- a lone surrogate
- an object of a class that neither msgspec nor `_encode_other` can encode
"""

from __future__ import annotations

import builtins
import re
import sys
from collections import deque
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, cast

import msgspec
from msgspec import Raw

from lab_state._entries import SCALARS, Json, Value
from lab_state._json_keys import check_str_keys, double_key, is_canonical, pack
from lab_state._models import HIDDEN, NOT_FINITE, class_of, first_problem, path_of, step_of, write
from lab_state._nesting import MAX_DEPTH, SHALLOW, deeper, too_deep
from lab_state._parts import (
    PLAIN,
    first_not_finite,
    first_part,
    innermost,
    joined,
    moved_time,
    single_part,
    step_in,
)
from lab_state._records import is_flat
from lab_state._types import decode_json, is_text, undecodable
from lab_state.exceptions import InvalidValueError

NULL = b"null"
"""The JSON that msgspec writes for None, and also for NaN and infinity."""

DEL, COLON, ALL_ONES = 0x7F, ord(":"), 0xFF
"""MessagePack that has none of these three bytes contains no NaN, no infinity, no time of day and no datetime with a zone."""

_MOST_DIGITS = 4300
"""msgspec does not read an int with more digits than this. By default, Python does not either."""

_SMALL = 16 * 1024
"""For JSON with fewer bytes than this, a search of the whole value is faster than a binary search for the bad part."""

_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1

_NO_ROOM = (
    "there are so many nested calls here that Python's recursion limit is too low for the nesting of the value; "
    "store it from a place with fewer nested calls"
)
_TOO_DEEP = f"more than {MAX_DEPTH} levels of nesting cannot be kept"
_LONE_SURROGATE = "a str with a lone surrogate cannot be kept: UTF-8 cannot hold it"
_TOO_MANY_DIGITS = "an int with more digits than Python converts cannot be kept; store it as a str"


def _encode_other(value: object) -> object:
    """Return a form that msgspec encodes, for a model of Pydantic, a path, an IP address or a deque. Refuse any other object."""
    kind = type(value)
    if hasattr(kind, "model_dump_json"):
        return Raw(write(value))
    if is_text(kind):
        return str(value)
    if isinstance(value, deque):
        return list(cast("deque[object]", value))
    raise NotImplementedError


encode = msgspec.json.Encoder(enc_hook=_encode_other).encode
check_json: Callable[[Any], object] = msgspec.json.Decoder(Raw).decode
"""Raise an error unless the bytes are one JSON value. UTF-8 is not checked."""


# Each pattern begins with one fixed byte. A search for one byte is ten times as fast as a search for a set of bytes.
find_ones = re.compile(rb"\xff(?:(?<=[\xd6\xd7\x0c]\xff)|(?<=\xcb\xff)[\xf0-\xff])").search
"""Search MessagePack for a datetime with a zone, or for a NaN or infinity with a minus sign."""

find_del = re.compile(rb"\x7f(?<=\xcb\x7f)[\xf0-\xff]").search
"""Search MessagePack for a NaN or infinity with a plus sign."""

find_colon = re.compile(rb":\d\d:(?<=[\xa8-\xb5]\d\d:\d\d:)").search
"""Search MessagePack for a time of day, or for a text of 8 to 21 bytes that looks like one."""


def encode_value(value: object) -> Value:
    """Return the stored form of a value.

    Raises:
        InvalidValueError: JSON cannot hold the value, or a read would not return it. The error has the path to the bad part.
    """
    kind: Any = value.__class__
    if kind in SCALARS:
        _check_scalar(cast("str | float | None", value))
        return cast("Value", value)
    try:
        data = encode(value)
        if kind is Raw:
            decode_json(data)  # raises an error for numbers that are out of range
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 -- a serializer of the caller may raise any error, with the value in its text
        raise _refusal(value) from None
    if kind not in PLAIN:
        _check_class(kind)
    check_encoded(value, data)
    return Json(data)


def encode_plain(value: object) -> Value:
    """Return the stored form of a value, as `encode_value` does, in less time for most dicts and lists."""
    if value.__class__ is not dict and value.__class__ is not list:
        return encode_value(value)
    try:
        data = encode(value)
        check_json(data)  # a `msgspec.Raw` inside may hold bytes that are not JSON
        if not data.isascii():
            data.decode()
        packed = check_str_keys(value)
    except Exception:  # noqa: BLE001 -- `encode_value` makes all checks, and raises an error with the reason
        return encode_value(value)
    size = len(data)
    if size >= SHALLOW and (size > _MOST_DIGITS or too_deep(data)):
        check_encoded(value, data)
    elif (
        (COLON in packed and find_colon(packed))
        or (ALL_ONES in packed and find_ones(packed))
        or (DEL in packed and find_del(packed))
    ):
        check_packed(value, data, packed)
    return data  # type: ignore[return-value]  # a call of `Json` would take as long as a lookup of a key


def _check_class(kind: type) -> None:
    """Refuse an object of a class whose JSON can be written, but not read back."""
    if (why := undecodable(kind)) is not None:
        raise InvalidValueError(f"an object of the class {_class_name(kind)} cannot be kept: {why}")


def check_encoded(value: object, data: bytes) -> None:
    """Refuse values that msgspec encodes, but that would not be read back.

    Args:
        value: The value.
        data: Its JSON.

    Raises:
        InvalidValueError: The value would be read back as another value, or not at all.
    """
    size = len(data)
    try:
        if size > _MOST_DIGITS and _may_have_longer_ints():
            decode_json(data)
        if is_flat(value, size):
            return
        check_json(data)  # a msgspec.Raw, or the serializer of a model, may have written bytes that are not JSON
        if not data.isascii():
            data.decode()
    except (UnicodeDecodeError, msgspec.MsgspecError, RecursionError):
        raise _refusal(value) from None
    if size >= SHALLOW and too_deep(data):
        raise _refusal_of_depth(value)
    if (packed := pack(value)) is not None:
        check_packed(value, data, packed)
    else:
        _check_keys(value, data)
        if NULL in data:
            _check_finite(value)
        if _TIME.search(data):
            _check_times(value, keys=True)


def check_packed(value: object, data: bytes, packed: bytes) -> None:
    """Refuse NaN, infinity and times that msgspec would write as other times.

    Args:
        value: The value.
        data: Its JSON.
        packed: Its MessagePack, with a NaN in place of each model.
    """
    ones = ALL_ONES in packed and find_ones(packed)
    if (ones or (DEL in packed and find_del(packed))) and data.rfind(NULL) >= 0:  # `rfind` is faster than `in`
        if len(data) >= _SMALL:
            steps, part = innermost(value, _may_be_not_finite, fields=False)
            _check_finite(part, steps)
        _check_finite(value)
    if ones or (COLON in packed and find_colon(packed)):
        _check_times(value, keys=False)


def _may_be_not_finite(part: object) -> bool:
    """Return whether a part may contain a NaN, an infinity, a model or a datetime with a zone."""
    try:
        packed = check_str_keys(part)
    except RecursionError:  # pragma: no cover -- coverage is not collected near Python's recursion limit
        return False
    return find_del(packed) is not None or find_ones(packed) is not None


def _check_keys(value: object, data: bytes) -> None:
    """Refuse two keys of a dict that are one key in JSON."""
    if is_canonical(data):  # true for most values
        return
    steps, part = innermost(value, _may_have_double_keys, fields=False)
    double = double_key(encode(part)) if steps else None
    if double is None:  # the two keys are keys of the whole value, or are in a `Raw`
        steps, double = [], double_key(data)
    if double is not None:
        way, name = double
        raise InvalidValueError(
            f"a dict with two keys that are both {name!r} in JSON cannot be kept",
            joined([*steps, path_of(way).removeprefix("$")]),
        )


def _may_have_double_keys(part: object) -> bool:
    """Return whether the JSON of a part changes when msgspec reads it and writes it again."""
    try:
        return not is_canonical(encode(part))
    except RecursionError:  # pragma: no cover -- coverage is not collected near Python's recursion limit
        return False


def _check_times(value: object, *, keys: bool) -> None:
    """Refuse times that msgspec would write as other times."""
    if moved_time(value, keys=keys) is not None:
        raise _refusal_of_time(value, keys=keys)


_TIME = re.compile(rb':\d\d(?:\.\d+)?Z?"')
"""The end of a time in JSON, with or without an offset. msgspec writes an offset of less than a minute as `Z`."""


def _may_have_longer_ints() -> bool:
    """Return whether Python may write an int that is too long to be read. This is so if the limit of digits was raised or removed."""
    return not 0 < sys.get_int_max_str_digits() <= _MOST_DIGITS


def _check_scalar(value: str | float | None) -> None:
    if isinstance(value, str):
        if not value.isascii():
            _check_encodes(value, _LONE_SURROGATE)
    elif isinstance(value, float):
        if not isfinite(value):
            raise InvalidValueError(NOT_FINITE)
    elif value is not None and not _MIN_INT <= value <= _MAX_INT:
        _check_encodes(value, _TOO_MANY_DIGITS)  # Python itself limits the digits of an int in text


def _check_encodes(value: object, why_not: str) -> None:
    """Refuse a value that cannot be encoded and decoded. `why_not` is the message."""
    try:
        decode_json(encode(value))
    except (ValueError, msgspec.MsgspecError):
        raise InvalidValueError(why_not) from None


def _as_written(value: object) -> object:
    """Return an object as its JSON holds it, but with NaN and infinity. `to_builtins` calls this for unknown classes."""
    if isinstance(value, Raw):
        return decode_json(value)
    if hasattr(type(value), "model_dump"):
        return cast("Any", value).model_dump(round_trip=True, warnings="none")
    return _encode_other(value)


def _check_finite(value: object, steps: Sequence[str] = ()) -> None:
    """Refuse NaN and infinity, because JSON would hold them as `null`. `steps` is the path to the value."""
    try:
        tree = msgspec.to_builtins(value, enc_hook=_as_written)
    except Exception:  # noqa: BLE001 -- a serializer of the caller may raise any error, with the value in its text
        raise InvalidValueError("a model cannot be kept: its own serializer failed") from None
    if (path := first_not_finite(tree)) is not None:
        raise InvalidValueError(NOT_FINITE, joined([*steps, path.removeprefix("$")]))


def _refusal(value: object) -> InvalidValueError:
    """Return the refusal of a value that cannot be encoded, with the path to the innermost bad part.

    This takes a few times as long as encoding the value. At each level, a binary search finds the
    part that cannot be encoded. Then a binary search over these parts finds the innermost bad one.
    """
    way, steps, above = [value], [""], {id(value)}
    while len(way) <= MAX_DEPTH and (found := _first_refused(way[-1], MAX_DEPTH - len(way))) is not None:
        if (changed := _changed(way[-1])) is not None:
            return InvalidValueError(str(changed.args[0]), joined([*steps, changed.path.removeprefix("$")]))
        step, part = found
        steps.append(step_in(way[-1], step))
        if id(part) in above and part.__class__ not in SCALARS:
            return InvalidValueError("a value that contains itself cannot be kept", joined(steps))
        way.append(part)
        above.add(id(part))
    good, refused = len(way), 0
    while good - refused > 1:
        middle = (good + refused) // 2
        if _refused(way[middle], MAX_DEPTH - middle):
            refused = middle
        else:
            good = middle
    part = way[refused]
    path = "".join(steps[: refused + 1])
    if hasattr(type(part), "model_dump_json"):
        why, inside = _reason_of_model(part)
        return InvalidValueError(why, joined([path, inside.removeprefix("$")]))
    why = _TOO_DEEP if refused == MAX_DEPTH and cast("Any", part).__class__ in PLAIN else _reason(part)
    return InvalidValueError(why, joined([path]))


def _first_refused(container: Any, levels: int) -> tuple[object, object] | None:
    """Return the first part of a container that cannot be encoded within `levels` levels of nesting.

    If each part can be encoded, return the last one. If there is no part, return `None`. If exactly one part is not a
    scalar, encode only the scalars. So a large part deep inside is not encoded again for each level above it.
    """

    def refused(parts: object) -> bool:
        return _refused(parts, levels + 1)

    if container.__class__ in PLAIN and (only := single_part(container, refused)) is not None:
        return only
    return first_part(container, refused)


def _refusal_of_depth(value: Any) -> InvalidValueError:
    """Return the refusal of a value that is too deep, with the path to the part that is one level too deep."""
    steps: list[str] = []
    part: Any = value
    while len(steps) < MAX_DEPTH and part.__class__ in PLAIN:
        step, below = cast("tuple[Any, Any]", _first_refused(part, MAX_DEPTH - len(steps) - 1))
        steps.append(step_in(part, step))
        part = below
    if len(steps) < MAX_DEPTH or part.__class__ not in PLAIN:  # a Raw, or an object with fields
        return _refusal(value)
    return InvalidValueError(_TOO_DEEP, joined(steps))


def _refusal_of_time(value: object, *, keys: bool) -> InvalidValueError:
    """Return the refusal of a value with a time that would be written as another time, with the path to that time."""
    steps, part = innermost(value, lambda part: moved_time(part, keys=keys) is not None, fields=True)
    if isinstance(part, dict):
        steps += [step_of(key) for key in cast("dict[object, object]", part) if moved_time(key) is not None][:1]
    return InvalidValueError(str(moved_time(part)), joined(steps))


def _changed(value: Any) -> InvalidValueError | None:
    """Return the refusal of a model that can be written, but would be read back as another value; otherwise `None`."""
    if hasattr(class_of(value), "model_dump_json"):
        try:
            if (path := first_not_finite(value.model_dump(round_trip=True, warnings="none"))) is not None:
                return InvalidValueError(NOT_FINITE, path)
            write(value)
        except InvalidValueError as error:
            return error
        except Exception:  # noqa: BLE001, S110 -- the caller finds the reason
            pass
    return None


def _refused(value: object, levels: int) -> bool:
    """Return whether a value cannot be encoded and read back, or has more than `levels` levels of nesting."""
    try:
        check_json(data := encode(value))
        data.decode()
        if value.__class__ is Raw or _may_have_longer_ints():
            decode_json(data)
    except Exception:  # noqa: BLE001 -- with any error, the part cannot be encoded
        return True
    return deeper(data, levels)


def _reason_of_model(model: Any) -> tuple[str, str]:
    """Return why a Pydantic model cannot be kept, and the path to the part that is the cause."""
    kind = class_of(model)
    what = f"a model of the class {kind.__qualname__} cannot be kept"
    try:
        encode(model)
    except InvalidValueError as error:
        return str(error.args[0]), error.path
    except RecursionError:
        return _NO_ROOM, "$"
    except Exception as error:  # noqa: BLE001 -- a serializer of the caller may raise any error, with the value in its text
        if hasattr(error, "errors"):
            path, detail = first_problem(error)
            return f"{what}: it cannot read what it writes: {detail}", path
        path = f".{name}" if (name := _field_to_blame(model)) is not None else ""
        if "utf-8" in str(error):
            return f"{what}: bytes that are not UTF-8; set ser_json_bytes and val_json_bytes to 'base64'", f"${path}"
        return f"{what}: its own serializer failed with {type(error).__name__}", f"${path}"
    return _TOO_DEEP, "$"


def _field_to_blame(model: Any) -> str | None:
    """Return the name of the first field of a model for which writing fails; `None` if there is none."""
    for name in getattr(class_of(model), "model_fields", ()):
        try:
            model.model_dump_json(include={name}, round_trip=True, warnings="none")
        except Exception:  # noqa: BLE001 -- this field cannot be written
            return str(name)
    return None


def _reason(value: object) -> str:  # noqa: C901, PLR0911 -- a list of reasons
    """Return why a value cannot be kept. The value is not a model of Pydantic 2, and no part of it is refused."""
    try:
        encode(value)
    except RecursionError:
        return _NO_ROOM
    except Exception:  # noqa: BLE001, S110 -- the code below finds the reason
        pass
    kind = type(value)
    if kind is str:
        return _LONE_SURROGATE
    if kind is int:
        return _TOO_MANY_DIGITS
    if isinstance(value, Raw):
        if not _refused(value, MAX_DEPTH):
            return _TOO_DEEP
        return "a msgspec.Raw that is not valid JSON cannot be kept"
    if isinstance(value, dict):
        return _reason_of_keys(cast("dict[object, object]", value))
    # The value can be encoded here, because this frame is less deep than the frame in which the value was refused. Coverage
    # is not collected near Python's recursion limit.
    if kind in PLAIN or kind is deque:
        return _NO_ROOM  # pragma: no cover -- see above
    if is_text(kind):
        return f"a {kind.__name__} whose text is not UTF-8 cannot be kept"
    if hasattr(value, "get_secret_value"):
        return HIDDEN
    if hasattr(kind, "__fields__") and hasattr(kind, "parse_raw"):
        return f"{_class_name(kind)} is a model of Pydantic 1, which cannot be kept: keep its dict(), or use Pydantic 2"
    return f"an object of the class {_class_name(kind)} cannot be kept: {_way_out(value)}"


def _reason_of_keys(value: dict[object, object]) -> str:
    """Return why a dict cannot be kept: the reason is its first key that cannot be encoded."""
    for key in value:
        try:
            encode({key: None})
        except Exception:  # noqa: BLE001 -- this key cannot be written
            if isinstance(key, str) and type(key) is str:
                return f"a dict with the key {key!r} cannot be kept: it has a lone surrogate, which UTF-8 cannot hold"
            kind = _class_name(type(key))
            return f"a dict with a key of the class {kind} cannot be kept: use keys that are str, int or float"
    return _NO_ROOM  # pragma: no cover -- as in `_reason`


def _way_out(value: object) -> str:
    """Return the advice for an object of an unknown class: what to store in its place."""
    for plain in (str, int, float, bytes):
        if isinstance(value, plain):
            return f"make it a plain {plain.__name__}"
    if type(value).__module__.partition(".")[0] == "numpy":
        scalar = getattr(value, "ndim", 1) == 0
        return f"make it a plain {type(cast('Any', value).item()).__name__} by .item()" if scalar else "use .tolist()"
    return (
        "use what msgspec encodes (built-in types, Struct, dataclass, attrs, enum, datetime, UUID, Decimal), "
        "a Pydantic model, a path, an IP address or a deque"
    )


def _class_name(kind: type) -> str:
    """Return the name of a class, with its module if a built-in class has the same name."""
    shadows = kind.__module__ != "builtins" and hasattr(builtins, kind.__name__)
    return f"{kind.__module__}.{kind.__qualname__}" if shadows else kind.__qualname__
