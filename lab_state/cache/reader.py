"""`Reader`: reads the copy of a state, in any process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from lab_state import _forks as forks
from lab_state._arguments import check_default, check_key, check_prefix, check_revision, check_timeout, many_keys
from lab_state._clock import Clock, SystemClock, within
from lab_state._entries import MISSING, Expiring, Json, Stored
from lab_state._handle import Handle
from lab_state._types import check_type, decode_value
from lab_state._watch import Change, Watcher
from lab_state.cache._feed import Feed, either
from lab_state.cache._format import HEAD, Head, parse_time
from lab_state.cache._local_copy import LocalCopy
from lab_state.cache._revision_guard import RevisionGuard
from lab_state.cache._source import Found, Source
from lab_state.exceptions import (
    ClosedError,
    KeyNotFoundError,
    StorageError,
    TypeMismatchError,
    UnavailableError,
    UnsupportedError,
    WaitTimeoutError,
)

T = TypeVar("T")

_LOOK_AGAIN_SECONDS = 1.0


class Reader(Handle):
    """Reads the copy of a state that its manager keeps in a cache; changes nothing.

    Use it with `async with`, which waits for nobody: a worker may start before the writer,
    or before Redis. Each read gives keys, expiry and revision of one moment, and only
    what is durable. No read gives a revision below one that an earlier read has given,
    but for one case: the writer lives, and has said for ten seconds that it is at a lower
    one. Then the state itself was put back, or what was read was never its own. Until
    then reads raise `UnavailableError`; a WARNING says when they go on.

    A read raises `UnavailableError` while there is no copy, or one that is older than what
    this reader has seen; never is a key called missing for that. The message says what to
    do; for a web application it is a 503, since the writer mends it by itself. It raises
    `UnsupportedError` when the server refuses the user, or the copy has a newer format,
    `ClosedError` outside `async with`, and `InvalidKeyError` for a key that no state can have.

    With `local=True` a read is one of memory, and costs no round trip. The copy is loaded
    in the background; before that, and whenever its subscription is lost, reads go to the
    cache itself.
    """

    _kind = "a reader"
    _remedy = "make one in the other process"

    def __init__(self, name: str, source: Source, *, local: bool, clock: Clock | None) -> None:
        self._name = name
        self._source = source
        self._is_local = local
        self._clock: Clock = SystemClock() if clock is None else clock
        self._local = LocalCopy()
        self._feed: Feed | None = None
        self._guard = RevisionGuard(name, source.path)
        self._readable = False  # whether the last read of the copy succeeded
        self._is_parents = False

    def __repr__(self) -> str:
        """Which copy, and where."""
        return f"<Reader {self._name!r} at {self._source.path}{', local' if self._is_local else ''}>"

    @property
    def name(self) -> str:
        """The name of the state."""
        return self._name

    @property
    def up(self) -> bool:
        """Return whether reads succeed and the reader hears of changes. It is False outside `async with`.

        Without `local`, it is what the last read of the copy said. If nothing is read, the
        reader reads its head every two seconds.
        """
        follows = self._feed is not None and self._feed.revision >= 0
        return follows and (self._local.fresh or self._readable)

    async def __aenter__(self) -> Self:
        """Begin to follow the changes, in the background.

        Raises:
            RuntimeError: It is open already.
            UnsupportedError: It was open when this process was forked.
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
        """Let go of all connections."""
        await self.aclose()

    async def aclose(self) -> None:
        """Let go of all connections. Open watches end. A second call does nothing.

        In a forked child it does nothing: the connections are the parent's.
        """
        if self._is_parents:  # pragma: no cover -- a child's coverage is not collected
            return
        feed, self._feed = self._feed, None
        self._local.lose()
        self._guard.close(self._local.highest)
        self._readable = False
        if feed is not None:
            await feed.aclose()
        await self._source.aclose()

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Refuse every call, if the reader is open. Runs in a forked child; the parent's reader goes on."""
        if self._feed is None:
            return
        forks.keep(self._feed)
        for watcher in self._feed.watchers:
            watcher.disown(self._refusal())
        self._feed, self._is_parents = None, True
        self._local.lose()

    def _refusal(self) -> UnsupportedError:  # pragma: no cover -- likewise
        return UnsupportedError(
            f"the reader of {self._name!r} is open in the parent of this forked process: open one of its own here"
        )

    def _check_process(self) -> None:
        if self._is_parents:  # pragma: no cover -- a child's coverage is not collected
            raise self._refusal()

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
            default: What to return, as it is, when the key is missing.
            type: What to decode the value as; see `Manager.get`.

        Raises:
            KeyNotFoundError: The key is missing, and there is no default.
            TypeMismatchError: The stored value is not a `type`; the error says where.
            TypeError: The type is none that can be decoded, or the default is a class,
                which was meant to be the type.
            UnavailableError: See the class.
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
    async def get_many(self, keys: Iterable[str], *, type: type[T]) -> dict[str, T]: ...
    @overload
    async def get_many(self, keys: Iterable[str], *, type: Any = ...) -> dict[str, Any]: ...
    async def get_many(self, keys: Iterable[str], *, type: Any = Any) -> dict[str, Any]:
        """The values of those of the keys that exist, in the order asked for, of one moment.

        Raises:
            TypeMismatchError: One of the values is not a `type`.
            UnavailableError: See the class.
        """
        if type is not Any:
            check_type(type)
        wanted = [_asked(key) for key in many_keys(keys)]
        found = await self._some(wanted)
        for key in wanted:
            if key not in found:
                check_key(key)
        return self._all_decoded(found, type)

    @overload
    async def get_all(self, prefix: str = ..., *, type: type[T]) -> dict[str, T]: ...
    @overload
    async def get_all(self, prefix: str = ..., *, type: Any = ...) -> dict[str, Any]: ...
    async def get_all(self, prefix: str = "", *, type: Any = Any) -> dict[str, Any]:
        """Every key that starts with `prefix`, with its value, of one moment.

        Costs what the number of all keys costs: on the event loop, and without `local`
        in Redis too, which answers nobody else meanwhile.

        Raises:
            TypeMismatchError: One of the values is not a `type`.
            UnavailableError: See the class.
        """
        if type is not Any:
            check_type(type)
        return self._all_decoded(await self._every(prefix), type)

    async def exists(self, key: str) -> bool:
        """Whether the key is there.

        Raises:
            UnavailableError: See the class.
        """
        found = await self._some([_asked(key)])
        if not found:
            check_key(key)
        return bool(self._alive(found))

    async def keys(self, prefix: str = "") -> list[str]:
        """Every key that starts with `prefix`, in no particular order; costs what `get_all` costs.

        Raises:
            UnavailableError: See the class.
        """
        return list(self._alive(await self._every(prefix)))

    # Revisions

    async def revision(self) -> int:
        """The revision that a read would give now.

        Raises:
            UnavailableError: See the class.
        """
        _ = self._open
        if self._local.fresh:
            return self._local.highest
        return (await self._head()).revision

    async def wait_revision(self, revision: int, timeout: float | None = 5.0) -> None:  # noqa: ASYNC109 -- told as a StorageError
        """Wait until reads give this revision or a later one. Then a caller reads its own writes.

        The writer gives the revision: `set()` returns it. With its `flush_interval` at 0 it
        is durable by then, and here within milliseconds; otherwise after the next flush.

        Args:
            revision: The revision.
            timeout: How long to wait, in seconds, 0 or more and finite. `None` waits without
                a limit. A last read may take a second more.

        Raises:
            WaitTimeoutError: It was not reached in time. It is an `UnavailableError` and a
                `TimeoutError`.
            TypeError: The revision is not an `int`, or the timeout is not a number.
            ValueError: The timeout is out of bounds.
        """
        check_revision(revision)
        deadline = self._clock.monotonic() + check_timeout(timeout)
        while True:
            moved = self._open.moved
            reached, problem = await self._reached(max(deadline - self._clock.monotonic(), _LOOK_AGAIN_SECONDS))
            if reached >= revision:
                return
            if not await self._worth_a_look(revision, moved, deadline):
                raise WaitTimeoutError(
                    f"the copy of {self._name!r} has not reached revision {revision} within {timeout} s: {problem}"
                )

    async def _reached(self, seconds: float) -> tuple[int, str]:
        """Return the revision that a read would give, or -1 if it would fail, and the same in words."""
        try:
            with within(self._clock, seconds):
                reached = await self.revision()
        except UnavailableError as error:
            return -1, str(error)
        except TimeoutError:
            return -1, f"{self._source.path} does not answer"
        return reached, f"it is at {reached}"

    async def _worth_a_look(self, revision: int, moved: asyncio.Event, deadline: float) -> bool:
        """Wait until the feed hears of the revision, for at most a second; return False at the deadline."""
        while (left := deadline - self._clock.monotonic()) > 0:
            heard = await either(moved, self._clock, min(left, _LOOK_AGAIN_SECONDS))
            if not heard or self._is_local or self._open.revision >= revision:
                return True
            moved = self._open.moved
        return False

    def watch(self, prefix: str = "") -> AbstractAsyncContextManager[AsyncIterator[Change]]:
        """Iterate over the keys that change, as `Manager.watch` does.

        Open it, then read. Only durable changes are told. The revision of a change is that
        of the step that brought it to the copy. An expiry is told as `delete`. A `resync`
        comes at the beginning, and after a lost subscription: read again.

        Args:
            prefix: Only keys that start with it.

        Raises:
            TypeError: At entering: the prefix is not a `str`.
            ClosedError: At entering: the reader is not open.
        """
        return self._watch(prefix)

    @asynccontextmanager
    async def _watch(self, prefix: str) -> AsyncGenerator[AsyncIterator[Change]]:
        watcher = Watcher(check_prefix(prefix), 0, -1, durable=True)
        watchers = self._open.watchers
        watchers.add(watcher)
        try:
            yield watcher
        finally:
            watchers.remove(watcher)
            watcher.close()

    # What the calls share

    @property
    def _open(self) -> Feed:
        self._check_process()
        if self._feed is None:
            raise ClosedError(f"the reader of {self._name!r} is not open: use it inside `async with`")
        return self._feed

    async def _some(self, keys: Sequence[str]) -> dict[str, Stored]:
        """Those of the keys that are there; they may have expired."""
        _ = self._open
        if self._local.fresh:
            entries = self._local.shown
            return {key: entries[key] for key in keys if key in entries}
        return (await self._read(self._source.fetch(keys)))[1]

    async def _every(self, prefix: str) -> dict[str, Stored]:
        _ = self._open
        prefix = check_prefix(prefix)
        if self._local.fresh:
            return {key: value for key, value in self._local.shown.items() if key.startswith(prefix)}
        _, found = await self._read(self._source.fetch_all())
        return {key: value for key, value in found.items() if key.startswith(prefix)}

    async def _head(self) -> Head:
        return (await self._read(self._source.fetch([])))[0]

    async def _read(self, fetching: Awaitable[Found]) -> tuple[Head, dict[str, Stored]]:
        """Read the copy, if it may be shown, and note whether that succeeded."""
        floor = max(self._guard.seen, self._local.highest)  # what another read gives meanwhile does not count
        try:
            found = await fetching
            head, stored = self._checked_head(found, floor), _stored(found)
        except StorageError:
            self._readable = False
            raise
        self._readable = True
        return head, stored

    def _checked_head(self, found: Found, floor: int) -> Head:
        """Return the head of what was read, if it may be shown. Start over if the reader goes back to a lower revision."""
        accepted = self._guard.accept(found, floor, self._lives, self._clock.monotonic())
        if accepted.went_back:
            assert self._feed is not None  # it says that the writer lives
            self._local.forget()
            self._feed.begin_anew(accepted.head.revision)
        return accepted.head

    def _lives(self, writer: str, below: int) -> bool:
        return self._feed is not None and self._feed.lives(writer, below)

    def _alive(self, entries: dict[str, Stored]) -> dict[str, Stored]:
        """Those whose time has not come."""
        now = self._clock.time() * 1000
        return {key: stored for key, stored in entries.items() if not isinstance(stored, Expiring) or stored.at > now}

    def _missing(self, key: str, default: object) -> Any:
        if default is MISSING:
            raise KeyNotFoundError(key)
        return default

    def _decoded(self, key: str, stored: Stored, default: object, type_: Any) -> Any:
        if isinstance(stored, Expiring):
            if stored.at <= self._clock.time() * 1000:
                return self._missing(key, default)
            stored = stored.value
        try:
            return decode_value(stored, type_)
        except RecursionError:
            raise TypeMismatchError(f"key {key!r}: its nesting is too deep to decode") from None
        except TypeMismatchError as error:
            raise TypeMismatchError(f"key {key!r}: {error}", error.path) from None

    def _all_decoded(self, entries: dict[str, Stored], type_: Any) -> dict[str, Any]:
        return {key: self._decoded(key, stored, MISSING, type_) for key, stored in self._alive(entries).items()}


def _stored(found: Found) -> dict[str, Stored]:
    expires = found.expires
    return {
        key: Expiring(Json(data), parse_time(expires[key])) if key in expires else Json(data)
        for key, data in found.values.items()  # as far as it is JSON: who reads what is none is told
    }


def _asked(key: object) -> str:
    """Return a key as a plain `str`, if a state may hold it. An imported state may hold keys out of bounds.

    Raises:
        InvalidKeyError: No state holds it.
    """
    if not isinstance(key, str) or key == HEAD:
        return check_key(key)
    try:
        key.encode()
    except UnicodeEncodeError:
        return check_key(key)
    return str.__str__(key)
