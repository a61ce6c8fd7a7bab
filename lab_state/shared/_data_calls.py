"""The writing calls of a shared state whose arguments are data. Each of them is one message."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, cast

from lab_state._entries import Value
from lab_state.exceptions import InvalidValueError, TypeMismatchError
from lab_state.shared._answers import Settled, raw_of, relative, result_of, size_of
from lab_state.shared._messages import Call, Delete, DeleteAll, DeleteMany, Incr, Set, SetIfAbsent, SetMany, Touch

Make: TypeAlias = Callable[[int, int, int], Call]
"""A function that makes the message of a call from its number, the acknowledgement, and the revision of its check."""


class DataCalls:
    """The calls of `Port` whose arguments are data. A subclass sends them."""

    async def _made(self, make: Make, size: int) -> Settled:
        """Make a call without a check, and return its end. `size` is an upper bound for its keys and values, in bytes."""
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
        raws = {key: raw_of(value) for key, value in values.items()}
        size = sum(size_of(key, raw) for key, raw in raws.items())
        return (await self._made(lambda n, ack, _: SetMany(n, ack, raws, ttl), size)).revision

    async def touch(self, key: str, ttl: int | None) -> bool:
        """Give a key another time to live, and return whether it existed."""
        return bool(result_of(await self._made(lambda n, ack, _: Touch(n, ack, key, ttl), size_of(key))))

    async def delete_many(self, keys: Sequence[str]) -> int:
        """Delete keys, and return how many of them existed."""
        given = list(keys)
        size = sum(map(size_of, given))
        if len(given) == 1:
            return int(bool(result_of(await self._made(lambda n, ack, _: Delete(n, ack, given[0]), size))))
        return cast("int", result_of(await self._made(lambda n, ack, _: DeleteMany(n, ack, given), size)))

    async def delete_all(self, prefix: str) -> int:
        """Delete the keys with a prefix, and return their number."""
        if not can_begin_key(prefix):  # such a text is not UTF-8, so no message can hold it
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
    """Return whether a text can be encoded as UTF-8. If it cannot, no key begins with it."""
    try:
        prefix.encode()
    except UnicodeEncodeError:
        return False
    return True
