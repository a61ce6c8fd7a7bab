"""What the writing calls share: whose turn it is, the stored form of a value, and waiting until it is durable."""

from __future__ import annotations

from typing import Any

from lab_state._arguments import Seconds, check_key, milliseconds
from lab_state._entries import Expiring, Value
from lab_state._reads import MISSING_VALUE, Reads
from lab_state._types import decode_value
from lab_state._values import encode_value
from lab_state.exceptions import InvalidValueError, TypeMismatchError


class Writing(Reads):
    """The steps that writing calls are made of."""

    __slots__ = ()

    async def _put(self, key: str, value: object, ttl: Seconds | None) -> int:
        """`set` where it has more to do."""
        stored = self._encode(value)
        lifetime = self._lifetime(ttl)
        check_key(self._full(key))
        await self._turn()
        return await self._store(key, stored, self._at(lifetime))

    async def _store(self, key: str, value: Value, at: int | None) -> int:
        """Store one value, the caller's turn being now; `at` is when it expires, in milliseconds."""
        full = check_key(self._full(key))
        return await self._written(self._core.state.set(full, value if at is None else Expiring(value, at)))

    async def _replaced(self, key: str, value: object, type_: Any, at: int | None) -> Any:
        """Store a value that must be a `type_`, and return it as a read would."""
        stored = self._encode(value)
        try:
            fresh = decode_value(stored, type_)
        except TypeMismatchError as error:
            raise TypeMismatchError(f"the new value of {key!r}: {error}", error.path) from None
        await self._store(key, stored, at)
        return fresh

    def _lifetime(self, ttl: Seconds | None) -> int | None:
        try:
            return None if ttl is None else milliseconds(ttl)
        except InvalidValueError:
            self._core.counters.set_errors += 1
            raise

    def _at(self, lifetime: int | None) -> int | None:
        """When something expires that lives so many milliseconds from now."""
        return None if lifetime is None else self._core.state.now() + lifetime

    def _replaceable(self, key: str, default: object, type_: Any) -> tuple[Any, int | None]:
        """What a new value takes the place of, or `default`; and when it expires, whatever the time is by then."""
        old = self._get(key, MISSING_VALUE, type_)
        if old is MISSING_VALUE:
            return self._missing(key, default), None
        return old, self._expiry(key)

    def _encode(self, value: object) -> Value:
        try:
            return encode_value(value)
        except InvalidValueError:
            self._core.counters.set_errors += 1
            raise

    def _encode_one(self, key: str, value: object) -> Value:
        """One of many values: the error says which."""
        try:
            return self._encode(value)
        except InvalidValueError as error:
            raise InvalidValueError(f"the value of {key!r}: {error.args[0]}", error.path) from None

    def _begin(self, full: str) -> None:
        """The first change of a key since the last commit."""
        core = self._core
        core.durability.check_loop()
        state = core.state
        if full not in state.entries:
            check_key(full)
        state.begin()

    def _check_writable(self) -> None:
        self._core.durability.check_loop()

    async def _turn(self) -> None:
        """Wait until the caller may write. Until its next `await` it writes alone."""
        self._check_writable()
        if self._core.blocked:
            await self._core.turn()
            self._check_writable()

    async def _written(self, revision: int) -> int:
        if self._core.write_through:
            await self._core.durability.written(revision)
        return revision

    async def _deleted(self, count: int) -> int:
        if count:
            await self._written(self._core.state.revision)
        return count
