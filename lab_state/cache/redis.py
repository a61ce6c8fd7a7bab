"""`RedisCache`: mirrors in Redis or Valkey.

A mirror has two keys and a channel. Their names have a hash tag, so that a cluster keeps them on one
node:

    lab_state:{name}            hash: field = key, value = JSON; and `$lab_state`
    lab_state:{name}:expires    hash: field = key, value = Unix milliseconds; and `$lab_state`
    lab_state:{name}:changes    channel
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab_state._argument_types import check_clock
from lab_state._arguments import check_prefix
from lab_state._clock import Clock, SystemClock
from lab_state.cache._format import Keys
from lab_state.cache._protocol import CacheSession
from lab_state.cache.reader import Reader
from lab_state.config import Config

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool


class RedisCache:
    """Mirrors of states in Redis 6.2 or newer, or in Valkey."""

    def __init__(self, url: str | ConnectionPool, *, prefix: str = "lab_state:", clock: Clock | None = None) -> None:
        """Check and keep the settings. A connection is opened when it is first needed.

        Args:
            url: A URL as redis-py accepts it: `redis://`, `rediss://` or `unix://`, with
                user, password, database and options. For settings that a URL cannot have, pass
                a pool of redis-py: `Sentinel(...).master_for("name").connection_pool`. Only the
                settings of the pool are used.
            prefix: The beginning of the names of all keys and channels of this cache in Redis.
            clock: A clock for tests; by default the clock of the machine. It measures the timeouts
                of the writer. It is also the clock of each reader for which no clock is passed.

        Raises:
            ImportError: The extra is missing: `pip install 'lab-state[redis]'`, or
                `pip install '.[redis]'` in a clone of lab_state.
            ValueError: `url` is not a URL of Redis, or has an option that redis-py does not know. Or `prefix` has a lone
                surrogate.
            TypeError: An argument has the wrong type.
        """
        try:
            from lab_state.cache._connection import Dialer  # noqa: PLC0415 -- an extra
        except ImportError as error:
            raise ImportError(
                "RedisCache needs the extra redis: pip install 'lab-state[redis]', "
                "or pip install '.[redis]' in a clone of lab_state",
                name="redis",
            ) from error
        check_clock(clock)
        self._dialer = Dialer(url)
        self._prefix = check_prefix(prefix)
        try:
            self._prefix.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the prefix {prefix!r} has a lone surrogate, which UTF-8 cannot hold") from None
        self._clock: Clock = SystemClock() if clock is None else clock

    def __repr__(self) -> str:
        """Return the class and the address, without credentials."""
        return f"<RedisCache {self._dialer.path}>"

    async def open(self, name: str, writer: str) -> CacheSession:
        """Connect, and open a session; see `Cache.open`."""
        from lab_state.cache._redis_session import RedisSession  # noqa: PLC0415 -- an extra

        return RedisSession(await self._dialer.connect(self._clock), Keys(self._prefix, name), writer)

    def reader(self, name: str, *, local: bool = False, clock: Clock | None = None) -> Reader:
        """Return a reader of the mirror of a state. Any process may read it. Use the reader with `async with`.

        Args:
            name: The name of the state.
            local: Whether the reader keeps a local copy, and reads from it. The copy needs as much
                memory as the whole state, and some time to be loaded.
            clock: A clock for tests; by default the clock of the cache. The reader uses it to decide
                which keys have expired, and to measure timeouts.

        Raises:
            InvalidNameError: The name is not allowed; see `Config.name`.
            TypeError: The name is not a `str`, or `clock` is not a clock.
        """
        from lab_state.cache._redis_source import RedisSource  # noqa: PLC0415 -- an extra

        name = Config(name=name).name
        clock = self._clock if clock is None else clock
        return Reader(name, RedisSource(self._dialer, Keys(self._prefix, name), clock), local=local, clock=clock)
