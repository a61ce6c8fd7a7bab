"""For py-key-value (`py-key-value-aio`, 0.3 and later): a store for FastMCP and other users of `AsyncKeyValue`."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, SupportsFloat, cast

if TYPE_CHECKING:
    from key_value.aio.errors import DeserializationError, InvalidTTLError, SerializationError, StoreConnectionError
else:
    try:
        from key_value.aio.errors import DeserializationError, InvalidTTLError, SerializationError, StoreConnectionError
    except ModuleNotFoundError:  # pragma: no cover -- py-key-value before 0.4.3; the session key-value of nox tests it
        from key_value.shared.errors import (
            DeserializationError,
            InvalidTTLError,
            SerializationError,
            StoreConnectionError,
        )

from lab_state._periods import LONGEST_TTL
from lab_state.exceptions import FencedError, InvalidValueError, KeyNotFoundError, StorageError
from lab_state.handles import Namespace
from lab_state.integrations._escaping import LONGEST, escape, is_hash, part, unescape

__all__ = ["LabStateStore"]


class LabStateStore:
    """An `AsyncKeyValue` in a namespace, with every optional protocol of py-key-value.

    Values are mappings of plain JSON. Each read returns a new `dict`. A read never waits. A write
    may wait for an open transaction. The manager's `flush_interval` decides when the change becomes
    durable. The store does not start the manager, which must be running. All calls must be made on
    the manager's event loop.

    A value is stored under `<collection>/<key>` in the namespace. The slashes of both parts
    are escaped, so collection `a/b` with key `c` differs from `a` with `b/c`. Any string may
    be a key or a collection. If a part has more than 256 characters after escaping, its
    SHA-256 is used instead. In that case, the original texts of both parts are stored beside the value,
    so that `keys` and `collections` can return them.

    Every call except `cull` raises `ClosedError` while the manager does not run, and `TypeError` for a
    key or a collection that is not a `str`. With a `flush_interval` of 0, each writing call
    raises `StoreConnectionError` if the storage fails. After this error, the change is not durable
    yet, and the manager tries again by itself. When the manager is fenced, each writing call changes
    nothing, and raises an error that is both a `StoreConnectionError` and a `FencedError`. This
    happens with every `flush_interval`.
    """

    def __init__(self, namespace: Namespace, *, default_collection: str = "default_collection") -> None:
        """Use a namespace. Other code must not store anything in it.

        Args:
            namespace: `Manager.namespace("mcp")`, or a namespace with another name. Its prefix
                has 511 characters at most.
            default_collection: The collection for calls that do not name one.

        Raises:
            TypeError: `namespace` is not a `Namespace`, or `default_collection` is not a `str`.
            InvalidKeyError: The prefix of the namespace is too long.
        """
        if not isinstance(namespace, Namespace):
            raise TypeError(f"a Namespace was expected, such as state.namespace('mcp'); not {namespace!r}")
        namespace.entry(
            f"{'c' * LONGEST}/{'k' * LONGEST}", dict
        )  # raises an error if the longest possible key is too long
        self._namespace = namespace
        self.default_collection: Final = _text("default_collection", default_collection)

    def __repr__(self) -> str:
        """Return the class and the namespace."""
        return f"<LabStateStore in {self._namespace!r}>"

    # Reading

    async def get(self, key: str, *, collection: str | None = None) -> dict[str, Any] | None:
        """Return the value of a key; `None` if it is missing or has expired.

        Raises:
            DeserializationError: The value is not a mapping: other code has stored it in this
                namespace.
        """
        return (await self.get_many([key], collection=collection))[0]

    async def get_many(self, keys: Sequence[str], *, collection: str | None = None) -> list[dict[str, Any] | None]:
        """Return the values of several keys, in the order of the keys, all from one moment; see `get`."""
        places = self._places(keys, collection)
        found = await self._namespace.get_many(places)
        return [_value(place, found.get(place)) for place in places]

    async def ttl(self, key: str, *, collection: str | None = None) -> tuple[dict[str, Any] | None, float | None]:
        """Return the value of a key and the seconds until it expires.

        The value is `None` if the key is missing or has expired. The seconds are `None` if
        there is no value, or if it does not expire.

        Raises:
            DeserializationError: The value is not a mapping: other code has stored it in this
                namespace.
        """
        return (await self.ttl_many([key], collection=collection))[0]

    async def ttl_many(
        self, keys: Sequence[str], *, collection: str | None = None
    ) -> list[tuple[dict[str, Any] | None, float | None]]:
        """Return the result of `ttl` for several keys, in the order of the keys, all from one moment."""
        answers: list[tuple[dict[str, Any] | None, float | None]] = []
        for place in self._places(keys, collection):
            try:
                seconds = await self._namespace.expires_in(place)
                value = _value(place, await self._namespace.get(place))
            except KeyNotFoundError:
                answers.append((None, None))
            else:
                answers.append((value, seconds))
        return answers

    # Writing

    async def put(
        self, key: str, value: Mapping[str, Any], *, collection: str | None = None, ttl: SupportsFloat | None = None
    ) -> None:
        """Store a value.

        Args:
            key: The key.
            value: A mapping that `json.dumps` accepts. NaN and infinity are refused.
            collection: The collection.
            ttl: The time until the value expires, in seconds above 0. With `None`, the value
                does not expire.

        Raises:
            SerializationError: The value cannot be stored as JSON.
            InvalidTTLError: `ttl` is not a number of seconds above 0, or is more than 10,000,000,000.
            TypeError: The value is not a mapping with keys that are strings.
            StoreConnectionError: The storage failed, or the manager is fenced; see `LabStateStore`.
        """
        await self.put_many([key], [value], collection=collection, ttl=ttl)

    async def put_many(
        self,
        keys: Sequence[str],
        values: Sequence[Mapping[str, Any]],
        *,
        collection: str | None = None,
        ttl: SupportsFloat | None = None,
    ) -> None:
        """Store several values, all of them or none, even if there is a crash; see `put`.

        Raises:
            ValueError: The numbers of keys and values differ.
        """
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} keys were given, and {len(values)} values")
        entries = self._entries(keys, values, collection)
        seconds = _seconds(ttl)
        with _errors():
            await self._namespace.set_many(entries, ttl=seconds)

    async def put_if_absent(
        self, key: str, value: Mapping[str, Any], *, collection: str | None = None, ttl: SupportsFloat | None = None
    ) -> bool:
        """Store a value if the key is missing, as one atomic step; see `put`. Return whether the value was stored."""
        ((place, entry),) = self._entries([key], [value], collection).items()
        seconds = _seconds(ttl)
        with _errors():
            return await self._namespace.set_if_absent(place, entry, ttl=seconds)

    async def delete(self, key: str, *, collection: str | None = None) -> bool:
        """Delete a key. Return whether it existed."""
        return await self.delete_many([key], collection=collection) == 1

    async def delete_many(self, keys: Sequence[str], *, collection: str | None = None) -> int:
        """Delete several keys as one change. Return the number of keys that existed."""
        with _errors():
            return await self._namespace.delete_many(self._places(keys, collection))

    # The optional protocols

    async def keys(self, collection: str | None = None, *, limit: int | None = None) -> list[str]:
        """Return the first `limit` keys of a collection, in order of their escaped form. With `None`, return all keys.

        Raises:
            DeserializationError: Other code has stored a value in this namespace.
        """
        prefix = f"{self._collection(collection)}/"
        most = _limit(limit)
        # With a limit of 0, the namespace is called, too: it raises an error while the manager does not run.
        found = await self._namespace.keys(prefix, limit=None if most is None else max(1, most))
        return [self._text(place, place[len(prefix) :], "key") for place in found[:most]]

    async def collections(self, *, limit: int | None = None) -> list[str]:
        """Return up to `limit` collections that have a key, in no particular order. With `None`, return all of them.

        The call reads all keys of the namespace.

        Raises:
            DeserializationError: Other code has stored a value in this namespace.
        """
        first: dict[str, str] = {}
        for place in await self._namespace.keys():
            first.setdefault(place.partition("/")[0], place)
        return [self._text(place, name, "collection") for name, place in list(first.items())[: _limit(limit)]]

    async def destroy_collection(self, collection: str) -> bool:
        """Delete every key of a collection, as one change. Return whether there was any key."""
        with _errors():
            return await self._namespace.delete_all(f"{self._collection(collection)}/") > 0

    async def destroy(self) -> bool:
        """Delete everything in the namespace, as one change. Return True."""
        with _errors():
            await self._namespace.delete_all()
        return True

    async def cull(self) -> None:
        """Do nothing. Reads do not return expired values, and the manager deletes them by itself."""

    # Places: a place is a key in the namespace

    def _collection(self, collection: str | None) -> str:
        return part(_text("a collection", collection or self.default_collection))

    def _places(self, keys: Sequence[str], collection: str | None) -> list[str]:
        if isinstance(keys, str):
            raise TypeError("keys must be a sequence of str, not one str")
        prefix = self._collection(collection)
        return [f"{prefix}/{part(_text('a key', key))}" for key in keys]

    def _entries(
        self, keys: Sequence[str], values: Sequence[Mapping[str, Any]], collection: str | None
    ) -> dict[str, dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        for place, key, value in zip(self._places(keys, collection), keys, values, strict=True):
            entries[place] = _checked(value)
            if _tells_no_text(place):
                names = {"collection": escape(collection or self.default_collection), "key": escape(key)}
                entries[place] = {**names, "value": entries[place]}
        return entries

    def _text(self, place: str, name: str, which: str) -> str:
        """Return the original text of a part of a place: of the key or the collection."""
        if is_hash(name):
            try:
                return unescape(self._namespace.get_nowait(place)[which])
            except (LookupError, TypeError, AttributeError):
                raise _not_ours(place) from None
        return unescape(name)


def _tells_no_text(place: str) -> bool:
    """Return whether a part of a place is a hash. Then the texts of both parts are stored beside the value."""
    return any(map(is_hash, place.split("/")))


def _value(place: str, stored: Any) -> dict[str, Any] | None:
    if stored is not None and _tells_no_text(place):
        stored = cast("dict[str, Any]", stored).get("value", place) if isinstance(stored, dict) else place
    if stored is None or isinstance(stored, dict):
        return cast("dict[str, Any] | None", stored)
    raise _not_ours(place)


def _not_ours(place: str) -> DeserializationError:
    return DeserializationError(
        f"this store did not store the value under {place!r}: no other code may write in its namespace"
    )


def _text(what: str, text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, not {type(text).__name__}")
    return text


def _checked(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a value. Check that every store of py-key-value would accept it. lab_state itself accepts more."""
    if not isinstance(value, Mapping):
        raise TypeError(f"a value must be a mapping, not {type(value).__name__}")
    copy = dict(value)
    if not all(isinstance(name, str) for name in copy):
        raise TypeError("the keys of a value must be str")
    try:
        json.dumps(copy, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        # The messages of json contain types, and no values.
        raise SerializationError(f"the value cannot be stored as JSON: {error}") from None
    return copy


def _seconds(ttl: SupportsFloat | None) -> float | None:
    if ttl is None:
        return None
    if isinstance(ttl, bool | str) or not isinstance(ttl, SupportsFloat):
        raise InvalidTTLError(ttl, {"type": type(ttl).__name__})
    seconds = float(ttl)
    if not 0 < seconds <= LONGEST_TTL:
        raise InvalidTTLError(ttl)
    return seconds


def _limit(limit: int | None) -> int | None:
    return None if limit is None else max(0, limit)


class _FencedStoreError(StoreConnectionError, FencedError):
    """The error of a fenced manager. Callers may catch it as an error of py-key-value or of lab_state."""


@contextmanager
def _errors() -> Generator[None]:
    """Replace errors of lab_state by errors of py-key-value. Users and wrappers of py-key-value catch only its own errors."""
    try:
        yield
    except InvalidValueError as error:
        raise SerializationError(str(error)) from None
    except FencedError as error:
        raise _FencedStoreError(str(error)) from error
    except StorageError as error:
        raise StoreConnectionError(str(error)) from error
