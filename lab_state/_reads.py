"""Every reading call, once, under a prefix.

`get` is the hot path: one Python frame where the key is there and no type is asked for.
What is rare (a missing key, a closed manager, a typed read) is in functions of its own
behind one test.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeVar, overload

from msgspec import Raw

from lab_state._arguments import as_text, check_default, check_key, many_keys
from lab_state._core import Core
from lab_state._entries import MISSING, Expiring, Stored
from lab_state._handle import Handle
from lab_state._types import NOT_JSON, check_type, decode_json, decode_value
from lab_state._values import SCALARS
from lab_state.exceptions import InvalidKeyError, KeyNotFoundError, TypeMismatchError

T = TypeVar("T")


class Reads(Handle):
    """The calls that change nothing."""

    __slots__ = ("_core", "_prefix")

    def __init__(self, core: Core, prefix: str) -> None:
        self._core = core
        self._prefix = prefix

    def __len__(self) -> int:
        """How many keys there are. O(1), but for keys that expire this second, and in a namespace."""
        self._check_open()
        if not self._prefix:
            return self._core.state.count()
        return len(self._keys(""))

    def __bool__(self) -> Literal[True]:
        """An empty state is still a state."""
        return True

    def __contains__(self, key: object) -> bool:
        self._check_open()
        return isinstance(key, str) and self._core.state.has(self._prefix + str.__str__(key))

    @overload
    async def get(self, key: str, *, type: type[T]) -> T: ...
    @overload
    async def get(self, key: str, default: None, *, type: type[T]) -> T | None: ...
    @overload
    async def get(self, key: str, default: T, *, type: type[T]) -> T: ...
    @overload
    async def get(self, key: str, default: object = ..., *, type: Any = ...) -> Any: ...
    async def get(self, key: str, default: object = MISSING, *, type: Any = Any) -> Any:
        """Return the value of a key.

        Args:
            key: The key.
            default: What to return, as it is, when the key is missing.
            type: What to decode the value as: any type that msgspec decodes, a Pydantic
                model, any type with something of Pydantic's in it, or a
                `pydantic.TypeAdapter`.

        Raises:
            KeyNotFoundError: The key is missing, and there is no default.
            TypeMismatchError: The stored value is not a `type`; the error says where.
            TypeError: The type is none that can be decoded, as the message explains;
                every call with a `type` raises it before it looks at a value. Or the
                default is a class, which was meant to be the type.
        """
        if default is not MISSING and default is not None:
            check_default(default)
        # `_get`, written out: the call alone shows in the bench.
        try:
            stored = self._core.state.entries[self._prefix + key]
        except (KeyError, TypeError):
            return self._missing(key, default, type)
        if type is Any and (kind := stored.__class__) is not Expiring:
            if kind is not bytes and kind is not Raw:
                return stored
            try:
                value = decode_json(stored)
            except NOT_JSON:
                return self._decode(key, stored, default, type)  # which says so
            if kind is Raw and value.__class__ in SCALARS:
                self._core.state.keep_decoded(self._prefix + key, stored, value)
            return value
        return self._decode(key, stored, default, type)

    @overload
    def get_nowait(self, key: str, *, type: type[T]) -> T: ...
    @overload
    def get_nowait(self, key: str, default: None, *, type: type[T]) -> T | None: ...
    @overload
    def get_nowait(self, key: str, default: T, *, type: type[T]) -> T: ...
    @overload
    def get_nowait(self, key: str, default: object = ..., *, type: Any = ...) -> Any: ...
    def get_nowait(self, key: str, default: object = MISSING, *, type: Any = Any) -> Any:
        """`get`, as a plain call, for callbacks and other synchronous code on the loop."""
        check_default(default)
        return self._get(key, default, type)

    @overload
    async def get_many(self, keys: Iterable[str], *, type: type[T]) -> dict[str, T]: ...
    @overload
    async def get_many(self, keys: Iterable[str], *, type: Any = ...) -> dict[str, Any]: ...
    async def get_many(self, keys: Iterable[str], *, type: Any = Any) -> dict[str, Any]:
        """The values of those of the keys that exist, in the order asked for.

        Raises:
            TypeMismatchError: One of the values is not a `type`.
        """
        self._check_open()
        return self._all(many_keys(keys), type)

    @overload
    async def get_all(self, prefix: str = ..., *, type: type[T]) -> dict[str, T]: ...
    @overload
    async def get_all(self, prefix: str = ..., *, type: Any = ...) -> dict[str, Any]: ...
    async def get_all(self, prefix: str = "", *, type: Any = Any) -> dict[str, Any]:
        """Every key that starts with `prefix`, with its value: one consistent picture.

        Costs what the number of all keys costs, on the event loop.

        Raises:
            TypeMismatchError: One of the values is not a `type`.
        """
        return self._all(self._keys(prefix), type)

    async def exists(self, key: str) -> bool:
        """Whether the key is there."""
        return key in self or bool(self._missing(key, default=False))

    async def keys(self, prefix: str = "") -> list[str]:
        """Every key that starts with `prefix`, in no particular order; costs what the number of all keys costs."""
        return self._keys(prefix)

    async def expires_in(self, key: str) -> float | None:
        """The seconds until a key expires; `None` if it never does.

        Raises:
            KeyNotFoundError: The key is missing.
        """
        if key not in self:
            self._missing(key, MISSING)
        at = self._expiry(key)
        return None if at is None else max(1, at - self._core.state.now()) / 1000

    # What is rare on the hot path, and what the calls share

    def _full(self, key: object) -> str:
        """The key under the prefix; `check_key` has the bounds."""
        if not isinstance(key, str):
            raise InvalidKeyError(f"a key must be a str, not {key.__class__.__name__}")
        return self._prefix + str.__str__(key)

    def _get(self, key: str, default: object, type_: Any) -> Any:
        """The value of a key, or the default."""
        if key.__class__ is not str:
            key = as_text(key)
        try:
            stored = self._core.state.entries[self._prefix + key]
        except (KeyError, TypeError):
            return self._missing(key, default, type_)
        if type_ is Any and (kind := stored.__class__) is not Expiring:
            if kind is not bytes and kind is not Raw:
                return stored
            try:
                value = decode_json(stored)
            except NOT_JSON:
                return self._decode(key, stored, default, type_)  # which says so
            if kind is Raw and value.__class__ in SCALARS:
                self._core.state.keep_decoded(self._prefix + key, stored, value)
            return value
        return self._decode(key, stored, default, type_)

    def _all(self, keys: Iterable[str], type_: Any) -> dict[str, Any]:
        """The values of those of the keys that are there."""
        if type_ is not Any:
            check_type(type_)
        found: dict[str, Any] = {}
        for key in keys:
            value = self._get(key, MISSING_VALUE, type_)
            if value is not MISSING_VALUE:
                found[key] = value
        return found

    def _missing(self, key: object, default: object, type_: Any = Any) -> Any:
        """What a read gives for a key that was not found."""
        if key.__class__ is not str and isinstance(key, str):
            return self._get(str.__str__(key), default, type_)  # its own class may have changed the prefix
        self._check_open()
        if type_ is not Any:
            check_type(type_)
        try:
            check_key(self._full(key))
        except InvalidKeyError as error:
            raise error from None  # not from the dict's own
        if default is MISSING:
            self._core.counters.get_errors += 1
            raise KeyNotFoundError(str(key)) from None
        return default

    def _decode(self, key: str, stored: Stored, default: object, type_: Any) -> Any:
        if stored.__class__ is not bytes and isinstance(stored, Expiring):  # type: ignore[redundant-expr]  # a Json is bytes
            alive = self._core.state.alive(stored)
            if alive is MISSING:
                return self._missing(key, default)
            stored = alive
        try:
            value = decode_value(stored, type_)  # pyright: ignore[reportArgumentType] -- none that expires any more
        except TypeMismatchError as error:
            self._core.counters.get_errors += 1
            raise TypeMismatchError(f"key {key!r}: {error}", error.path) from None
        return value

    def _expiry(self, key: str) -> int | None:
        """When a key that is there expires, in milliseconds."""
        stored = self._core.state.entries[self._full(key)]
        return stored.at if isinstance(stored, Expiring) else None

    def _check_open(self) -> None:
        self._core.check_open()

    def _under(self, prefix: object) -> str:
        """A prefix under this one."""
        if not isinstance(prefix, str):
            raise InvalidKeyError(f"a prefix must be a str, not {prefix.__class__.__name__}")
        return self._prefix + str.__str__(prefix)

    def _nested(self, name: str) -> str:
        """The prefix of a namespace."""
        prefix = check_key(f"{self._under(name)}/")
        if not name or name.endswith("/"):
            raise InvalidKeyError("a namespace needs a name of 1 character or more, without a slash at its end")
        return prefix

    def _keys(self, prefix: str) -> list[str]:
        self._check_open()
        names, cut = self._core.state.names(self._under(prefix)), len(self._prefix)
        return [name[cut:] for name in names] if cut else names


MISSING_VALUE = object()
"""A default that no caller can have passed."""
