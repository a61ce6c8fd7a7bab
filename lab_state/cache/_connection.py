"""A connection to Redis. redis-py opens it, because redis-py supports TLS, ACL, Unix sockets and Sentinel.

This module packs the commands itself, and reads the answers one by one. A pipeline of redis-py would pack
all commands in one step. Here a step of many keys is sent in slices, and the event loop runs between them.

The message of a `StorageError` never contains the text of an error of redis-py, because this text may quote the command with
a value. It contains the class of that error, or the error code of the server.
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
from lab_state._argument_types import kind_of
from lab_state._clock import Clock, within
from lab_state.exceptions import StorageError, UnavailableError, UnsupportedError
from lab_state.storage._worker import Threads, Worker

_TIMEOUT = 5.0  # seconds
_SENT_AT_ONCE = 64 * 1024

_ADVICE: dict[str, str] = {
    "AuthenticationError": "it refuses the user or the password; see the URL and the server's ACL",
    "AuthorizationError": "it refuses the user or the password; see the URL and the server's ACL",
    "NoPermissionError": "the user may not do that; docs/cache.md has the commands that are needed",
    "ReadOnlyError": "it is a read-only replica; use the URL of the primary server, or Sentinel",
    "OutOfMemoryError": "it is out of memory; raise maxmemory",
    "MovedError": "it is a cluster, and the state is on another node; use the URL of that node",
    "TimeoutError": "it does not answer in time",
    "BusyLoadingError": "it is loading its data",
}

_NOT_A_URL = (
    "not a URL of Redis: such a URL begins with redis://, rediss:// or unix://, and has the options of redis-py"
)


Command: TypeAlias = bytes | tuple[bytes, ...]
"""A command as bytes. A command with a large value is a tuple of parts, and the value is one of the parts."""


def command(*args: bytes) -> bytes:
    """Return the bytes of a command, in the protocol of Redis."""
    return b"*%d\r\n" % len(args) + b"".join([b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in args])


def hset(key: bytes, members: Mapping[str, bytes]) -> Command:
    """Return the command `HSET` with these members."""
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
    """Return the number of bytes of these commands."""
    return sum(len(each) if isinstance(each, bytes) else sum(map(len, each)) for each in commands)


def _pieces(commands: Iterable[Command]) -> Iterator[bytes]:
    """Yield the bytes of commands in pieces: small parts are joined, and large ones are split."""
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
    """Check that special characters in the user and the password of a URL are escaped.

    Otherwise the URL parser treats a part of the password as a port, a host or a path. Messages
    contain the port, the host and the path, so they would show a part of the password.

    Raises:
        ValueError: Such a character is not escaped.
    """
    scheme, _, rest = url.partition("://")
    address = re.split("[/?#]", rest, maxsplit=1)[0]
    behind = rest[len(address) :]
    if "#" in behind or ("@" in behind and (address or scheme != "unix")):
        raise ValueError(
            "not a URL of Redis: in the user, the password and the options, write # as %23, / as %2F, ? as %3F and @ as %40"
        )


class Dialer:
    """A factory of connections to one server, or to the primary that Sentinel names."""

    def __init__(self, url: str | ConnectionPool) -> None:
        """Keep a URL or a pool of redis-py.

        Raises:
            ValueError: The text is not a URL of Redis, or has an option that redis-py does not know.
            TypeError: `url` is neither a text nor a pool of `redis.asyncio`.
        """
        if isinstance(url, str):
            _check_url(url)
        elif not isinstance(url, ConnectionPool):
            raise TypeError(f"url must be a str or a ConnectionPool of redis.asyncio, not {kind_of(url)}")
        try:
            pool = cast("Any", ConnectionPool).from_url(url) if isinstance(url, str) else url
        except ValueError:
            raise ValueError(_NOT_A_URL) from None
        self._pool = pool  # kept here, because a connection by Sentinel has only a weak reference to its pool
        self._make: Any = pool.connection_class
        # Remove the options that redis-py 8 adds for RESP3.
        given: dict[str, Any] = {k: v for k, v in pool.connection_kwargs.items() if not k.startswith(("maint", "orig"))}
        # All answers of a round trip share one timeout. redis-py would use a timeout for each answer.
        self._timeout: float = given.get("socket_timeout") or _TIMEOUT
        self._options: dict[str, Any] = {
            **given,
            "socket_timeout": None,
            "decode_responses": False,
            "protocol": 2,
        }
        if (driver := getattr(redis, "DriverInfo", None)) is not None and "driver_info" not in given:
            # Without this option, redis-py reads its own version from the file system for each connection.
            self._options["driver_info"] = driver(lib_version=redis.__version__)
        if isinstance(url, str):
            try:
                self._make(**self._options)  # this opens no connection
            except Exception:  # noqa: BLE001 -- redis-py raises many errors for a bad option, and their text may quote it
                raise ValueError(_NOT_A_URL) from None
        self.path: str = _address(given, is_url=isinstance(url, str))

    async def connect(self, clock: Clock) -> Connection:
        """Open a connection. `clock` measures the timeouts of the connection.

        Raises:
            StorageError: The connection cannot be opened.
        """
        connection = self._make(**self._options)
        opened = Connection(connection, self.path, self._timeout, clock)
        with opened.translated():
            try:
                with within(clock, self._timeout):
                    await _prepare_tls(connection)
                    await connection.connect()
            except BaseException:
                await opened.aclose()
                raise
        return opened


def _address(options: Mapping[str, Any], *, is_url: bool) -> str:
    """Return the address of a connection with these options, without credentials."""
    if "path" in options:
        return f"unix:{options['path']}"
    if "host" in options:
        return f"{options['host']}:{options.get('port', 6379)}"
    return "localhost:6379" if is_url else "Redis by Sentinel"


async def _prepare_tls(connection: Any) -> None:
    """Read the certificates in a thread. redis-py would read them on the event loop, for each connection."""
    context = getattr(connection, "ssl_context", None)
    if context is not None:
        worker = Worker(Threads("lab_state TLS"))
        try:
            await worker.run(context.get)
        finally:
            worker.shutdown()


class Connection:
    """A connection to Redis that sends commands and reads answers.

    A call that sends or reads raises a `StorageError` if the connection fails. Each of these calls but `read` has a timeout.
    """

    def __init__(self, connection: Any, path: str, timeout: float, clock: Clock) -> None:
        """Use a connection of redis-py. `timeout` is the time limit for sending a piece, and for reading all answers of a call, in seconds."""
        self.clock: Clock = clock
        self._connection = connection
        self._path = path
        self._timeout = timeout
        self._is_parents = False
        forks.disown_in_children(self)

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Refuse every call. This runs in a forked child.

        The connection stays open, because closing it would remove it from the parent's selector.
        """
        self._is_parents = True

    async def send(self, *commands: Command) -> None:
        """Send commands. A large value is sent in pieces, and the timeout begins again for each piece."""
        for number, piece in enumerate(_pieces(commands)):
            if number:
                await asyncio.sleep(0)
            with self.translated():
                self._check_connected()
                with within(self.clock, self._timeout):
                    await self._connection.send_packed_command(piece, check_health=False)

    async def answers(self, count: int) -> list[Any]:
        """Return the next `count` answers. The error of a command that failed is in the list, and is not raised."""
        with self.translated(), within(self.clock, self._timeout):
            return [await self._next() for _ in range(count)]

    async def read(self) -> Any:
        """Wait for the next answer without a timeout, and return it. If a command failed, return its error, and do not raise the error."""
        with self.translated():
            return await self._next()

    async def _next(self) -> Any:
        self._check_connected()
        try:
            return await self._connection.read_response(disable_decoding=True)
        except problems.ResponseError as error:
            return error

    async def call(self, *commands: bytes) -> list[Any]:
        """Send commands together, and return their answers; see `answers` for errors."""
        await self.send(*commands)
        return await self.answers(len(commands))

    async def transaction(self, *commands: bytes) -> list[Any]:
        """Run commands as one transaction of Redis, and return their answers. If a command fails, raise a `StorageError`."""
        answers = await self.call(MULTI, *commands, EXEC)
        self.good(answers)
        executed: list[Any] = answers[-1]
        self.good(executed)
        return executed

    def good(self, answers: Iterable[Any]) -> None:
        """Check that none of the answers is an error.

        Raises:
            StorageError: At least one answer is an error. The first error is raised.
        """
        for answer in answers:
            if isinstance(answer, Exception):
                raise self.problem(answer)

    def watched(self, answer: Any) -> None:
        """Check that the command `WATCH` succeeded.

        Raises:
            UnsupportedError: The server refuses the command to this user, or to all users.
            StorageError: The command failed.
        """
        if isinstance(answer, problems.NoPermissionError) or answer.__class__ is problems.ResponseError:
            raise UnsupportedError(
                f"{self._path}: it refuses WATCH, and without WATCH an old writer could overwrite the mirror of a newer "
                "one: give the user the right (ACL SETUSER <user> +watch), or use a server or a proxy that "
                "has WATCH"
            )
        self.good([answer])

    async def aclose(self) -> None:
        """Close the connection. This is allowed during a call."""
        if self._is_parents:  # pragma: no cover -- a child's coverage is not collected
            return
        with contextlib.suppress(Exception):  # the connection is closed even if this call raises an error
            await self._connection.disconnect(nowait=True)

    def _check_connected(self) -> None:
        if self._is_parents:  # pragma: no cover -- a child's coverage is not collected
            raise UnsupportedError(f"{self._path}: the connection belongs to the parent of this forked process")
        if not self._connection.is_connected:  # otherwise redis-py would connect again, without the watched keys
            raise self._lost()

    def problem(self, error: BaseException) -> StorageError:
        """Return the error to raise for an error of redis-py or of the network."""
        name = type(error).__name__
        code = str(error).partition(" ")[0]
        if name == "ResponseError" and code.isupper() and code.isalpha():
            name = code  # the first word is the error code of the server; the rest may quote the command
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
        """Raise a `StorageError` in place of an error of redis-py or of the network."""
        try:
            yield
        except (problems.RedisError, OSError, EOFError) as error:
            raise self.problem(error) from None
        except AttributeError:
            # redis-py does not check its stream, and another task may have closed the connection meanwhile.
            if self._connection.is_connected:
                raise
            raise self._lost() from None

    def _lost(self) -> UnavailableError:
        return UnavailableError(f"{self._path}: the connection was lost")


MULTI, EXEC = command(b"MULTI"), command(b"EXEC")
