"""The writing calls of a shared state that have only data as arguments, not functions. Each call is one message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Literal, TypeAlias, TypeVar, cast

from msgspec import Raw

from lab_state import _batch
from lab_state._batch import in_parts
from lab_state._entries import StoredOrGone, Value
from lab_state.exceptions import InvalidValueError, TypeMismatchError
from lab_state.shared._answers import Settled, changes_of, raw_of, relative, result_of, size_of
from lab_state.shared._messages import (
    Call,
    Changes,
    Delete,
    DeleteAll,
    DeleteMany,
    Incr,
    MakeChanges,
    Set,
    SetIfAbsent,
    SetMany,
    Touch,
)
from lab_state.shared._wire import encode_body, encode_large_call

T = TypeVar("T")

Make: TypeAlias = Callable[[int, int, int], Call]
"""A function that returns the message of a call. Its arguments are the number of the call, the acknowledgement, and the revision of the check."""


class DataCalls:
    """The calls of `Port` whose arguments are data. A subclass sends them."""

    async def _made(self, make: Make, size: int, count: int = 0) -> Settled:
        """Make a call without a check, and return its end.

        Args:
            make: See `Make`.
            size: An upper bound of the size of the keys and values, in bytes.
            count: The number of keys, if the call may have many.
        """
        raise NotImplementedError

    async def see_all(self, made: float | None = None) -> None:
        """Wait until the copy has all changes that the owner has made so far."""
        raise NotImplementedError

    async def set(self, key: str, value: Value, ttl: int | None) -> int:
        """Store a value, and return the revision."""
        raw = raw_of(value)
        return (await self._made(lambda n, ack, _: Set(n, ack, key, raw, ttl), size_of(key, raw))).revision

    async def set_many(self, values: Mapping[str, Value], ttl: int | None) -> int:
        """Store several values, and return the revision."""
        raws: dict[str, Raw] = {}
        size = 0
        async for part in _parts(values.items()):
            for key, value in part:
                raws[key] = raw = raw_of(value)
                size += size_of(key, raw)
        return (await self._made(lambda n, ack, _: SetMany(n, ack, raws, ttl), size, len(raws))).revision

    async def touch(self, key: str, ttl: int | None) -> bool:
        """Give a key another time to live, and return whether it existed."""
        return bool(result_of(await self._made(lambda n, ack, _: Touch(n, ack, key, ttl), size_of(key))))

    async def delete_many(self, keys: Sequence[str]) -> int:
        """Delete keys, and return how many of them existed."""
        given = list(keys)
        if len(given) == 1:
            return int(bool(result_of(await self._made(lambda n, ack, _: Delete(n, ack, given[0]), size_of(given[0])))))
        size = 0
        async for part in _parts(given):
            size += sum(map(size_of, part))
        settled = await self._made(lambda n, ack, _: DeleteMany(n, ack, given), size, len(given))
        return cast("int", result_of(settled))

    async def delete_all(self, prefix: str) -> int:
        """Delete the keys with a prefix, and return their number."""
        if not can_begin_key(prefix):  # such a text cannot be encoded as UTF-8, so no message can contain it
            await self.see_all()
            return 0
        return cast("int", result_of(await self._made(lambda n, ack, _: DeleteAll(n, ack, prefix), size_of(prefix))))

    async def set_if_absent(self, key: str, value: Value, ttl: int | None) -> bool:
        """Store a value if the key is missing, and return whether it was stored."""
        raw = raw_of(value)
        settled = await self._made(lambda n, ack, _: SetIfAbsent(n, ack, key, raw, ttl), size_of(key, raw))
        return bool(result_of(settled))

    async def incr(
        self,
        key: str,
        delta: float,
        default: float,
        kind: Literal["any", "int", "float"],
        ttl: int | None,
        *,
        prefix: str,
    ) -> int | float:
        """Add to a number, and return the new number; see `Port.incr`."""
        try:
            settled = await self._made(lambda n, ack, _: Incr(n, ack, key, delta, default, kind, ttl), size_of(key))
        except (TypeMismatchError, InvalidValueError) as error:
            raise relative(error, key, prefix) from None
        return cast("int | float", result_of(settled))


def can_begin_key(prefix: str) -> bool:
    """Return whether a text can be encoded as UTF-8. If it cannot be encoded, no key begins with it."""
    try:
        prefix.encode()
    except UnicodeEncodeError:
        return False
    return True


async def changes_in_turns(changes: dict[str, StoredOrGone], *, cleared: bool) -> tuple[Changes, int]:
    """Return what `changes_of` returns. If there are many changes, the event loop runs meanwhile."""
    if len(changes) < _batch.MANY:
        return changes_of(changes, cleared=cleared)
    whole, size = Changes(clear=cleared, set={}, delete=[], expires={}), 0
    async for part in _parts(changes.items()):
        some, some_size = changes_of(dict(part), cleared=cleared)
        whole.set.update(some.set)
        whole.delete.extend(some.delete)
        whole.expires.update(some.expires)
        size += some_size
    return whole, size


async def encoded_in_turns(call: Call) -> list[bytes]:
    """Return the slices of `encode_body`. The event loop runs between two slices.

    Raises:
        InvalidValueError: The message is too large.
    """
    assert isinstance(call, SetMany | DeleteMany | MakeChanges)  # no other call has many keys
    body: list[bytes] = []
    for part in encode_body(call):
        body.append(part)
        await asyncio.sleep(0)
    encode_large_call(call, body)  # raises an error if the message is too large
    return body


async def _parts(items: Collection[T]) -> AsyncIterator[list[T]]:
    """Yield items in parts. If there are many, the event loop runs between two parts."""
    for number, part in enumerate(in_parts(items)):
        if number and len(items) >= _batch.MANY:
            await asyncio.sleep(0)
        yield part
