"""Decoders for the types that callers pass as `type=`, and the reasons why other types cannot be decoded. This module does no I/O.

The decoders are cached by type. Pydantic decodes the types of Pydantic, and types that have one of these in their
parameters or metadata. msgspec decodes all other types, and is tried for a type that Pydantic refuses.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import MISSING
from functools import lru_cache
from typing import Any, Optional, get_args, get_origin

import msgspec
from msgspec import Raw

from lab_state._entries import Value
from lab_state._models import adapted, check_complete, class_of, first_problem, is_adapter, is_model, of_pydantic, read
from lab_state.exceptions import TypeMismatchError

Decode = Callable[[Any], Any]

_encode = msgspec.json.Encoder().encode
decode_json: Decode = msgspec.json.Decoder().decode
"""Decode JSON without a type. An error of this call does not name the key."""

decode_list: Callable[[bytes], list[Any]] = msgspec.json.Decoder(list[Any]).decode
"""Decode a JSON array. One call for many values takes less time than one call for each."""

DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError)
"""The errors of `decode_json` for bytes that are not JSON. `RecursionError` is not needed: no stored value is nested too deep."""

_CONTAINERS = (dict, list, set, frozenset, deque)
"""The base classes of the containers that `_from_json` makes."""


def decode_value(stored: Value, type_: Any) -> Any:
    """Decode a value as a type. An object that can be changed is new in each call.

    Raises:
        TypeError: The type cannot be decoded. This does not depend on the value.
        TypeMismatchError: The stored value is not of this type, or is not valid JSON.
    """
    kind: type[object] = stored.__class__
    if kind is bytes or kind is Raw:
        data: Any = stored
        if type_ is Any:
            try:
                return decode_json(data)
            except DECODE_ERRORS:
                raise TypeMismatchError("the stored value is not valid JSON; set it again") from None
    elif type_ is Any or kind is type_:
        return stored
    else:
        data = None
    decode = decoder(type_)
    try:
        return decode(_encode(stored) if data is None else data)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # noqa: BLE001 -- a validator of the caller may raise any error, with the value in its text
        raise _mismatch(type_, error) from None


def decoder(type_: Any) -> Decode:
    """Return the decoder of a type. For hashable types, the 1,024 decoders that were used last are cached.

    Raises:
        TypeError: The type cannot be decoded.
    """
    try:
        return _cached_decoder(type_)
    except TypeError:  # the type is not hashable, or cannot be decoded
        return _make_decoder(type_)


check_type = decoder
"""Raise a `TypeError` for a type that cannot be decoded. This is `decoder`, and the callers ignore its result."""


def optional(type_: Any) -> Any:
    """Return a type that allows `None` as well."""
    return OrNone(type_) if is_adapter(type_) else Optional[type_]  # noqa: UP045 -- the type is made at run time


class OrNone:
    """A type that a `TypeAdapter` decodes, or `None`."""

    __slots__ = ("adapter",)

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter

    def __repr__(self) -> str:
        return f"{self.adapter!r} | None"


@lru_cache(maxsize=1024)
def undecodable(kind: type) -> str | None:
    """Return the reason why an object of a class could not be read after it was written; `None` if it could."""
    try:
        decoder(kind)
    except TypeError as error:
        return str(error)
    hidden = [attribute.name for attribute in getattr(kind, "__attrs_attrs__", ()) if attribute.name.startswith("_")]
    return f"msgspec does not write its attribute `{hidden[0]}`, which begins with an underscore" if hidden else None


def _make_decoder(type_: Any) -> Decode:
    try:
        return _decoder_of(type_)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # noqa: BLE001 -- the error is about the type alone, so its text has no value
        raise TypeError(f"{type_name(type_)} is not a type that can be decoded: {_advice(str(error))}") from None


_cached_decoder = lru_cache(maxsize=1024)(_make_decoder)


def _advice(problem: str) -> str:
    """Return the first line of the message of msgspec or Pydantic about a type. For a known problem, add what to do."""
    first = problem.partition("\n")[0]
    if "more than one dataclass or attrs type" in first:
        return f"{first}; make them msgspec.Structs with tag=True, or Pydantic models"
    if "must be tagged" in first:
        return f"{first}; give the Structs of the union tags: class A(msgspec.Struct, tag=True)"
    if "custom type" in first:
        return f"{first}; in a field of a Struct or dataclass, wrap the union: pydantic.RootModel[A | B]"
    if "more than one" in first:
        return f"{first}; JSON cannot tell them apart: wrap each in a msgspec.Struct with tag=True"
    return first


def _decoder_of(type_: Any) -> Decode:
    if isinstance(type_, OrNone):
        decode = _decoder_of(type_.adapter)
        return lambda data: None if bytes(data) == b"null" else decode(data)
    if is_adapter(type_):
        return _of_bytes(adapted(type_))
    if is_model(type_):
        check_complete(type_)
        return lambda data: read(type_, bytes(data))
    problem: Exception | None = None
    if of_pydantic(type_):
        try:
            return _of_bytes(adapted(type_))
        except Exception as error:  # noqa: BLE001 -- msgspec may decode the type, if it contains a Struct
            problem = error
    try:
        decode = msgspec.json.Decoder(type_, dec_hook=_from_json).decode
        filled = _look_into(type_)
    except Exception:
        if problem is not None:
            raise problem from None
        raise
    return (lambda data: _fill(decode(data))) if filled else decode


def _of_bytes(decode: Callable[[bytes], Any]) -> Decode:
    return lambda data: decode(bytes(data))


def _look_into(type_: Any) -> bool:
    """Return whether a type contains a dataclass with defaults that msgspec does not set on the decoded objects.

    Raises:
        TypeError: The type contains a class that cannot be decoded.
    """
    from msgspec import inspect  # noqa: PLC0415 -- this import takes a tenth of the time of `import lab_state`

    filled = False
    stack: list[Any] = [inspect.type_info(type_)]
    seen: dict[int, Any] = {}  # the objects are kept, because an id is valid only while its object exists
    while stack:
        item = stack.pop()
        if item.__class__ in (tuple, list):
            stack.extend(item)
        elif isinstance(item, inspect.Type | inspect.Field) and id(item) not in seen:
            seen[id(item)] = item
            stack.extend(getattr(item, name) for name in item.__struct_fields__ if name not in ("default", "cls"))
            if isinstance(item, inspect.CustomType) and not _is_known(item.cls):
                raise TypeError(f"neither msgspec nor Pydantic decodes the class {type_name(item.cls)}")
            if isinstance(item, inspect.DataclassType):
                filled = filled or bool(_plain_defaults(item.cls))
    return filled


def _is_known(kind: Any) -> bool:
    """Return whether `_from_json` can make objects of a class."""
    if is_model(kind):
        check_complete(kind)
        return True
    return isinstance(kind, type) and (is_text(kind) or issubclass(kind, _CONTAINERS) or of_pydantic(kind))


def is_text(kind: type) -> bool:
    """Return whether objects of a class are stored as text. These are paths and IP addresses."""
    module = sys.modules.get(kind.__module__)
    if module is None or kind.__module__.partition(".")[0] not in ("pathlib", "ipaddress"):
        return False
    return hasattr(kind, "__fspath__") or kind.__name__.startswith(("IPv", "PurePath", "PurePosix", "PureWindows"))


class _InnerError(ValueError):
    """A mismatch inside an object of a class that msgspec does not know. `path` begins at that object."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path


