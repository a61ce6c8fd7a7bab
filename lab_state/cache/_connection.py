"""One connection to Redis, made by redis-py: TLS, ACL, sockets and Sentinel are its business.

Commands are written and answers read one by one, since a step of many keys is sent in
slices between which the event loop runs; redis-py's pipelines pack all of it at once.

No message of redis-py's is passed on: an answer may quote what it was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeAlias, cast

import redis
import redis.exceptions as problems
from redis.asyncio import ConnectionPool

from lab_state import _forks as forks
from lab_state._clock import Clock, within
from lab_state.exceptions import StorageError, UnavailableError, UnsupportedError
from lab_state.storage._worker import Threads, Worker

_TIMEOUT = 5.0
_SENT_AT_ONCE = 64 * 1024

_ADVICE: dict[str, str] = {
    "AuthenticationError": "it refuses the user or the password; see the URL and the server's ACL",
    "AuthorizationError": "it refuses the user or the password; see the URL and the server's ACL",
    "NoPermissionError": "the user may not do that; docs/cache.md has the commands that are needed",
    "ReadOnlyError": "it is a read-only replica; use the URL of the primary, or Sentinel",
    "OutOfMemoryError": "it is out of memory; raise maxmemory",
    "MovedError": "it is a cluster, and the state is on another node; use the URL of that node",
    "TimeoutError": "it does not answer in time",
    "BusyLoadingError": "it is loading its data",
}


Command: TypeAlias = bytes | tuple[bytes, ...]
"""A command as it is sent; where it has a large value, in parts, of which that is one."""


def command(*args: bytes) -> bytes:
    """A command as it is sent."""
    return b"*%d\r\n" % len(args) + b"".join([b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in args])


def hset(key: bytes, members: Mapping[str, bytes]) -> Command:
    """`HSET` with all of them."""
    parts: list[bytes] = []
    body = [b"*%d\r\n$4\r\nHSET\r\n$%d\r\n%b\r\n" % (2 + 2 * len(members), len(key), key)]
    for member, value in members.items():
        name = member.encode()
        if len(value) <= _SENT_AT_ONCE:
            body.append(b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name, len(value), value))
        else:
            body.append(b"$%d\r\n%b\r\n$%d\r\n" % (len(name), name, len(value)))
            parts += b"".join(body), value
            body = [b"\r\n"]
    return (*parts, b"".join(body)) if parts else b"".join(body)


def sent_bytes(commands: Iterable[Command]) -> int:
    """Return how many bytes these commands have."""
    return sum(len(each) if isinstance(each, bytes) else sum(map(len, each)) for each in commands)


def _pieces(commands: Iterable[Command]) -> Iterator[bytes]:
    """Join what is small, and split what is large."""
    small: list[bytes] = []
    for part in chain.from_iterable((each,) if isinstance(each, bytes) else each for each in commands):
        if len(part) <= _SENT_AT_ONCE:
            small.append(part)
            continue
        yield b"".join(small)
        small = []
        for start in range(0, len(part), _SENT_AT_ONCE):
            yield part[start : start + _SENT_AT_ONCE]
    yield b"".join(small)


def _check_url(url: str) -> None:
    """Refuse a URL in which the user or the password ends too early.

    A part of the password would then pass for a port, a host or a path, which messages show.
    """
    scheme, _, rest = url.partition("://")
    address = re.split("[/?#]", rest, maxsplit=1)[0]
    behind = rest[len(address) :]
    if "#" in behind or ("@" in behind and (address or scheme != "unix")):
        raise ValueError(
            "not a URL of Redis: in the user, the password and the options, write # as %23, / as %2F, ? as %3F and @ as %40"
        )


class Dialer:
    """Makes connections to one server, or to whichever one Sentinel names."""

    def __init__(self, url: str | ConnectionPool) -> None:
        """As redis-py reads it.

        Raises:
            ValueError: It is no URL of Redis.
        """
        if isinstance(url, str):
            _check_url(url)
        try:
            pool = cast("Any", ConnectionPool).from_url(url) if isinstance(url, str) else url
        except ValueError:
            raise ValueError(
                "not a URL of Redis: it begins with redis://, rediss:// or unix://, and its options are redis-py's"
            ) from None
        self._pool = pool  # a connection by Sentinel asks its pool where to go, and keeps no more than a weak reference
        self._make: Any = pool.connection_class
        # Without what redis-py 8 adds for RESP3.
        given: dict[str, Any] = {k: v for k, v in pool.connection_kwargs.items() if not k.startswith(("maint", "orig"))}
        # One timeout for all the answers of a round trip; redis-py would set one for each.
        self._timeout: float = given.get("socket_timeout") or _TIMEOUT
        self._options: dict[str, Any] = {
            **given,
            "socket_timeout": None,
            "decode_responses": False,
            "protocol": 2,
        }
        if (driver := getattr(redis, "DriverInfo", None)) is not None and "driver_info" not in given:
            # Else redis-py asks the file system for its version, at each connection.
            self._options["driver_info"] = driver(lib_version=redis.__version__)
        self.path: str = (
            f"unix:{given['path']}"
            if "path" in given
            else f"{given['host']}:{given.get('port', 6379)}"
            if "host" in given
            else "localhost:6379"
            if isinstance(url, str)
            else "Redis by Sentinel"
        )

    async def connect(self, clock: Clock) -> Connection:
        """Open a connection whose timeouts go by this clock.

        Raises:
            StorageError: There is none to be had.
        """
        connection = self._make(**self._options)
        link = Connection(connection, self.path, self._timeout, clock)
        with link.translated():
            try:
                with within(clock, self._timeout):
                    await _prepare_tls(connection)
                    await connection.connect()
            except BaseException:
                await link.aclose()
                raise
        return link


async def _prepare_tls(connection: Any) -> None:
    """Read the certificates in a thread. redis-py would do it on the event loop, at each connection."""
    context = getattr(connection, "ssl_context", None)
    if context is not None:
        worker = Worker(Threads("lab_state TLS"))
        try:
            await worker.run(context.get)
        finally:
            worker.shutdown()


class Connection:
    """One connection."""

    def __init__(self, connection: Any, path: str, timeout: float, clock: Clock) -> None:
        """Take a connection. One round trip may take `timeout` seconds of the clock."""
        self.clock: Clock = clock
        self._connection = connection
        self._path = path
        self._timeout = timeout
        self._is_parents = False
        forks.disown_in_children(self)

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Refuse every call. Runs in a forked child.

        The connection stays open: closing it would take it out of the parent's selector.
        """
        self._is_parents = True

    async def send(self, *commands: Command) -> None:
        """Send commands. A large value goes in pieces, each of which may take as long as an answer."""
        for number, piece in enumerate(_pieces(commands)):
            if number:
                await asyncio.sleep(0)
            with self.translated():
                self._check_connected()
                with within(self.clock, self._timeout):
                    await self._connection.send_packed_command(piece, check_health=False)

    async def answers(self, count: int) -> list[Any]:
        """The next answers."""
        with self.translated(), within(self.clock, self._timeout):
            return [await self._next() for _ in range(count)]

    async def read(self) -> Any:
        """The next answer, however long it takes; an error that is the answer to a command is returned."""
        with self.translated():
            return await self._next()

    async def _next(self) -> Any:
        self._check_connected()
        try:
            return await self._connection.read_response(disable_decoding=True)
        except problems.ResponseError as error:
            return error

    async def call(self, *commands: bytes) -> list[Any]:
        """Send commands together; their answers."""
        await self.send(*commands)
        return await self.answers(len(commands))

    async def transaction(self, *commands: bytes) -> list[Any]:
        """The answers of commands that are carried out in one moment."""
        answers = await self.call(MULTI, *commands, EXEC)
        self.good(answers)
        executed: list[Any] = answers[-1]
        self.good(executed)
        return executed

    def good(self, answers: Iterable[Any]) -> None:
        """Make sure that none of the answers is an error.

        Raises:
            StorageError: One is.
        """
        for answer in answers:
            if isinstance(answer, Exception):
                raise self.problem(answer)

    def watched(self, answer: Any) -> None:
        """Make sure that `WATCH` was carried out.

        Raises:
            UnsupportedError: The server refuses it, to this user or to all.
            StorageError: It failed.
        """
        if isinstance(answer, problems.NoPermissionError) or answer.__class__ is problems.ResponseError:
            raise UnsupportedError(
                f"{self._path}: it refuses WATCH, without which a writer that was replaced could overwrite its "
                "successor's copy: give the user the right (ACL SETUSER <user> +watch), or use a server or a proxy that "
                "has WATCH"
            )
        self.good([answer])

    async def aclose(self) -> None:
        """End the connection, whatever is under way."""
        if self._is_parents:  # pragma: no cover -- likewise
            return
        with contextlib.suppress(Exception):  # it ends either way
            await self._connection.disconnect(nowait=True)

    def _check_connected(self) -> None:
        if self._is_parents:  # pragma: no cover -- a child's coverage is not collected
            raise UnsupportedError(f"{self._path}: the connection belongs to the parent of this forked process")
        if not self._connection.is_connected:  # redis-py would connect anew, and forget what it watched
            raise UnavailableError(f"{self._path}: the connection was lost")

    def problem(self, error: BaseException) -> StorageError:
        """What to tell of an error."""
        name = type(error).__name__
        code = str(error).partition(" ")[0]
        if name == "ResponseError" and code.isupper() and code.isalpha():
            name = code  # the first word is the server's code; what follows may quote
        kind = (
            UnsupportedError
            if isinstance(
                error, problems.AuthenticationError | problems.AuthorizationError | problems.NoPermissionError
            )
            else UnavailableError
        )
        advice = next((text for what, text in _ADVICE.items() if what in {c.__name__ for c in type(error).__mro__}), "")
        return kind(f"{self._path}: {name}{advice and ', '}{advice}")

    @contextmanager
    def translated(self) -> Generator[None]:
        """Errors of redis-py and of the network are told as ours."""
        try:
            yield
        except (problems.RedisError, OSError, EOFError, AttributeError) as error:
            raise self.problem(error) from None


MULTI, EXEC = command(b"MULTI"), command(b"EXEC")
