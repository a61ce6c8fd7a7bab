"""`Writing`: the calls that store and delete, and the steps that all writing calls share.

`set` is the hot path: it takes one Python frame if the value is a dict or a list with fewer than `SHALLOW` bytes
of JSON. Other cases (a new key, the first change since a commit, a longer value, a value with parts to check) are
handled in separate functions, after one check.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from lab_state import _batch
from lab_state._arguments import check_key, check_prefix, many_keys, milliseconds
from lab_state._batch import Batch, in_parts
from lab_state._bulk import Bulk
from lab_state._core import Core
from lab_state._entries import DELETED, Expiring, StoredOrGone, Value, size_of
from lab_state._json_keys import check_str_keys
from lab_state._nesting import SHALLOW
from lab_state._order import bounds
from lab_state._periods import Seconds
from lab_state._reads import MISSING_VALUE, Reads
from lab_state._types import decode_value
from lab_state._values import (
    ALL_ONES,
    COLON,
    DEL,
    check_encoded,
    check_json,
    check_packed,
    encode,
    encode_value,
    find_colon,
    find_del,
    find_ones,
)
from lab_state.exceptions import InvalidValueError, TypeMismatchError

_KEY_BYTES = 256  # added to the size of each value, because a key takes time even if its value is small
_STEP_BYTES = 128 * 1024
"""The event loop runs each time this many bytes were encoded. Encoding these bytes takes about a millisecond, or longer if one value is larger."""


class Writing(Reads):
    """The calls that store and delete, and the steps that all writing calls share."""

    __slots__ = ()

    async def set(self, key: str, value: object, *, ttl: Seconds | None = None) -> int:  # noqa: C901, PLR0912 -- the hot path, written out
        """Store a value, and return the revision of this change.

        Args:
            key: The key.
            value: Anything that msgspec encodes as JSON, a Pydantic model, a path, an IP
                address or a deque. The page "Values and types" lists the refused values, and the results of reads. The value is
                encoded now, in one step of the event loop, so that writes keep their order.
                A later change of the object does not change the state. For a large value, the call takes
                two to five times as long as `msgspec.json.encode`, about 3 ms for a megabyte. For a value
                that is nested deeply, is refused, or has many dates or times, it takes up to twenty times
                as long as `msgspec.json.encode`.
            ttl: The time until the key expires: seconds or a `timedelta`, above 0 and at most
                10,000,000,000 seconds. Without it the key never expires. An earlier expiry of the
                key is removed.

        Raises:
            InvalidValueError: JSON cannot hold the value; `error.path` is the path to the bad part.
                Or `ttl` is out of bounds.
            TypeError: `ttl` is neither a number nor a `timedelta`.
            StorageError: With a `flush_interval` of 0: the change is not durable yet.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        core = self._core
        if (ttl is not None or core.blocked) and not self._note_for_views(key, ttl):
            return await self._put(key, value, ttl)
        # This repeats `encode_value` and `State.apply`, because two more calls would make `set` measurably slower.
        try:
            if value.__class__ is dict or value.__class__ is list:
                try:
                    stored: Any = encode(value)
                    if len(stored) < SHALLOW:
                        check_json(stored)  # a `msgspec.Raw` inside may hold bytes that are not JSON
                        if not stored.isascii():
                            stored.decode()
                        packed = check_str_keys(value)
                    else:
                        packed = None
                except Exception:  # noqa: BLE001 -- encode_value makes all checks, and raises an error with the reason
                    stored = encode_value(value)
                else:
                    if packed is None:
                        check_encoded(value, stored)
                    elif (
                        (COLON in packed and find_colon(packed))
                        or (ALL_ONES in packed and find_ones(packed))
                        or (DEL in packed and find_del(packed))
                    ):
                        check_packed(value, stored, packed)
            else:
                stored = encode_value(value)
        except InvalidValueError:
            core.counters.set_errors += 1
            raise
        full = self._prefix + key if key.__class__ is str else self._full(key)
        state = core.state
        changes = state.changes
        if full not in changes:
            self._before_first_change(full)
        state.entries[full] = changes[full] = stored
        state.revision = revision = state.revision + 1
        if core.has_followup:
            if core.timed:
                state.expiries.discard(full)
            if state.on_change is not None:
                state.on_change(full, stored, revision)
            if core.write_through:
                await core.durability.make_latest_durable(revision)
        return revision

    async def set_many(self, values: Mapping[str, object], *, ttl: Seconds | None = None) -> int:
        """Store several values as one change, and return the revision of this change. A crash keeps all of the values, or none.

        All values change in one moment, even if the call works in steps: a read finds all of the new values, or
        none. Another write comes before or after that moment, and may wait during a part of the call. If the
        caller is cancelled before that moment, nothing is stored.

        Args:
            values: The keys and their values. Fewer than 1,000 values are encoded in one step. With 1,000 keys or
                more, the call works in steps of about a millisecond, and the event loop runs between two
                steps. Do not change the values until the call returns. The mapping itself is copied first,
                in 2 ms for 100,000 keys.
            ttl: The time until all these keys expire; see `set`.

        Raises:
            InvalidValueError: JSON cannot hold one of the values, or `ttl` is out of
                bounds. Nothing was stored.
            TypeError: `values` is not a mapping, or `ttl` is neither a number nor a `timedelta`.
            ClosedError: The manager was stopped during the steps. Nothing was stored.
            StorageError: With a `flush_interval` of 0: the change is not durable yet.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        self._check_loop()
        if not isinstance(values, Mapping):
            raise TypeError(f"set_many() needs a mapping of keys to values, not {type(values).__name__}")
        if len(values) >= _batch.MANY and isinstance(self._core, Core):
            # A subclass of `dict` may have changed `items`, which `dict(values)` would not call.
            taken = dict(values) if values.__class__ is dict else dict(values.items())
            return await self._set_in_steps(self._core, taken, ttl)
        encoded = {check_key(self._full(key)): self._encode_one(key, value) for key, value in values.items()}
        lifetime = self._lifetime(ttl)
        if self._core.blocked:
            await self._turn()
        if (port := self._core.port) is not None:
            return await port.set_many(encoded, lifetime)
        state = self._core.state
        if not encoded:
            return state.revision
        if lifetime is None:
            return await self._written(state.set_many(encoded))
        at = state.now() + lifetime
        expiring = {key: Expiring(value, at) for key, value in encoded.items()}
        return await self._written(state.apply(expiring, cleared=False))

    async def touch(self, key: str, ttl: Seconds | None) -> bool:
        """Give a key another time to live, keep its value, and return whether the key existed.

        Use this call for sessions that live as long as they are used.

        Args:
            key: The key.
            ttl: The time until the key expires, from now on; see `set`. With `None` the key never expires.

        Raises:
            InvalidValueError: `ttl` is out of bounds.
            TypeError: `ttl` is not a number, a `timedelta` or `None`.
            StorageError: With a `flush_interval` of 0: the change is not durable yet.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        lifetime = self._lifetime(ttl)
        await self._turn()
        state, full = self._core.state, check_key(self._full(key))
        if (port := self._core.port) is not None:
            return await port.touch(full, lifetime)
        if not state.has(full):
            return False
        stored = state.entries[full]
        value = stored.value if isinstance(stored, Expiring) else stored
        await self._store(key, value, self._at(lifetime))
        return True

    async def delete(self, key: str) -> bool:
        """Delete a key, and return whether it existed.

        Raises:
            StorageError: With a `flush_interval` of 0: the change is not durable yet.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        return await self.delete_many((key,)) == 1

    async def delete_many(self, keys: Iterable[str]) -> int:
        """Delete several keys as one change, and return how many of them existed.

        With 1,000 keys or more, the call works in steps, as `set_many` does. A read finds all of the keys
        that existed, or none. If the caller is cancelled before the keys are deleted, none of them is deleted.

        Args:
            keys: The keys. They are copied first, in a millisecond for a list of 100,000.

        Raises:
            TypeError: `keys` is one `str`, or is not iterable.
            ClosedError: The manager was stopped during the steps; nothing was deleted.
            StorageError: With a `flush_interval` of 0: the change is not durable yet.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        self._check_open()
        given = list(many_keys(keys))
        if len(given) >= _batch.MANY and isinstance(self._core, Core):
            return await self._delete_in_steps(self._core, given)
        wanted = [self._full(key) for key in given]
        await self._turn()
        if (port := self._core.port) is not None:
            return await port.delete_many([check_key(key) for key in wanted])
        entries = self._core.state.entries
        return await self._deleted(
            self._core.state.delete_many([key if key in entries else check_key(key) for key in wanted])
        )

    async def delete_all(self, prefix: str = "") -> int:
        """Delete each key that starts with `prefix`, as one change, and return the number of these keys.

        Without a prefix, a manager deletes all keys in one step, in a time that hardly depends on their number. While
        there is a watch, up to 10,000 keys are deleted one by one in this step, so that each is reported.

        With a prefix, or in a namespace, 1,000 keys or more are deleted in steps; see `delete_many`. Such a call
        may have to sort all keys of the state first; see `keys`.

        Args:
            prefix: The beginning of the keys; an empty text selects all keys.

        Raises:
            TypeError: `prefix` is not a `str`.
            ClosedError: The manager was stopped during the steps; nothing was deleted.
            StorageError: With a `flush_interval` of 0: the change is not durable yet.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        prefix = check_prefix(prefix)
        core = self._core
        if core.port is not None:
            await self._turn()
            return await core.port.delete_all(self._prefix + prefix)
        if (self._prefix or prefix) and len(core.state.entries) >= _batch.MANY and isinstance(core, Core):
            return await self._delete_prefix(core, self._prefix + prefix)
        await self._turn()
        state = core.state
        if self._prefix or prefix:
            return await self._deleted(state.delete_many([self._prefix + key for key in self._keys(prefix)]))
        before, count = state.revision, state.clear()
        if state.revision > before:  # deleting keys that had all expired is a change, too
            await self._written(state.revision)
        return count

    # Calls with many keys, in steps

    async def _set_in_steps(self, core: Core, values: dict[str, object], ttl: Seconds | None) -> int:
        """Store many values in steps; see `set_many`. The call empties `values`, in steps as well."""
        durability = core.durability
        encoded: dict[str, StoredOrGone] = {}
        size = 0
        for key, value in values.items():
            encoded[check_key(self._full(key))] = stored = self._encode_one(key, value)
            size += _KEY_BYTES + size_of(stored)
            if size >= _STEP_BYTES:
                size = 0
                await asyncio.sleep(0)
        core.state.free(values)
        lifetime = self._lifetime(ttl)
        if core.port is not None:
            await self._turn()
            return await core.port.set_many(cast("dict[str, Value]", encoded), lifetime)
        revision = await Bulk(core, Batch(core.state, encoded, lifetime=lifetime)).make(durability)
        if revision is None:  # the mapping had no items, although it had a length
            return core.state.revision
        return await self._written(revision)

    async def _delete_in_steps(self, core: Core, keys: list[str]) -> int:
        """Delete many keys in steps; see `delete_many`."""
        self._check_loop()
        durability = core.durability
        wanted: dict[str, StoredOrGone] = {}
        for part in in_parts(keys):
            wanted.update((check_key(self._full(key)), DELETED) for key in part)
            await asyncio.sleep(0)
        if core.port is not None:
            await self._turn()
            return await core.port.delete_many(list(wanted))
        batch = Batch(core.state, wanted)
        await Bulk(core, batch).make(durability)
        return await self._deleted(batch.deleted)

    async def _delete_prefix(self, core: Core, prefix: str) -> int:
        """Delete each key of the whole state that starts with a prefix, in steps if there are many keys."""
        self._check_loop()
        batch = Batch(core.state, {}, prefix=prefix)

        async def collect(bulk: Bulk) -> None:
            state = core.state
            for number, _ in enumerate(state.index_steps()):
                if number:  # with a single step, the event loop need not run
                    await asyncio.sleep(0)
                    bulk.check()
            count = 0
            for piece in state.pieces(*bounds(prefix)):
                if count >= _batch.MANY:
                    count = 0
                    await asyncio.sleep(0)
                    bulk.check()
                batch.source.update(dict.fromkeys(piece, DELETED))
                count += len(piece)

        await Bulk(core, batch).make(core.durability, collect)
        return await self._deleted(batch.deleted)

    # Steps that the writing calls share

    def _note_for_views(self, key: object, ttl: Seconds | None) -> bool:
        """Prepare the open iterators for a `set` of a key, and return True.

        Return False if `set` must take the slow path, `_put`: if it may have to wait or has a `ttl`, or if the
        state is shared or has types.
        """
        core = self._core
        if ttl is not None or core.must_wait or core.port is not None or core.value_check is not None:
            return False
        if isinstance(key, str):
            core.state.before_overwrite((self._prefix + str.__str__(key),))
        return True

    async def _put(self, key: str, value: object, ttl: Seconds | None) -> int:
        """Store a value as `set` does, in the cases in which `_note_for_views` returns False."""
        stored = self._encode(key, value)
        lifetime = self._lifetime(ttl)
        full = check_key(self._full(key))
        await self._turn()
        if (port := self._core.port) is not None:
            return await port.set(full, stored, lifetime)
        return await self._store(key, stored, self._at(lifetime))

    async def _store(self, key: str, value: Value, at: int | None) -> int:
        """Store one value, and return the revision.

        The caller has called `_turn` and has not awaited since. `at` is the expiry of the key, in
        milliseconds since 1970; `None` if it never expires.
        """
        full = check_key(self._full(key))
        return await self._written(self._core.state.set(full, value if at is None else Expiring(value, at)))

    async def _replaced(self, key: str, value: object, type_: Any, at: int | None) -> Any:
        """Store a value that must be a `type_`, and return it as a read would return it."""
        stored = self._encode(key, value)
        try:
            fresh = decode_value(stored, type_)
        except TypeMismatchError as error:
            raise TypeMismatchError(f"the new value of {key!r}: {error}", error.path) from None
        await self._store(key, stored, at)
        return fresh

    def _lifetime(self, ttl: Seconds | None) -> int | None:
        """Return a time to live in milliseconds; `None` if there is none. If `ttl` is refused, count the error."""
        try:
            return None if ttl is None else milliseconds(ttl)
        except (InvalidValueError, TypeError):
            self._core.counters.set_errors += 1
            raise

    def _at(self, lifetime: int | None) -> int | None:
        """Return the expiry of a key that lives for `lifetime` milliseconds from now on; `None` for `None`."""
        return None if lifetime is None else self._core.state.now() + lifetime

    def _replaceable(self, key: str, default: object, type_: Any) -> tuple[Any, int | None]:
        """Return the value of a key and its expiry. If the key is missing, return `default` and `None`.

        Raises:
            KeyNotFoundError: The key is missing, and `default` is `MISSING`.
            TypeMismatchError: The value cannot be decoded as `type_`.
        """
        old = self._get(key, MISSING_VALUE, type_)
        if old is MISSING_VALUE:
            return self._missing(key, default), None
        return old, self._expiry(key)

    def _encode(self, key: object, value: object) -> Value:
        """Return the stored form of a value of a key. If the value is refused, count the error."""
        try:
            stored = encode_value(value)
        except InvalidValueError:
            self._core.counters.set_errors += 1
            raise
        if self._core.value_check is not None:
            self._check_fits(self._core.value_check, key, stored)
        return stored

    def _encode_one(self, key: str, value: object) -> Value:
        """Return the stored form of one of several values. An error names the key of the value, and is counted."""
        try:
            stored = encode_value(value)
        except InvalidValueError as error:
            self._core.counters.set_errors += 1
            raise InvalidValueError(f"the value of {key!r}: {error.args[0]}", error.path) from None
        if self._core.value_check is not None:
            self._check_fits(self._core.value_check, key, stored)
        return stored

    def _check_fits(self, check: Callable[[str, Value], object], key: object, stored: Value) -> None:
        """Check a value with the schema. The error names the whole key. If the value is refused, count the error."""
        try:
            check(self._full(key), stored)
        except InvalidValueError:
            self._core.counters.set_errors += 1
            raise

    def _before_first_change(self, full: str) -> None:
        """Prepare the first change of a key since the last commit: check the event loop, and the key if it is new."""
        core = self._core
        core.durability.check_loop()
        state = core.state
        if full not in state.known:
            check_key(full)
            if state.index is not None:
                state.index.note(full)
        state.before_change()

    def _check_loop(self) -> None:
        """Check that the manager is running, and that the caller is on its event loop."""
        self._core.durability.check_loop()

    async def _turn(self) -> None:
        """Wait until no transaction is open. Until its next `await` the caller writes alone."""
        self._check_loop()
        if self._core.blocked:
            await self._core.turn()
            self._check_loop()

    async def _written(self, revision: int) -> int:
        """Return the revision. With a `flush_interval` of 0, first wait until it is durable."""
        if self._core.write_through:
            await self._core.durability.make_latest_durable(revision)
        return revision

    async def _deleted(self, count: int) -> int:
        """Return how many keys were deleted. With a `flush_interval` of 0, first wait until the deletion is durable."""
        if count:
            await self._written(self._core.state.revision)
        return count
