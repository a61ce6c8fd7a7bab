"""One value to JSON and back, and what is refused. Pure.

A scalar is stored as it is, anything else as its JSON. Refused is what
JSON cannot hold, or what would not be read back everywhere: NaN and infinity (msgspec
writes them as `null`), cycles, more than 128 levels of nesting (Python's own limit
differs by version and by the caller's stack), lone surrogates, unknown classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from math import isfinite
from typing import Any, cast

import msgspec
from msgspec import Raw

from lab_state._expiry import Json, Value
from lab_state._nesting import MAX_DEPTH, SHALLOW, deeper, too_deep
from lab_state.exceptions import InvalidValueError, TypeMismatchError

NULL = b"null"
"""What msgspec writes for None, and for NaN and infinity."""

L, U = ord("l"), ord("u")
"""A single byte is found ten times as fast as `NULL`, and without it there is none."""

_MAX_PATH = 200

_MASK = "**********"
"""What Pydantic writes for a secret."""

SCALARS = frozenset({str, int, float, bool, type(None)})
"""What is stored as it is."""

_PLAIN = frozenset({dict, list, tuple, set, frozenset})

_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1

_TOO_DEEP = f"more than {MAX_DEPTH} levels of nesting cannot be kept"
_NOT_FINITE = "NaN and infinity cannot be kept: JSON has no such numbers"
_LONE_SURROGATE = "a str with a lone surrogate cannot be kept: UTF-8 cannot hold it"
_TOO_MANY_DIGITS = "an int of so many digits cannot be kept; store it as a str"


def _encode_other(value: object) -> Raw:
    """What msgspec does not know: Pydantic models, found by their method, at any depth."""
    dump = getattr(type(value), "model_dump_json", None)
    if dump is None:
        raise NotImplementedError
    text: str = dump(value, by_alias=True, round_trip=True)
    if _MASK in text and _has_secret(cast("Any", value).model_dump(round_trip=True)):
        raise ValueError  # `_refusal` says why
    return Raw(text.encode())


def _has_secret(value: object) -> bool:
    """Whether there is a `SecretStr` or the like, which Pydantic writes as asterisks: it would not be read back."""
    return hasattr(value, "get_secret_value") or any(_has_secret(child) for _, child in _children(value))


def _decode_other(type_: type[Any], value: object) -> object:
    validate = getattr(type_, "model_validate_json", None)
    if validate is None:
        raise NotImplementedError
    return validate(encode(value))


encode = msgspec.json.Encoder(enc_hook=_encode_other).encode
decode_json: Callable[[Any], Any] = msgspec.json.Decoder().decode
"""JSON without a type; what it raises says nothing of where the value is from."""

NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError)
"""What reading JSON raises when it is none."""

check_json: Callable[[Any], object] = msgspec.json.Decoder(Raw).decode
"""Raises unless the bytes are one JSON value; does not look at UTF-8."""


_pack = msgspec.msgpack.Encoder().encode
_FLOAT = 0xCB
_NOT_FINITE_PACKED = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]")


def encode_value(value: object) -> Value:
    """The stored form of a value.

    Raises:
        InvalidValueError: JSON cannot hold it; the error says where in the value.
    """
    if value.__class__ in SCALARS:
        _check_scalar(cast("str | float | None", value))
        return cast("Value", value)
    try:
        # A msgspec.Raw, or a model's own serializer, may have put anything there.
        check_json(data := encode(value))
        if value.__class__ is Raw:
            decode_json(data)  # numbers out of range
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 -- a serializer of the caller's may raise anything, and quote the value
        raise _refusal(value) from None
    if len(data) >= SHALLOW or (L in data and U in data and data.rpartition(NULL)[1]) or not data.isascii():
        check_encoded(value, data)
    return Json(data)


def check_encoded(value: object, data: bytes) -> None:
    """Refuse what msgspec lets pass all the same; short ASCII without `null` has nothing of that.

    Raises:
        InvalidValueError: It is not.
    """
    try:
        if not data.isascii():
            data.decode()  # a Raw may hold anything
    except UnicodeDecodeError:
        raise _refusal(value) from None
    if L in data and U in data and data.rpartition(NULL)[1]:  # half of what `in` takes
        _check_finite(value)
    if len(data) >= SHALLOW and too_deep(data):
        raise _refusal(value)


def decode_value(stored: Value, type_: Any) -> Any:
    """A fresh value of the type asked for.

    Raises:
        TypeMismatchError: The stored value is not one, or the type is none that can be decoded.
    """
    kind: type[object] = stored.__class__
    if kind is bytes or kind is Raw:
        data: Any = stored
        if type_ is Any:
            try:
                return decode_json(data)
            except NOT_JSON:
                raise TypeMismatchError("a msgspec.Raw that is not valid JSON; set it anew") from None
    elif type_ is Any or kind is type_:
        return stored
    else:
        data = encode(stored)
    decode = _decoder_for(type_)
    try:
        return decode(data)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # noqa: BLE001 -- a validator of the caller's may raise anything, and quote the value
        raise _mismatch(type_, error) from None


def size_of(stored: Value) -> int:
    """About how many bytes of JSON it is."""
    if isinstance(stored, Raw):
        return memoryview(stored).nbytes
    return len(stored) if isinstance(stored, bytes | str) else 8


def _make_decoder(type_: Any) -> Callable[[Any], Any]:
    validate = getattr(type_, "model_validate_json", None)
    if validate is not None:
        return lambda data: validate(bytes(data))
    return msgspec.json.Decoder(type_, dec_hook=_decode_other).decode


_cached_decoder = lru_cache(maxsize=1024)(_make_decoder)


def _decoder_for(type_: Any) -> Callable[[Any], Any]:
    try:
        try:
            return _cached_decoder(type_)
        except TypeError:  # not hashable, or nothing that msgspec decodes
            return _make_decoder(type_)
    except (TypeError, NameError) as error:  # about the type alone: no value can be in it
        raise TypeMismatchError(f"{_type_name(type_)} is not a type that can be decoded: {error}") from None


def _check_scalar(value: str | float | None) -> None:
    if isinstance(value, str):
        if not value.isascii():
            _check_encodes(value, _LONE_SURROGATE)
    elif isinstance(value, float):
        if not isfinite(value):
            raise InvalidValueError(_NOT_FINITE)
    elif value is not None and not _MIN_INT <= value <= _MAX_INT:
        _check_encodes(value, _TOO_MANY_DIGITS)  # Python itself limits the digits of an int in text


def _check_encodes(value: object, why_not: str) -> None:
    try:
        encode(value)
    except ValueError:
        raise InvalidValueError(why_not) from None


def _as_written(value: object) -> object:
    """What `to_builtins` leaves to us, as what its JSON holds, NaN and all."""
    if isinstance(value, Raw):
        return decode_json(value)
    return cast("Any", value).model_dump(by_alias=True, round_trip=True)


def _check_finite(value: object) -> None:
    """NaN and infinity are written as `null`: refuse them."""
    try:
        # In MessagePack they have bytes of their own, which no text and few numbers hold.
        packed = _pack(value)
        if _FLOAT not in packed or _NOT_FINITE_PACKED.search(packed) is None:
            return
    except Exception:  # noqa: BLE001, S110 -- what MessagePack cannot hold is looked at more closely
        pass
    try:
        tree = msgspec.to_builtins(value, enc_hook=_as_written)
    except Exception:  # noqa: BLE001 -- as in encode_value
        raise InvalidValueError("a model cannot be kept: its own serializer failed") from None
    if (path := _first_not_finite(tree)) is not None:
        raise InvalidValueError(_NOT_FINITE, path)


def _first_not_finite(tree: object) -> str | None:
    """The path of a NaN or an infinity; what is neither a number nor a container costs little."""
    stack: list[tuple[str, object]] = [("$", [tree])]
    while stack:
        path, item = stack.pop()
        for step, child in _parts(item):
            kind: Any = child.__class__
            if kind is float and not isfinite(cast("float", child)):
                return _shortened(path + _step_in(item, step)).replace("$[0]", "$", 1)
            if kind not in SCALARS:
                stack.append((path + _step_in(item, step), child))
    return None


def _refusal(value: object) -> InvalidValueError:
    """Why a value cannot be encoded, and the path to the innermost part that cannot.

    Costs a few times what encoding costs: on the way down half of the parts of an object
    are tried together, and which object on the way is to blame is found likewise.
    """
    way, steps, above = [value], [""], {id(value)}
    while len(way) <= MAX_DEPTH and (found := _first_refused(way[-1], MAX_DEPTH - len(way))) is not None:
        step, part = found
        steps.append(_step_in(way[-1], step))
        if id(part) in above and part.__class__ not in SCALARS:
            return InvalidValueError("a value that contains itself cannot be kept", _path(steps))
        way.append(part)
        above.add(id(part))
    good, refused = len(way), 0
    while good - refused > 1:
        middle = (good + refused) // 2
        if _refused(way[middle], MAX_DEPTH - middle):
            refused = middle
        else:
            good = middle
    why = _TOO_DEEP if refused == MAX_DEPTH and way[refused].__class__ in _PLAIN else _reason(way[refused])
    return InvalidValueError(why, _path(steps[: refused + 1]))


def _first_refused(container: Any, levels: int) -> tuple[object, object] | None:
    """The first of the parts that is refused; if there is only one, that one. `None` if there are no parts."""
    kind = container.__class__
    if kind in SCALARS:
        return None
    steps: Sequence[object]
    values: Sequence[object]
    if kind is list or kind is tuple:
        values, steps = container, range(len(container))
    else:
        steps, values = tuple(zip(*_parts(container), strict=True)) or ((), ())
    first, end = 0, len(values)
    while end - first > 1:
        middle = (first + end) // 2
        if _refused(values[first:middle], levels + 1):
            end = middle
        else:
            first = middle
    return (steps[first], values[first]) if values else None


def _parts(container: Any) -> Iterable[tuple[object, object]]:
    """The parts of an object, each with its key, its number or its step."""
    kind: Any = container.__class__
    if kind is dict:
        items: Iterable[tuple[object, object]] = container.items()
        return items
    sequence: Iterable[object] = container
    return enumerate(sequence) if kind in _PLAIN else _children(container)


def _step_in(container: Any, step: object) -> str:
    """How a path names what `_parts` gives."""
    kind = container.__class__
    return _step(step) if kind is dict else f"[{step}]" if kind in _PLAIN else str(step)


def _path(steps: list[str]) -> str:
    return _shortened("$" + "".join(steps))


def _refused(value: object, levels: int) -> bool:
    try:
        check_json(data := encode(value))
        data.decode()
        if value.__class__ is Raw:
            decode_json(data)
    except Exception:  # noqa: BLE001 -- whatever it is, this is the part that cannot be encoded
        return True
    return deeper(data, levels)


def _reason(value: object) -> str:  # noqa: C901, PLR0911 -- a list of reasons
    try:
        encode(value)
    except RecursionError:
        return "so deep in calls, Python's recursion limit leaves no room for its nesting; it cannot be kept from here"
    except Exception:  # noqa: BLE001, S110 -- why it failed is told below
        pass
    if type(value) is str:
        return _LONE_SURROGATE
    if type(value) is int:
        return _TOO_MANY_DIGITS
    if hasattr(type(value), "model_dump_json"):
        return f"a model of the class {type(value).__qualname__} cannot be kept: its own serializer failed"
    if isinstance(value, Raw):
        if not _refused(value, MAX_DEPTH):
            return _TOO_DEEP
        return "a msgspec.Raw that is not valid JSON cannot be kept"
    if isinstance(value, dict):
        return "a dict with keys that JSON cannot hold cannot be kept: use keys that are str, int or float"
    if hasattr(value, "get_secret_value"):
        return "a secret of Pydantic's would be kept as asterisks: give its field a serializer, or keep the text itself"
    for plain in (str, int, float, bytes):
        if isinstance(value, plain):
            return f"an object of the class {type(value).__qualname__} cannot be kept: make it a plain {plain.__name__}"
    return (
        f"an object of the class {type(value).__qualname__} cannot be kept: use what msgspec encodes (built-in types, "
        "Struct, dataclass, attrs, enum, datetime, UUID, Decimal) or a Pydantic model"
    )


def _children(value: object) -> Iterator[tuple[str, object]]:
    """The parts of a value, each with its step in the path."""
    if isinstance(value, dict):
        members = cast("dict[object, object]", value)
        yield from ((_step(key), child) for key, child in members.items())
    elif isinstance(value, list | tuple | set | frozenset):
        items = cast("Iterable[object]", value)
        yield from ((f"[{index}]", child) for index, child in enumerate(items))
    else:
        for name in _field_names(value):
            yield f".{name}", getattr(value, name, None)


def _field_names(value: object) -> Iterator[str]:
    kind = type(value)
    if isinstance(value, msgspec.Struct):
        yield from kind.__struct_fields__  # type: ignore[attr-defined]
    elif (fields := getattr(kind, "__dataclass_fields__", None)) is not None:
        yield from fields
    elif (attributes := getattr(kind, "__attrs_attrs__", None)) is not None:
        yield from (attribute.name for attribute in attributes)
    else:
        yield from getattr(kind, "model_fields", ())  # Pydantic


def _step(key: object) -> str:
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"


def _shortened(path: str) -> str:
    return path if len(path) <= _MAX_PATH else f"{path[:_MAX_PATH]}..."


_EXPECTED = re.compile(r"(Expected `.*?|Object missing required field `[^`]*`)(?: - at `(.*)`)?")
_PATH = re.compile(r".* - at `(.*)`", re.DOTALL)


def _mismatch(type_: Any, error: Exception) -> TypeMismatchError:
    """The error without the value, which msgspec's and Pydantic's own messages quote."""
    name, path = _type_name(type_), "$"
    cause = error.__cause__
    if isinstance(error, msgspec.ValidationError) and cause is None:
        match = _EXPECTED.fullmatch(str(error))
        path, detail = (match[2] or "$", match[1]) if match is not None else (_path_in(str(error)), "it does not fit")
    elif isinstance(error, msgspec.ValidationError):  # a validator of the caller's, within something of msgspec's
        path, detail = _path_in(str(error).removeprefix(str(cause))), "it does not fit"
        if hasattr(cause, "errors"):
            inner, detail = _first_problem(cause)
            path += inner.removeprefix("$")
    elif hasattr(error, "errors"):
        path, detail = _first_problem(error)
    else:
        detail = f"{type(error).__name__} while decoding; is it a type that msgspec decodes, or a Pydantic model?"
    return TypeMismatchError(f"not a `{name}`: {detail} - at `{path}`", path)


def _path_in(message: str) -> str:
    match = _PATH.fullmatch(message)
    return "$" if match is None else match[1]


_SAYS_NO_VALUE = re.compile(
    r"missing|extra_forbidden|.*_type|(int|float|bool)_parsing|int_from_float|(greater|less)_than(_equal)?|finite_number|"
    r"multiple_of|(string_)?too_(short|long)|string_pattern_mismatch|literal_error|enum|none_required"
)
"""Pydantic's kinds of problems whose messages say what was expected, never what was found."""


def _first_problem(error: object) -> tuple[str, str]:
    """Where Pydantic found the first problem, and what it was, as far as that cannot quote the value."""
    problems = cast("Any", error).errors(include_url=False, include_context=False, include_input=False)
    first: dict[str, Any] = problems[0]
    kind = str(first["type"])
    detail = str(first["msg"]) if _SAYS_NO_VALUE.fullmatch(kind) else kind
    return "$" + "".join(_pydantic_step(part) for part in first["loc"]), detail


def _type_name(type_: Any) -> str:
    return type_.__qualname__ if isinstance(type_, type) else repr(type_)


def _pydantic_step(part: object) -> str:
    return f"[{part}]" if isinstance(part, int) else _step(part)
