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

from lab_state._argument_types import kind_of
from lab_state._periods import LONGEST_TTL
from lab_state.exceptions import FencedError, InvalidValueError, StorageError
from lab_state.handles import Namespace
from lab_state.integrations._escaping import LONGEST, escape, is_hash, part, unescape

__all__ = ["LabStateStore"]


class LabStateStore:
    """An `AsyncKeyValue` in a namespace, with every optional protocol of py-key-value.

    Values are mappings of plain JSON. Each read returns a new `dict`. A read never waits for a lock, a
    disk or a network. If there are many keys, `keys` and `collections` work in steps, and other tasks
    run between two steps. A write may wait for an open transaction. With a `flush_interval` of 0, which
    a shared state always has, a write also waits until its change is durable. With another interval, a
    later flush makes the change durable. The store does not start the manager, which must be running.
    All calls must be made on the manager's event loop.

    A value is stored under `<collection>/<key>` in the namespace. The slashes of both parts
    are escaped, so collection `a/b` with key `c` differs from `a` with `b/c`. Any string may
    be a key, and any string except the empty one may be a collection. An empty `collection` means
    `default_collection`, as `None` does. Only `destroy_collection` has no default. If a part has more
    than 256 characters after escaping, its SHA-256 is used instead. In that case, the original texts of
    both parts are stored beside the value, so that `keys` and `collections` can return them.

    Every call except `cull` raises `ClosedError` while the manager does not run, and `TypeError` for a
    key or a collection that is not a `str`. With a `flush_interval` of 0, each writing call
    raises `StoreConnectionError` if the storage fails. After this error, the change is not durable
    yet, and the manager tries again by itself. There are two exceptions. If the `__cause__` of the error
    has an `outcome`, see `UnavailableError`. If the flush task has ended, each writing call changes
    nothing and raises a `StoreConnectionError`, with every `flush_interval`.

    Once the manager knows that it is fenced, each writing call changes nothing, and raises an error that
    is both a `StoreConnectionError` and a `FencedError`, with every `flush_interval`. A write by which the
    manager learns of the newer writer raises this error, too: its change is in memory, and never becomes
    durable.
    """

    def __init__(self, namespace: Namespace, *, default_collection: str = "default_collection") -> None:
        """Use a namespace. Other code must not store anything in it.

        Args:
            namespace: `Manager.namespace("mcp")`, or a namespace with another name. Its prefix
                has 511 characters at most.
            default_collection: The collection for calls whose `collection` is `None` or empty.

        Raises:
            TypeError: `namespace` is not a `Namespace`, or `default_collection` is not a `str`.
            InvalidKeyError: The prefix of the namespace is too long.
        """
        if not isinstance(namespace, Namespace):
            raise TypeError(f"a Namespace was expected, such as state.namespace('mcp'); not {kind_of(namespace)}")
        # This raises an error if the longest possible key is too long.
        namespace.entry(f"{'c' * LONGEST}/{'k' * LONGEST}", dict)
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
        """Return the values of several keys, in the order of the keys; see `get`.

        No other task runs between two keys, but time passes: of two keys that expire at the same
        moment, one may still have a value when the other has none.
        """
        return await self._values(self._places(keys, collection))

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
        """Return the result of `ttl` for several keys, in the order of the keys. Time passes between two keys, as in `get_many`."""
        places = self._places(keys, collection)
        # The values come last. If a key expires in between, it has no value, and its seconds are not returned.
        seconds = [await self._namespace.expires_in(place, None) for place in places]
        values = await self._values(places)
        return [(value, None if value is None else left) for value, left in zip(values, seconds, strict=True)]

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

        A key that is deleted or expires during the call may be left out. Then fewer than `limit` keys may be
        returned, although the collection has more.

        Raises:
            DeserializationError: Other code has stored a value in this namespace, and the original text of
                its key cannot be found. Other keys of other code are returned like keys of this store.
        """
        prefix = self._prefix(collection)
        most = _limit(limit)
        # With a limit of 0, the namespace is called, too: it raises an error while the manager does not run.
        found = await self._namespace.keys(prefix, limit=None if most is None else max(1, most))
        texts = (self._text(place, place[len(prefix) :], "key") for place in found[:most])
        return [text for text in texts if text is not None]

    async def collections(self, *, limit: int | None = None) -> list[str]:
        """Return up to `limit` collections that have a key, in no particular order. With `None`, return all of them.

        The call reads all keys of the namespace. A collection whose last key is deleted or expires during
        the call may be left out.

        Raises:
            DeserializationError: Other code has stored a value in this namespace, and the original text of
                its collection cannot be found. Other keys of other code count like keys of this store.
        """
        most = _limit(limit)
        texts: dict[str, str] = {}
        for place in await self._namespace.keys():
            if len(texts) == most:
                break
            name = place.partition("/")[0]
            if name not in texts and (text := self._text(place, name, "collection")) is not None:
                texts[name] = text
        return list(texts.values())

    async def destroy_collection(self, collection: str) -> bool:
        """Delete every key of a collection, as one change. Return whether there was any key.

        An empty `collection` does not mean the default collection here, so that a missing name destroys nothing.
        """
        prefix = part(_text("a collection", collection))
        with _errors():
            return await self._namespace.delete_all(f"{prefix}/") > 0

    async def destroy(self) -> bool:
        """Delete everything in the namespace, as one change. Return True."""
        with _errors():
            await self._namespace.delete_all()
        return True

    async def cull(self) -> None:
        """Do nothing. Reads do not return expired values, and the manager deletes them by itself."""

    # Places: a place is a key in the namespace

    def _named(self, collection: str | None) -> str:
        """Return the collection that a call means. An empty text means the default, as in the stores of py-key-value."""
        if collection is None:
            return self.default_collection
        return _text("a collection", collection) or self.default_collection

    def _prefix(self, collection: str | None) -> str:
        return f"{part(self._named(collection))}/"

    def _places(self, keys: Sequence[str], collection: str | None) -> list[str]:
        if isinstance(keys, str):
            raise TypeError("keys must be a sequence of str, not one str")
        prefix = self._prefix(collection)
        return [f"{prefix}{part(_text('a key', key))}" for key in keys]

    def _entries(
        self, keys: Sequence[str], values: Sequence[Mapping[str, Any]], collection: str | None
    ) -> dict[str, dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        for place, key, value in zip(self._places(keys, collection), keys, values, strict=True):
            entries[place] = _checked(value)
            if _tells_no_text(place):
                names = {"collection": escape(self._named(collection)), "key": escape(key)}
                entries[place] = {**names, "value": entries[place]}
        return entries

    async def _values(self, places: Sequence[str]) -> list[dict[str, Any] | None]:
        found = await self._namespace.get_many(places)
        return [_value(place, found[place]) if place in found else None for place in places]

    def _text(self, place: str, name: str, which: str) -> str | None:
        """Return the original text of a part of a place: of the key or the collection.

        Return `None` if the text would be beside the value, and the place was deleted or has expired meanwhile.
        """
        try:
            if is_hash(name):
                found = self._namespace.get_many_nowait([place])
                return unescape(found[place][which]) if found else None
            return unescape(name)
        except (LookupError, TypeError, AttributeError, UnicodeDecodeError):
            raise _not_ours(place) from None


def _tells_no_text(place: str) -> bool:
    """Return whether a part of a place is a hash. Then the texts of both parts are stored beside the value."""
    return any(map(is_hash, place.split("/")))


def _value(place: str, stored: Any) -> dict[str, Any]:
    if _tells_no_text(place) and isinstance(stored, dict):
        stored = cast("dict[str, Any]", stored).get("value")
    if isinstance(stored, dict):
        return cast("dict[str, Any]", stored)
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
    try:
        seconds = float(ttl)
    except (OverflowError, ValueError):
        # The error does not contain the number, which may have too many digits for `str`.
        raise InvalidTTLError("a number that no float can hold", {"type": type(ttl).__name__}) from None
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
