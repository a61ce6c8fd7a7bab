"""For py-key-value (`py-key-value-aio`, 0.3 and later): a store for FastMCP and whatever else takes an `AsyncKeyValue`."""

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
    except ModuleNotFoundError:  # pragma: no cover -- before 0.4.3; the session key-value of nox tests it
        from key_value.shared.errors import (
            DeserializationError,
            InvalidTTLError,
            SerializationError,
            StoreConnectionError,
        )

from lab_state._arguments import LONGEST_TTL
from lab_state.exceptions import FencedError, InvalidValueError, KeyNotFoundError, StorageError
from lab_state.handles import Namespace
from lab_state.integrations._escaping import LONGEST, escape, is_hash, part, unescape

__all__ = ["LabStateStore"]


class LabStateStore:
    """An `AsyncKeyValue` in a namespace, with every optional protocol of py-key-value.

    Values are mappings of plain JSON; a read gives a fresh `dict` each time. A read never
    waits; a write is in memory at once, and durable as the manager's `flush_interval`
    says. It does not own the manager, which must run, and all calls belong to the
    manager's event loop.

    A value is kept under `<collection>/<key>` in the namespace, each part with its
    slashes escaped, so that `a/b` and `c` is not `a` and `b/c`. Any string is a key and
    a collection. A part of more than 256 characters, escaped, is kept as its SHA-256,
    and its text beside the value, so that `keys` and `collections` tell it.

    Every call raises `ClosedError` while the manager does not run, and `TypeError` for a
    key or a collection that is not a `str`. Each that writes raises
    `StoreConnectionError` with a `flush_interval` of 0: the storage failed, the change
    is not durable yet, and it is tried again without the caller. Once the manager is
    fenced, each that writes raises an error that is a `StoreConnectionError` and a
    `FencedError`, whatever the interval, and changes nothing.
    """

    def __init__(self, namespace: Namespace, *, default_collection: str = "default_collection") -> None:
        """Keep everything under a namespace, and nothing else there.

        Args:
            namespace: `Manager.namespace("mcp")`, or what you like to call it; its
                prefix has 511 characters at most.
            default_collection: The collection of calls that name none.

        Raises:
            TypeError: `namespace` is not a `Namespace`.
            InvalidKeyError: Its prefix is too long.
        """
        if not isinstance(namespace, Namespace):
            raise TypeError(f"a Namespace was expected, such as state.namespace('mcp'); not {namespace!r}")
        namespace.entry(f"{'c' * LONGEST}/{'k' * LONGEST}", dict)  # the longest key that there will be
        self._namespace = namespace
        self.default_collection: Final = default_collection

    def __repr__(self) -> str:
        """The namespace."""
        return f"<LabStateStore in {self._namespace!r}>"

    # Reading

    async def get(self, key: str, *, collection: str | None = None) -> dict[str, Any] | None:
        """The value of a key; `None` if it is missing or has expired.

        Raises:
            DeserializationError: Something else keeps its values in this namespace.
        """
        return (await self.get_many([key], collection=collection))[0]

    async def get_many(self, keys: Sequence[str], *, collection: str | None = None) -> list[dict[str, Any] | None]:
        """The values of keys, in their order: one consistent picture; see `get`."""
        places = self._places(keys, collection)
        found = await self._namespace.get_many(places)
        return [_value(place, found.get(place)) for place in places]

    async def ttl(self, key: str, *, collection: str | None = None) -> tuple[dict[str, Any] | None, float | None]:
        """The value of a key and the seconds until it expires; `None` for what there is not.

        Raises:
            DeserializationError: Something else keeps its values in this namespace.
        """
        return (await self.ttl_many([key], collection=collection))[0]

    async def ttl_many(
        self, keys: Sequence[str], *, collection: str | None = None
    ) -> list[tuple[dict[str, Any] | None, float | None]]:
        """The values of keys and when they expire, in their order: one consistent picture; see `ttl`."""
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
            value: A mapping that `json.dumps` takes as it is; NaN and infinity are refused.
            collection: The collection.
            ttl: How long it lives, in seconds above 0; for good when not given.

        Raises:
            SerializationError: JSON cannot hold the value.
            InvalidTTLError: `ttl` is not a number of seconds above 0.
            TypeError: The value is not a mapping with keys that are strings.
            StoreConnectionError: See the class.
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
        """Store values, all or nothing, also across a crash; see `put`.

        Raises:
            ValueError: There are not as many keys as values.
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
        """Store a value if the key is missing, atomically; returns whether it did. See `put`."""
        ((place, entry),) = self._entries([key], [value], collection).items()
        seconds = _seconds(ttl)
        with _errors():
            return await self._namespace.set_if_absent(place, entry, ttl=seconds)

    async def delete(self, key: str, *, collection: str | None = None) -> bool:
        """Delete a key; returns whether it was there."""
        return await self.delete_many([key], collection=collection) == 1

    async def delete_many(self, keys: Sequence[str], *, collection: str | None = None) -> int:
        """Delete those of the keys that are there, all or none; returns how many."""
        with _errors():
            return await self._namespace.delete_many(self._places(keys, collection))

    # The optional protocols

    async def keys(self, collection: str | None = None, *, limit: int | None = None) -> list[str]:
        """The keys of a collection, in no particular order, up to `limit`; costs what the number of all keys costs."""
        prefix = f"{self._collection(collection)}/"
        found = (await self._namespace.keys(prefix))[: _limit(limit)]
        return [self._text(place, place[len(prefix) :], "key") for place in found]

    async def collections(self, *, limit: int | None = None) -> list[str]:
        """The collections that have a key, in no particular order, up to `limit`; costs what `keys` costs."""
        first: dict[str, str] = {}
        for place in await self._namespace.keys():
            first.setdefault(place.partition("/")[0], place)
        return [self._text(place, name, "collection") for name, place in list(first.items())[: _limit(limit)]]

    async def destroy_collection(self, collection: str) -> bool:
        """Delete every key of a collection, as one change; returns whether there was one."""
        with _errors():
            return await self._namespace.delete_all(f"{self._collection(collection)}/") > 0

    async def destroy(self) -> bool:
        """Delete everything in the namespace, as one change."""
        with _errors():
            await self._namespace.delete_all()
        return True

    async def cull(self) -> None:
        """Nothing: what has expired is gone from every read, and is deleted by the manager by itself."""

    # Where things are

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
        """What a part of a place was made from."""
        if is_hash(name):
            try:
                return unescape(self._namespace.get_nowait(place)[which])
            except (LookupError, TypeError, AttributeError):
                raise _foreign(place) from None
        return unescape(name)


def _tells_no_text(place: str) -> bool:
    """Whether the text of a place is beside the value."""
    return any(map(is_hash, place.split("/")))


def _value(place: str, stored: Any) -> dict[str, Any] | None:
    if stored is not None and _tells_no_text(place):
        stored = cast("dict[str, Any]", stored).get("value", place) if isinstance(stored, dict) else place
    if stored is None or isinstance(stored, dict):
        return cast("dict[str, Any] | None", stored)
    raise _foreign(place)


def _foreign(place: str) -> DeserializationError:
    return DeserializationError(
        f"what is stored under {place!r} is not a value of this store; give it a namespace of its own"
    )


def _text(what: str, text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, not {type(text).__name__}")
    return text


def _checked(value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a value that every store of py-key-value would take: lab_state itself takes more."""
    if not isinstance(value, Mapping):
        raise TypeError(f"a value must be a mapping, not {type(value).__name__}")
    copy = dict(value)
    if not all(isinstance(name, str) for name in copy):
        raise TypeError("the keys of a value must be str")
    try:
        json.dumps(copy, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        # The messages of json name types, not values.
        raise SerializationError(f"the value cannot be kept as JSON: {error}") from None
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
    """For callers that know py-key-value's errors, and for those that know ours."""


@contextmanager
def _errors() -> Generator[None]:
    """The errors of py-key-value, which its callers and wrappers know, in place of ours."""
    try:
        yield
    except InvalidValueError as error:
        raise SerializationError(str(error)) from None
    except FencedError as error:
        raise _FencedStoreError(str(error)) from error
    except StorageError as error:
        raise StoreConnectionError(str(error)) from error
