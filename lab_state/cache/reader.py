"""`Reader`, which reads the mirror of a state, in any process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from lab_state import _forks as forks
from lab_state._arguments import (
    OnMismatch,
    check_default,
    check_key,
    check_on_mismatch,
    check_prefix,
    check_revision,
    check_timeout,
    many_keys,
)
from lab_state._clock import within
from lab_state._entries import MISSING, Expiring, Value
from lab_state._items import Decoding, Items, Steps
from lab_state._types import check_type
from lab_state._watch import Change, Watcher
from lab_state.cache._access import MirrorAccess
from lab_state.cache._feed import Feed, wait_for_event
from lab_state.cache._format import HEAD
from lab_state.cache._local_copy import LocalCopy
from lab_state.exceptions import UnavailableError, WaitTimeoutError

T = TypeVar("T")

_LOOK_AGAIN_SECONDS = 1.0
"""The seconds between two reads of the revision by `wait_revision`, if no message comes."""


class Reader(MirrorAccess):
    """A reader of the mirror that a manager keeps in a cache. A reader changes nothing.

    Use it with `async with`. The start of the block does not wait, so a worker may start before the
    writer and before Redis. Each read uses the values and the expiry times of one revision. All
    changes up to that revision are durable. A read never uses a lower revision than an earlier
    read, with one exception: if a running writer reports a lower revision for ten seconds, reads
    continue from that revision, and a WARNING is logged. A writer reports a lower revision if the
    state was restored from a backup, or if another client had written to the mirror. During the ten
    seconds, reads raise `UnavailableError`.

    A read raises `UnavailableError` while the cache does not answer, while there is no mirror, or while the
    revision of the mirror is lower than a revision that this reader has read. In these cases, a read never
    reports a key as missing. The message says what to do. In a web application, answer with 503, because the
    writer repairs the mirror by itself. A read raises `UnsupportedError` if the server refuses the user, if
    a newer version of lab_state wrote the mirror, or in a forked child. It raises `ClosedError` outside
    `async with`, and `InvalidKeyError` for a key that no state can have.

    With `local=True` the reader keeps a local copy, which it loads in the background. After that, reads
    are from memory, without a round trip. While the copy is being loaded or reloaded, and while the
    subscription is lost, reads go to the cache.

    `items` has the arguments and the guarantees of `Manager.items`. With a local copy, the iterator
    reads the copy, and the old values of keys that change meanwhile stay in memory. Without a local
    copy, the first step of the iterator reads the whole mirror, as `get_all` does. After `aclose`, each
    step raises `ClosedError`.
    """

    _kind = "a reader"
    _remedy = "make one in the other process"

    def __repr__(self) -> str:
        """Return the name of the state, and the path of the mirror."""
        return f"<Reader {self._name!r} at {self._source.path}{', local' if self._is_local else ''}>"

    @property
    def name(self) -> str:
        """The name of the state."""
        return self._name

    @property
    def up(self) -> bool:
        """Whether the last read of the mirror succeeded, and the reader receives the changes. It is False outside `async with`.

        A local copy that is loaded and up to date counts as a read that succeeded. The reader itself reads the
        revision every two seconds, even if the application reads nothing.
        """
        follows = self._feed is not None and self._feed.revision >= 0
        return follows and (self._local.fresh or self._readable)

    async def __aenter__(self) -> Self:
        """Open the reader. A background task begins to receive the changes.

        Raises:
            RuntimeError: The reader is already open.
            UnsupportedError: The reader was open when this process was forked.
        """
        self._check_process()
        forks.disown_in_children(self)
        if self._feed is not None:
            raise RuntimeError(f"the reader of {self._name!r} is open already")
        self._local = LocalCopy()
        self._feed = Feed(self._source, self._local if self._is_local else None, self._clock, self._head)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the reader; see `aclose`."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. Open watches end. A second call does nothing.

        If this call is cancelled, the reader is closed as well.

        In a forked child, this call does nothing, because the connections belong to the parent.
        """
        if self._is_parents:  # pragma: no cover -- a child's coverage is not collected
            return
        feed, self._feed = self._feed, None
        self._local.invalidate()
        self._local.close_views()
        self._guard.close(self._local.highest)
        self._readable = False
        try:
            if feed is not None:
                await feed.aclose()
        finally:
            await self._source.aclose()

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Refuse every call if the reader is open. This runs in a forked child. The parent's reader is not affected."""
        if self._feed is None:
            return
        forks.keep(self._feed)
        for watcher in self._feed.watchers:
            watcher.disown(self._refusal())
        self._feed, self._is_parents = None, True
        self._local.invalidate()
        self._local.close_views()

    # Reading

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
            default: The result if the key is missing. It is returned unchanged.
            type: The type of the result; see `Manager.get`.

        Raises:
            KeyNotFoundError: The key is missing, and no default was given.
            TypeMismatchError: The stored value cannot be decoded as `type`. `error.path` is the path to the part that does not fit.
            TypeError: The type cannot be decoded, or the default is a class. Pass a class as
                `type=`.
            UnavailableError: See `Reader`, also for the other errors of a read.
        """
        check_default(default)
        if type is not Any:
            check_type(type)
        try:
            stored = self._local.shown[key]
        except (KeyError, TypeError):
            found = await self._some([_asked(key)])
            if key not in found:
                return self._missing(check_key(key), default)
            stored = found[key]
        if type is Any and (kind := stored.__class__) is not bytes and kind is not Expiring:
            return stored
        return self._decoded(key, stored, default, type)

    @overload
    async def get_many(self, keys: Iterable[str], *, type: type[T], on_mismatch: OnMismatch = ...) -> dict[str, T]: ...
    @overload
    async def get_many(
        self, keys: Iterable[str], *, type: Any = ..., on_mismatch: OnMismatch = ...
    ) -> dict[str, Any]: ...
    async def get_many(
        self, keys: Iterable[str], *, type: Any = Any, on_mismatch: OnMismatch = "raise"
    ) -> dict[str, Any]:
        """Return the values of the keys that exist, in the given order, all from one moment.

        Args:
            keys: The keys.
            type: The type to decode each value as; see `Manager.get`.
            on_mismatch: `"raise"`: a value that is not of the type raises `TypeMismatchError`. `"skip"`: such a value is left out.

        Raises:
            TypeMismatchError: One of the values cannot be decoded as `type`. `error.path` is the path in this value.
            ValueError: `on_mismatch` is unknown.
            TypeError: `keys` is one `str`, or is not iterable. Or `on_mismatch` is not a `str`, or the type cannot be decoded.
            UnavailableError: See `Reader`, also for the other errors of a read.
        """
        is_skipping = check_on_mismatch(on_mismatch)
        if type is not Any:
            check_type(type)
        wanted = [_asked(key) for key in many_keys(keys)]
        found = await self._some(wanted)
        for key in wanted:
            if key not in found:
                check_key(key)
        return self._all_decoded(found, type, is_skipping=is_skipping)

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
        """Return the keys that start with `prefix`, and their values, all from one moment, in order of code points.

        With a local copy, the cost depends on the number of keys that are returned, not on the number of all keys.
        The call works in steps, and the event loop runs between two steps. A call may have to sort all keys
        first, in steps; see `Manager.keys`.

        Without a local copy, the call reads the whole mirror, even if only a page of it is returned. Redis
        answers no other client while it collects the keys. After that, the reader processes the whole answer
        in one step. With a million keys, this blocks the event loop for about a second.

        Args:
            prefix: The beginning of the keys; an empty text selects all keys.
            after: Begin after this key: above it, or below it with `reverse`. The key need not
                exist.
            limit: The largest number of keys, 1 or more; `None` means all.
            reverse: Whether to begin with the highest key.
            type: The type to decode each value as; see `Manager.get`.
            on_mismatch: `"raise"`: a value that is not of the type raises `TypeMismatchError`. `"skip"`: such a value is left out. A
                `limit` does not count it.

        Raises:
            TypeMismatchError: One of the values cannot be decoded as `type`. `error.path` is the path in this value.
            InvalidKeyError: `after` cannot be a key.
            TypeError: An argument has a wrong type, or the type cannot be decoded.
            ValueError: `limit` is below 1, or `on_mismatch` is unknown.
            UnavailableError: See `Reader`, also for the other errors of a read.
        """
        async with Items[Any](self._steps(prefix, after, limit, type, on_mismatch, reverse=reverse)) as items:
            return {key: value async for key, value in items}

    async def exists(self, key: str) -> bool:
        """Return whether the key exists.

        Raises:
            UnavailableError: See `Reader`, also for the other errors of a read.
        """
        found = await self._some([_asked(key)])
        if not found:
            check_key(key)
        return bool(self._alive(found))

    async def keys(
        self, prefix: str = "", *, after: str | None = None, limit: int | None = None, reverse: bool = False
    ) -> list[str]:
        """Return the keys that start with `prefix`, in order of code points. The cost is the same as for `get_all`.

        Args:
            prefix: The beginning of the keys; an empty text selects all keys.
            after: See `get_all`.
            limit: See `get_all`.
            reverse: See `get_all`.

        Raises:
            InvalidKeyError: `after` cannot be a key.
            TypeError: An argument has a wrong type.
            ValueError: `limit` is below 1.
            UnavailableError: See `Reader`, also for the other errors of a read.
        """
        steps = Steps(self._moment(prefix, after, limit, reverse=reverse), _KEYS_ALONE)
        async with Items[None](steps) as items:
            return [key async for key, _ in items]

    # Revisions

    async def revision(self) -> int:
        """Return the revision of the state that a read would use now.

        Raises:
            UnavailableError: See `Reader`, also for the other errors of a read.
        """
        _ = self._open
        if self._local.fresh:
            return self._local.highest
        revision = (await self._head()).revision
        self._local.has_read(revision)
        return revision

    async def wait_revision(self, revision: int, timeout: float | None = 5.0) -> None:  # noqa: ASYNC109 -- raised as a StorageError
        """Wait until reads use this revision or a later one. So a caller can read its own writes.

        `set` and `set_many` return the revision of their change. After another write, `Manager.revision` is
        that revision or a later one. With a `flush_interval` of 0 the change is durable when the write
        returns, and in the mirror within milliseconds. Otherwise the change is in the mirror after the next
        flush.

        Args:
            revision: The revision.
            timeout: The longest wait, in seconds, 0 or more and finite. `None` waits without
                a limit. The last read may take a second more.

        Raises:
            WaitTimeoutError: The revision was not reached in time. The error is an `UnavailableError` and
                a `TimeoutError`.
            UnsupportedError: The server refuses the user, or a newer version of lab_state wrote the mirror.
            ClosedError: The reader is not open, or was closed during the wait.
            TypeError: The revision is not an `int`, or the timeout is not a number.
            ValueError: The timeout is out of bounds.
        """
        check_revision(revision)
        deadline = self._clock.monotonic() + check_timeout(timeout)
        look, problem = True, ""
        while True:
            moved = self._open.moved
            if look:
                reached, problem = await self._reached(max(deadline - self._clock.monotonic(), _LOOK_AGAIN_SECONDS))
                if reached is not None and reached >= revision:
                    return
            if (left := deadline - self._clock.monotonic()) <= 0:
                raise WaitTimeoutError(
                    f"the mirror of {self._name!r} has not reached revision {revision} within {timeout} s: {problem}"
                )
            heard = await wait_for_event(moved, self._clock, min(left, _LOOK_AGAIN_SECONDS))
            # After a message with a lower revision, a read of the mirror would not help.
            look = not heard or self._is_local or self._open.revision >= revision

    async def _reached(self, seconds: float) -> tuple[int | None, str]:
        """Return the revision that a read would use now, and a text that states it. If a read would fail, return `None` and the reason."""
        try:
            with within(self._clock, seconds):
                reached = await self.revision()
        except UnavailableError as error:
            return None, str(error)
        except TimeoutError:
            return None, f"{self._source.path} does not answer"
        return reached, f"it is at {reached}"

    def watch(self, prefix: str = "") -> AbstractAsyncContextManager[AsyncIterator[Change]]:
        """Iterate over the keys that change, as `Manager.watch` does.

        Open the watch, and then read. The watch reports only durable changes. The revision of a change
        is the revision of the mirror after the update that contained the change. A key that expired is reported
        as `delete`.

        The first change is a `resync`. It is reported when the subscription of the reader works. A further `resync` is
        reported when the subscription begins again, when the mirror was filled again, and after an update that changed more
        than 10,000 keys or deleted all keys. A `resync` also replaces changes that the reader may have missed, and more than
        10,000 pending changes. After a `resync`, read everything.

        Args:
            prefix: The beginning of the keys; an empty text selects all keys.

        Raises:
            TypeError: At the beginning: the prefix is not a `str`.
            ClosedError: At the beginning: the reader is not open.
        """
        return self._watch(prefix)

    @asynccontextmanager
    async def _watch(self, prefix: str) -> AsyncGenerator[AsyncIterator[Change]]:
        watcher = Watcher(check_prefix(prefix), 0, -1, durable=True)
        feed = self._open
        watchers = feed.watchers
        watchers.add(watcher)
        if feed.revision >= 0:  # otherwise the subscription sends the `resync` when it begins
            watcher.resync(feed.revision)
        try:
            yield watcher
        finally:
            watchers.remove(watcher)
            watcher.close()


def _no_value(_key: str, _value: Value) -> None:
    """Return `None` in place of a value."""


_KEYS_ALONE = Decoding(None, _no_value)


def _asked(key: object) -> str:
    """Return a key as a plain `str`, if a mirror can have it. Another client may have written a key that `set` refuses.

    Raises:
        InvalidKeyError: No mirror can have the key.
    """
    if not isinstance(key, str) or key == HEAD:
        return check_key(key)
    try:
        key.encode()
    except UnicodeEncodeError:
        return check_key(key)
    return str.__str__(key)