def _from_json(type_: Any, value: object) -> object:
    """Make an object of a class that msgspec does not know, from its decoded JSON."""
    kind = get_origin(type_) or type_
    if is_model(kind):
        return read(type_, _encode(value))
    if is_text(kind):
        if not isinstance(value, str):
            raise _InnerError("$")
        return kind(value)
    if not issubclass(kind, _CONTAINERS):
        return adapted(type_)(_encode(value))
    try:
        return _container(kind, get_args(type_), value)
    except msgspec.ValidationError as error:
        raise _InnerError(_path_in(str(error))) from None


def _container(kind: Any, args: tuple[Any, ...], value: object) -> object:
    """Make a deque, an OrderedDict or a similar container from a list or a dict."""
    plain: Any = next(base for base in _CONTAINERS if issubclass(kind, base))
    if kind is Counter and args:
        args = (*args, int)
    inner: Any = {deque: list}.get(plain, plain)
    items = decoder(inner[args] if args else inner)(_encode(value))
    return defaultdict(None, items) if kind == defaultdict else _made(kind, items)


def _made(kind: Any, items: Any) -> object:
    return kind(items)


_KNOWN_DICTS = (OrderedDict, Counter, defaultdict)


def _plain_defaults(kind: Any) -> dict[str, Any]:
    """Return the defaults of a dataclass that msgspec does not set on the decoded objects."""
    fields = getattr(kind, "__dataclass_fields__", {})
    if not hasattr(kind, "__dict__") or not kind.__dictoffset__:
        return {}
    return {name: field.default for name, field in fields.items() if field.default is not MISSING}


