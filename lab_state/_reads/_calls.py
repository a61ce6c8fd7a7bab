"""`Reads`: the calls that read keys under a prefix. Managers, namespaces, transactions and views share them.

`get` is the hot path. It takes one Python frame if the key exists and does not expire, and the caller
passes neither a type nor a default other than `None`. Rare cases (a missing key, a closed manager, a
typed read, an expiry) are handled in separate functions, after one check.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, TypeVar, overload

from msgspec import Raw

from lab_state._arguments import (
    OnMismatch,
    as_text,
    check_default,
    check_key,
    check_limit,
    check_on_mismatch,
    many_keys,
)
from lab_state._checking import Misfit, misfit
from lab_state._entries import MISSING, SCALARS, Expiring, Stored, Value
from lab_state._in_steps import bring_up_to_date, keys_in_steps, take_pieces
from lab_state._items import SKIPPED, Decoding, StateSource, Steps, collected
from lab_state._order import bounds
from lab_state._reads._ranges import Ranges
from lab_state._types import DECODE_ERRORS, check_type, decode_json, decode_value
from lab_state.exceptions import InvalidKeyError, KeyNotFoundError, TypeMismatchError

T = TypeVar("T")


class Reads(Ranges):
    """The calls that change nothing.

    Each call except `items` and `check` has a form without `await`, for callbacks and other synchronous code on the event
    loop. The name of that form ends in `_nowait`. For `exists`, that form is `in`.
    """

    __slots__ = ()

    def __len__(self) -> int:
        """Return the number of keys.

        Without a prefix, the cost depends on the number of keys that expire in the present second. In a namespace
        the cost is O(log n + m) for a state of n keys, of which m have expired and are not deleted yet. If the keys
        of the state are not sorted yet, the call of a namespace first sorts all of them, in one step; see `keys`.
        """
        self._check_open()
        state = self._core.state
        state.note_listing(self._prefix)
        if not self._prefix:
            return state.count()
        return state.count_in(*bounds(self._prefix))

    def __bool__(self) -> Literal[True]:
        """Return True, even if the state is empty."""
        return True

    def __contains__(self, key: object) -> bool:
        """Return whether the key exists; False for an object that cannot be a key."""
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

        A missing key is an error unless a default is given: `get(key, None)` returns `None` for a
        missing key. A stored `null` is a value, and is returned as `None`.

        Args:
            key: The key.
            default: The result if the key is missing. It is returned unchanged.
            type: The type of the result: any type that msgspec decodes, a Pydantic model,
                any type that contains a type of Pydantic, or a `pydantic.TypeAdapter`.

        Raises:
            KeyNotFoundError: The key is missing, and there is no default.
            InvalidKeyError: The key is not allowed; for example, it is empty, or too long.
            TypeMismatchError: The stored value cannot be decoded as `type`. `error.path` is the path to the part that does not fit.
            TypeError: The type cannot be decoded from any value; the message says why.
                Or the default is a class: to decode the value, pass the class as `type`.
        """
        if default is not MISSING and default is not None:
            check_default(default)
        # This repeats the body of `_get`, because one more call would make `get` measurably slower.
        try:
            stored = self._core.state.entries[self._prefix + key]
        except (KeyError, TypeError):
            return self._missing(key, default, type)
        if type is Any and (kind := stored.__class__) is not Expiring:
            if kind is not bytes and kind is not Raw:
                return stored
            try:
                value = decode_json(stored)
            except DECODE_ERRORS:
                return self._decode(key, stored, default, type)  # raises the error
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
        """Return the value of a key, without `await`; see `get`."""
        check_default(default)
        return self._get(key, default, type)

    @overload
    async def get_many(self, keys: Iterable[str], *, type: type[T], on_mismatch: OnMismatch = ...) -> dict[str, T]: ...
    @overload
    async def get_many(
        self, keys: Iterable[str], *, type: Any = ..., on_mismatch: OnMismatch = ...
    ) -> dict[str, Any]: ...
    async def get_many(
        self, keys: Iterable[str], *, type: Any = Any, on_mismatch: OnMismatch = "raise"
    ) -> dict[str, Any]:
        """Return the keys that exist, in the given order, with their values. All values are of one moment.

        Args:
            keys: The keys.
            type: The type to decode each value as; see `get`.
            on_mismatch: `"raise"`: a value that is not of the type raises `TypeMismatchError`. `"skip"`: such a value is left out.

        Raises:
            TypeMismatchError: One of the values cannot be decoded as `type`. `error.path` is the path in this value.
            ValueError: `on_mismatch` is unknown.
            TypeError: `keys` is one `str`, or is not iterable. Or the type cannot be decoded; see `get`.
        """
        return self.get_many_nowait(keys, type=type, on_mismatch=on_mismatch)

    @overload
    def get_many_nowait(self, keys: Iterable[str], *, type: type[T], on_mismatch: OnMismatch = ...) -> dict[str, T]: ...
    @overload
    def get_many_nowait(
        self, keys: Iterable[str], *, type: Any = ..., on_mismatch: OnMismatch = ...
    ) -> dict[str, Any]: ...
    def get_many_nowait(
        self, keys: Iterable[str], *, type: Any = Any, on_mismatch: OnMismatch = "raise"
    ) -> dict[str, Any]:
        """Return the keys that exist, with their values, without `await`; see `get_many`."""
        self._check_open()
        return self._all(many_keys(keys), type, is_skipping=check_on_mismatch(on_mismatch))

    @overload
    async def get_all(
        self,
        prefix: str = ...,
        *,
        after: str | None = ...,
        limit: int | None = ...,
        reverse: bool = ...,
        type: type[T],
        on_mismatch: OnMismatch = ...,
    ) -> dict[str, T]: ...
    @overload
    async def get_all(
        self,
        prefix: str = ...,
        *,
        after: str | None = ...,
        limit: int | None = ...,
        reverse: bool = ...,
        type: Any = ...,
        on_mismatch: OnMismatch = ...,
    ) -> dict[str, Any]: ...
    async def get_all(
        self,
        prefix: str = "",
        *,
        after: str | None = None,
        limit: int | None = None,
        reverse: bool = False,
        type: Any = Any,
        on_mismatch: OnMismatch = "raise",
    ) -> dict[str, Any]:
        """Return the keys that start with `prefix`, in order of code points, with their values. All values are of one moment.

        The cost depends on the number of keys that are returned, not on the number of all keys. With 1,000 keys or
        more, the call works in steps of some milliseconds, and the event loop runs between two steps. Some calls
        sort all keys of the state first; see `keys`. To read one page of keys at a time, see `keys`, too. To read
        values one after the other, without a dict of all values, use `items`.

        Args:
            prefix: The beginning of the keys; an empty text selects all keys.
            after: Begin after this key; see `keys`.
            limit: The largest number of keys, 1 or more; `None` means all.
            reverse: Whether to begin with the highest key.
            type: The type to decode each value as; see `get`.
            on_mismatch: `"raise"`: a value that is not of the type raises `TypeMismatchError`. `"skip"`: such a value is left out. A
                `limit` does not count it.

        Raises:
            TypeMismatchError: One of the values cannot be decoded as `type`. `error.path` is the path in this value.
            InvalidKeyError: `after` cannot be a key.
            TypeError: An argument has a wrong type, or `type` cannot be decoded; see `get`.
            ValueError: `limit` is below 1, or `on_mismatch` is unknown.
            ClosedError: The manager is not running, or was stopped during the steps.
        """
        is_skipping = check_on_mismatch(on_mismatch)
        self._check_open()
        within = self._range(prefix, after, limit, reverse=reverse)
        if self._core.state.is_index_behind:
            await bring_up_to_date(self._core)
        # Some of the first `limit` keys may be left out, so the range has no limit then.
        whole = within._replace(limit=None) if is_skipping else within
        pieces = take_pieces(self._core.state, whole)
        if pieces is not None:
            return await collected(self._core, pieces, within, self._decoding(type, is_skipping=is_skipping))
        return self._all(self._cut(self._names(whole)), type, limit, is_skipping=is_skipping)

    @overload
    def get_all_nowait(
        self,
        prefix: str = ...,
        *,
        after: str | None = ...,
        limit: int | None = ...,
        reverse: bool = ...,
        type: type[T],
        on_mismatch: OnMismatch = ...,
    ) -> dict[str, T]: ...
    @overload
    def get_all_nowait(
        self,
        prefix: str = ...,
        *,
        after: str | None = ...,
        limit: int | None = ...,
        reverse: bool = ...,
        type: Any = ...,
        on_mismatch: OnMismatch = ...,
    ) -> dict[str, Any]: ...
    def get_all_nowait(
        self,
        prefix: str = "",
        *,
        after: str | None = None,
        limit: int | None = None,
        reverse: bool = False,
        type: Any = Any,
        on_mismatch: OnMismatch = "raise",
    ) -> dict[str, Any]:
        """Return the keys that start with `prefix`, with their values, without `await`, in one step; see `get_all`.

        With a million keys, the call blocks the event loop for some seconds.
        """
        self._check_open()
        is_skipping = check_on_mismatch(on_mismatch)
        within = self._range(prefix, after, limit, reverse=reverse)
        names = self._names(within._replace(limit=None) if is_skipping else within)
        return self._all(self._cut(names), type, limit, is_skipping=is_skipping)

    async def check(self, prefix: str = "", *, type: Any, limit: int = 100) -> list[Misfit]:
        """Find the values that are not of a type. Return their keys and the reasons, in order of the keys, all of one moment.

        Use `check` before you change a type, or after a `TypeMismatchError`. The result contains no value. The call
        works in steps of about a millisecond, and the event loop runs between two steps. The call may have to sort all
        keys first; see `keys`.

        Args:
            prefix: The beginning of the keys; an empty text selects all keys.
            type: The type; see `get`.
            limit: The largest number of results, 1 or more. The call ends when it has found this number.

        Raises:
            TypeError: An argument has a wrong type, or `type` cannot be decoded; see `get`.
            ValueError: `limit` is below 1.
            ClosedError: The manager is not running, or was stopped during the steps.
        """
        check_limit(limit, or_none=False)
        check_type(type)
        within = self._checked_range(prefix, None, None, reverse=False)
        # `Pages` passes each value to the function, because the type is not `Any`.
        steps = Steps(
            StateSource(self._core, within, self._under(prefix)),
            Decoding(object, partial(_misfit_or_skipped, type_=type)),
        )
        found: list[Misfit] = []
        try:
            while len(found) < limit and await steps.step(pause=self._core.state.has_steps):
                found += [wrong for _, wrong in steps.rows]
        finally:
            steps.close()
        return found[:limit]

    async def exists(self, key: str) -> bool:
        """Return whether the key exists. Raise `InvalidKeyError` for an object that cannot be a key."""
        if key in self:
            return True
        self._missing(key, default=False)  # raises an error for a key out of bounds
        return False

    async def keys(
        self, prefix: str = "", *, after: str | None = None, limit: int | None = None, reverse: bool = False
    ) -> list[str]:
        """Return the keys that start with `prefix`, in order of code points, all of one moment.

        The cost depends on the number of keys that are returned, not on the number of all keys. With 1,000 keys or
        more, the call works in steps of some milliseconds, and the event loop runs between two steps.

        The first call that needs sorted keys is an exception: it sorts all keys of the state, in steps. A million
        keys take one to three seconds. The manager then keeps the order, in 8 MB of memory for a million keys. Each
        key that is added or deleted later costs the next call about 10 µs. If more than a quarter of the keys are
        added or deleted between two of these calls, the manager may drop the order, and the second call sorts all
        keys again.

        A call with a `limit` returns a page. To get the next page, pass the last key of this page as `after`. If
        keys are added or deleted between two calls, no other key is skipped or returned twice.

        Args:
            prefix: The beginning of the keys; an empty text selects all keys.
            after: Begin after this key: above it, or below it with `reverse`. The key need not
                exist.
            limit: The largest number of keys, 1 or more; `None` means all.
            reverse: Whether to begin with the highest key.

        Raises:
            InvalidKeyError: `after` cannot be a key.
            TypeError: An argument has a wrong type.
            ValueError: `limit` is below 1.
            ClosedError: The manager is not running, or was stopped during the steps.
        """
        self._check_open()
        within = self._range(prefix, after, limit, reverse=reverse)
        if self._core.state.is_index_behind:
            await bring_up_to_date(self._core)
        pieces = take_pieces(self._core.state, within)
        if pieces is not None:
            return await keys_in_steps(self._core, pieces, within)
        return self._cut(self._names(within))

    def keys_nowait(
        self, prefix: str = "", *, after: str | None = None, limit: int | None = None, reverse: bool = False
    ) -> list[str]:
        """Return the keys that start with `prefix`, without `await`, in one step; see `keys`.

        A million keys take about 0.1 s. If the keys have to be sorted first, that is done in the same step.
        """
        self._check_open()
        return self._cut(self._names(self._range(prefix, after, limit, reverse=reverse)))

    @overload
    async def expires_in(self, key: str) -> float | None: ...
    @overload
    async def expires_in(self, key: str, default: T) -> float | T | None: ...
    async def expires_in(self, key: str, default: object = MISSING) -> object:
        """Return the seconds until a key expires, above 0; `None` if it never expires.

        Args:
            key: The key.
            default: The result if the key is missing. It is returned unchanged.

        Raises:
            KeyNotFoundError: The key is missing, and there is no default.
            InvalidKeyError: The key is not allowed; see `get`.
        """
        return self.expires_in_nowait(key, default)

    @overload
    def expires_in_nowait(self, key: str) -> float | None: ...
    @overload
    def expires_in_nowait(self, key: str, default: T) -> float | T | None: ...
    def expires_in_nowait(self, key: str, default: object = MISSING) -> object:
        """Return the seconds until a key expires, without `await`; see `expires_in`."""
        if key not in self:
            return self._missing(key, default)
        at = self._expiry(key)
        return None if at is None else max(1, at - self._core.state.now()) / 1000

    # Rare cases of the hot path, and code that several calls share

    def _get(self, key: str, default: object, type_: Any) -> Any:
        """Return the value of a key, or the default; see `get`."""
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
            except DECODE_ERRORS:
                return self._decode(key, stored, default, type_)  # raises the error
            if kind is Raw and value.__class__ in SCALARS:
                self._core.state.keep_decoded(self._prefix + key, stored, value)
            return value
        return self._decode(key, stored, default, type_)

    def _all(
        self, keys: Iterable[str], type_: Any, limit: int | None = None, *, is_skipping: bool = False
    ) -> dict[str, Any]:
        """Return the keys that exist, with their values, up to a limit. If `is_skipping` is set, leave out values of other types."""
        if type_ is not Any:
            check_type(type_)
        found: dict[str, Any] = {}
        state = self._core.state
        # One time is used for all keys, so that keys with the same expiry expire together.
        now = state.now() if state.expires else None
        for key in keys:
            try:
                value = self._get(key, MISSING_VALUE, type_) if now is None else self._get_at(now, key, type_)
            except TypeMismatchError:
                if not is_skipping:
                    raise
                continue
            if value is not MISSING_VALUE:
                found[key] = value
                if len(found) == limit:
                    break
        return found

    def _get_at(self, now: int, key: str, type_: Any) -> Any:
        """Return the value of a key at the time `now`; `MISSING_VALUE` if the key is missing, or has expired by then."""
        entries, full = self._core.state.entries, self._full(key)
        if full in entries and isinstance(stored := entries[full], Expiring):
            return self._decode(key, stored.value, MISSING_VALUE, type_) if stored.at > now else MISSING_VALUE
        return self._get(key, MISSING_VALUE, type_)

    def _missing(self, key: object, default: object, type_: Any = Any) -> Any:
        """Return the default for a key that was not found, or raise an error about the key, the type or the manager."""
        if key.__class__ is not str and isinstance(key, str):
            # The `+` of a subclass of `str` may have made another key. So look up the plain text.
            return self._get(str.__str__(key), default, type_)
        self._check_open()
        if type_ is not Any:
            check_type(type_)
        try:
            check_key(self._full(key))
        except InvalidKeyError as error:
            raise error from None  # so the traceback does not have the `KeyError` of the dict
        if default is MISSING:
            self._core.counters.get_errors += 1
            raise KeyNotFoundError(str(key)) from None
        return default

    def _decode(self, key: str, stored: Stored, default: object, type_: Any) -> Any:
        """Return a stored value as a `type_`. Treat an expired key as missing; see `_missing`. A `TypeMismatchError` names the key."""
        if stored.__class__ is not bytes and isinstance(stored, Expiring):  # type: ignore[redundant-expr]  # a Json is bytes
            alive = self._core.state.alive(stored)
            if alive is MISSING:
                return self._missing(key, default)
            stored = alive
        try:
            value = decode_value(stored, type_)  # pyright: ignore[reportArgumentType] -- not an `Expiring` here
        except TypeMismatchError as error:
            self._core.counters.get_errors += 1
            raise TypeMismatchError(f"key {key!r}: {error}", error.path) from None
        return value

    def _expiry(self, key: str) -> int | None:
        """Return the expiry of a key that exists, in milliseconds since 1970; `None` if it never expires."""
        stored = self._core.state.entries[self._full(key)]
        return stored.at if isinstance(stored, Expiring) else None

    def _steps(
        self, prefix: str, after: str | None, limit: int | None, type_: Any, on_mismatch: OnMismatch, *, reverse: bool
    ) -> Steps:
        decoding = self._decoding(type_, is_skipping=check_on_mismatch(on_mismatch))
        within = self._checked_range(prefix, after, limit, reverse=reverse)
        return Steps(StateSource(self._core, within, self._under(prefix)), decoding)

    def _decoding(self, type_: Any, *, is_skipping: bool) -> Decoding:
        """Return the way to decode values as a type. If `is_skipping` is set, values of other types are left out.

        Raises:
            TypeError: The type cannot be decoded.
        """
        if type_ is not Any:
            check_type(type_)
        decoding = Decoding(type_, partial(self._decode, default=MISSING, type_=type_))
        return decoding.skipping() if is_skipping else decoding


def _misfit_or_skipped(key: str, stored: Value, type_: Any) -> Any:
    """Return the reason why a value is not of a type; `SKIPPED` if it is of the type."""
    found = misfit(key, stored, type_)
    return SKIPPED if found is None else found


MISSING_VALUE = object()
"""A default that a caller cannot have passed."""