def _fill(decoded: Any) -> Any:
    """Set missing defaults on each dataclass object in a decoded value. Then the next encoding writes them."""
    stack = [decoded]
    while stack:
        item = stack.pop()
        kind = class_of(item)
        if hasattr(kind, "__dataclass_fields__") and (defaults := _plain_defaults(kind)):
            members = _members(item)
            for name, default in defaults.items():
                members.setdefault(name, default)
        stack.extend(_parts(item))
    return decoded


def _members(item: Any) -> dict[str, Any]:
    members: dict[str, Any] = item.__dict__
    return members


def _parts(item: Any) -> Iterator[Any]:
    if isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, list | tuple | set | frozenset | deque):
        yield from item
    else:
        kind = class_of(item)
        names = getattr(kind, "__struct_fields__", None) or getattr(kind, "__dataclass_fields__", None)
        names = names or [attribute.name for attribute in getattr(kind, "__attrs_attrs__", ())]
        for name in names:
            yield getattr(item, name, None)


_EXPECTED = re.compile(r"(Expected `.*?|Object missing required field `[^`]*`)(?: - at `(.*)`)?")
_PATH = re.compile(r".* - at `(.*)`", re.DOTALL)


def _mismatch(type_: Any, error: Exception) -> TypeMismatchError:
    """Return an error whose text does not contain the value. The messages of msgspec and Pydantic may contain it."""
    name, path = type_name(type_), "$"
    cause = error.__cause__
    if isinstance(error, msgspec.ValidationError) and cause is None:
        match = _EXPECTED.fullmatch(str(error))
        path, detail = (match[2] or "$", match[1]) if match is not None else (_path_in(str(error)), "it does not fit")
    elif isinstance(error, msgspec.ValidationError):  # a validator of the caller raised `cause`
        path, detail = _path_in(str(error).removeprefix(str(cause))), "it does not fit"
        if hasattr(cause, "errors"):
            inner, detail = first_problem(cause)
            path += inner.removeprefix("$")
        elif isinstance(cause, _InnerError):
            path += cause.path.removeprefix("$")
    elif hasattr(error, "errors"):
        path, detail = first_problem(error)
    else:
        detail = f"{type(error).__name__} while decoding"
    return TypeMismatchError(f"not a `{name}`: {detail} - at `{path}`", path)


def _path_in(message: str) -> str:
    match = _PATH.fullmatch(message)
    return "$" if match is None else match[1]


def type_name(type_: Any) -> str:
    """Return the name of a type for messages."""
    return type_.__qualname__ if isinstance(type_, type) else repr(type_)
