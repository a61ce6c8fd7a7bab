"""`RedisCache`: a copy of a state in Redis or Valkey.

Three keys for a state, with a hash tag, so that a cluster keeps them together:

    lab_state:{name}            hash: field = key, value = JSON; and `$lab_state`
    lab_state:{name}:expires    hash: field = key, value = Unix milliseconds; and `$lab_state`
    lab_state:{name}:changes    channel

Every step is one MULTI on a connection that watches the two hashes: whatever else
touched them since they were last looked at, the step is not carried out. What an older
connection sent and the network delivers late is not carried out for the same reason. A
beat is such a MULTI too, so whatever another client writes is noticed within one beat.

A fill goes to two keys with names of its own, which Redis forgets after a minute in
which nothing came, and is renamed into place in one MULTI.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from lab_state._clock import Clock, SystemClock
from lab_state.cache._format import HEAD, MOST_TOLD, Keys, head, message, new_fill, resync, seen_in, told_bytes
from lab_state.cache._protocol import SPOILT, Seen, Slice, Step
from lab_state.cache.reader import Reader

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool

    from lab_state.cache._connection import Command, Connection

_FILL_SECONDS = 60
_SENT_AT_ONCE = 64 * 1024
_UNANSWERED = 8
_HEAD = HEAD.encode()


class RedisCache:
    """Copies of states in Redis 6.2 or newer, or Valkey."""

    def __init__(self, url: str | ConnectionPool, *, prefix: str = "lab_state:", clock: Clock | None = None) -> None:
        """Take the settings. The connection is made when it is first needed.

        Args:
            url: As redis-py takes it: `redis://`, `rediss://` or `unix://`, with user,
                password, database and options. Or a pool of redis-py's, for what a URL
                cannot say: `Sentinel(...).master_for("name").connection_pool`. Only its
                settings are used.
            prefix: What the names of all keys begin with.
            clock: For tests; the machine's own when not given. The timeouts of the
                writer's connections go by it, and the readers' if they have none.

        Raises:
            ImportError: The extra is missing: `pip install 'lab-state[redis]'`.
            ValueError: The URL is none of Redis.
        """
        try:
            from lab_state.cache._connection import Dialer  # noqa: PLC0415 -- an extra
        except ImportError as error:
            raise ImportError(
                "RedisCache needs the extra redis: pip install 'lab-state[redis]'", name="redis"
            ) from error
        self._dialer = Dialer(url)
        self._prefix = prefix
        self._clock: Clock = SystemClock() if clock is None else clock

    def __repr__(self) -> str:
        """Where it is, without credentials."""
        return f"<RedisCache {self._dialer.path}>"

    async def open(self, name: str, writer: str) -> RedisSession:
        """Connect; see `Cache.open`."""
        return RedisSession(await self._dialer.connect(self._clock), Keys(self._prefix, name), writer)

    def reader(self, name: str, *, local: bool = False, clock: Clock | None = None) -> Reader:
        """Read the copy of a state, in any process; use it with `async with`.

        Args:
            name: The name of the state.
            local: Whether to keep a copy in this process, so that a read is one of
                memory. It costs the memory of the state, and loading it.
            clock: For tests; the cache's when not given. Expiry and timeouts go by it.
        """
        from lab_state.cache._redis_source import RedisSource  # noqa: PLC0415 -- an extra

        clock = clock or self._clock
        return Reader(name, RedisSource(self._dialer, Keys(self._prefix, name), clock), local=local, clock=clock)


class RedisSession:
    """One writer's hold on a copy; see `CacheSession`."""

    def __init__(self, link: Connection, keys: Keys, writer: str) -> None:
        from lab_state.cache._connection import EXEC, MULTI, command, hset, sent_bytes  # noqa: PLC0415 -- an extra

        self._command, self._hset, self._sent_bytes = command, hset, sent_bytes
        self._multi, self._exec = MULTI, EXEC
        self._link = link
        self._keys = keys
        self._writer = writer
        self._seen = Seen(None, 0)  # what is there, as of the moment from which it is watched
        self._filled = ""  # which fill put it there
        self._expiring = True  # whether there may be expiry times
        self._watch = [
            command(b"WATCH", keys.values, keys.expires),
            command(b"HGET", keys.values, _HEAD),
            command(b"HGET", keys.expires, _HEAD),
        ]
        self._unwatch = command(b"UNWATCH")
        self._count = command(b"HLEN", keys.expires)

    async def look(self) -> Seen:
        """Return whose copy it is, and send a beat if it is this session's; see `CacheSession.look`."""
        before, link = self._seen, self._link
        if before.writer != self._writer:
            # What was watched before may have been touched, and would be held against the next step.
            await link.send(self._unwatch, self._count, *self._watch)
            unwatched, count = await link.answers(2)
            link.good([unwatched])
            self._expiring = not isinstance(count, int) or count > 1
            await self._read_watch()
            return self._seen
        alive = message(before.revision, before.revision, self._writer, Slice({}, {}, []))
        beat = [self._multi, self._command(b"PUBLISH", self._keys.channel, alive), self._count]
        answers = await self._execute(beat)
        if answers is None:
            return SPOILT if self._seen == before else self._seen
        self._expiring = answers[1] > 1
        return self._seen

    async def fill(self, revision: int, slices: AsyncIterator[Slice], over: Seen) -> bool:
        """Write all of it beside the copy, then put it in its place; see `CacheSession.fill`."""
        command = self._command
        keys, there = self._keys, self._keys.fill()
        mark = head(revision, self._writer, new_fill())
        # Written once: if it is not there in the end, Redis has forgotten a part in the middle.
        marks = [self._hset(key, {HEAD: mark}) for key in there]
        keep = [command(b"EXPIRE", key, b"%d" % _FILL_SECONDS) for key in there]
        self._link.good(await self._link.call(self._unwatch))  # what is written beside the copy depends on nothing
        unanswered: deque[int] = deque()
        async for part in slices:
            # In one moment, so that nothing is ever there without a time to live, whatever is cut.
            sent = [self._multi, *marks, *self._members(*there, part, replace=False), *keep, self._exec]
            marks = []
            await self._link.send(*sent)
            unanswered.append(len(sent))
            if len(unanswered) > _UNANSWERED:
                await self._executed(unanswered.popleft())
        while unanswered:
            await self._executed(unanswered.popleft())
        whole = [command(b"HGET", key, _HEAD) for key in there]
        await self._link.send(command(b"WATCH", *there), *whole, *self._watch)
        watched, *found = await self._link.answers(3)
        self._link.watched(watched)
        await self._read_watch()
        if found != [mark, mark] or (self._seen != over and self._seen.writer != self._writer):
            self._link.good(await self._link.call(self._unwatch, command(b"UNLINK", *there)))
            return False
        done = await self._execute(
            [
                self._multi,
                # Renaming over a large hash would free it at once, with everybody waiting.
                command(b"UNLINK", keys.values, keys.expires),
                command(b"RENAME", there[0], keys.values),
                command(b"RENAME", there[1], keys.expires),
                command(b"PERSIST", keys.values),
                command(b"PERSIST", keys.expires),
                command(b"PUBLISH", keys.channel, resync(revision, revision, self._writer)),
            ]
        )
        return done is not None

    async def apply(self, step: Step, slices: AsyncIterator[Slice]) -> bool:
        """Send all of it as one transaction, in slices; see `CacheSession.apply`."""
        if self._seen != (self._writer, step.start):
            return False
        command, keys = self._command, self._keys
        commands: list[Command] = [self._multi]
        if step.cleared:
            commands.append(command(b"UNLINK", keys.values, keys.expires))
        self._expiring = self._expiring and not step.cleared
        count, told, before = 0, 0, None
        link, clear = self._link, step.cleared
        async for part in slices:
            if before is not None:
                commands += self._members(keys.values, keys.expires, before, replace=True)
                told += told_bytes(before)
                if told <= MOST_TOLD:
                    data = message(step.start, step.end, self._writer, before, clear=clear, more=True)
                    commands.append(command(b"PUBLISH", keys.channel, data))
                    clear = False
            before = part
            if self._sent_bytes(commands) >= _SENT_AT_ONCE:
                await link.send(*commands)
                count, commands = count + len(commands), []
        assert before is not None  # there is a part of everything
        told += told_bytes(before)  # before a message is made of it: of one large value, it would be as large
        data = (
            message(step.start, step.end, self._writer, before, clear=clear)
            if told <= MOST_TOLD
            else resync(step.start, step.end, self._writer)
        )
        mark = head(step.end, self._writer, self._filled)
        last = before._replace(values={**before.values, HEAD: mark})
        commands += self._members(keys.values, keys.expires, last, replace=True)
        commands.append(self._hset(keys.expires, {HEAD: mark}))
        commands.append(command(b"PUBLISH", keys.channel, data))
        return await self._execute(commands, count) is not None

    async def aclose(self) -> None:
        """End the connection; see `CacheSession.aclose`."""
        await self._link.aclose()

    def _members(self, values: bytes, expires: bytes, part: Slice, *, replace: bool) -> list[Command]:
        """The commands that put a part into two hashes; `replace`: where there may be something."""
        commands: list[Command] = [self._hset(values, part.values)] if part.values else []
        if part.deleted:
            commands.append(self._command(b"HDEL", values, *map(str.encode, part.deleted)))
        if part.expires:
            commands.append(self._hset(expires, {key: b"%d" % at for key, at in part.expires.items()}))
        if replace and self._expiring:
            stay = [key.encode() for key in (*part.values, *part.deleted) if key not in part.expires]
            commands += [self._command(b"HDEL", expires, *stay)] if stay else []
        self._expiring = self._expiring or bool(part.expires)
        return commands

    async def _execute(self, commands: Sequence[Command], before: int = 0) -> list[Any] | None:
        """Send the rest of a transaction, after `before` commands. In the same round trip, watch anew.

        Returns the answers; `None` if what it watched was touched, and nothing was done.
        """
        sent = [*commands, self._exec, *self._watch]
        await self._link.send(*sent)
        done = await self._executed(before + len(sent) - len(self._watch))
        await self._read_watch()
        return done

    async def _executed(self, count: int) -> list[Any] | None:
        """Read the answers of a transaction of so many commands. Return `None` if a watched key was touched."""
        answers = await self._link.answers(count)
        self._link.good(answers)
        executed: list[Any] | None = answers[-1]
        self._link.good(executed or ())
        return executed

    async def _read_watch(self) -> None:
        watched, one, two = await self._link.answers(len(self._watch))
        self._link.watched(watched)
        for answer in (one, two):
            if isinstance(answer, Exception) and not str(answer).startswith("WRONGTYPE"):
                raise self._link.problem(answer)
        heads = [answer if isinstance(answer, bytes) else None for answer in (one, two)]
        self._seen, self._filled = seen_in(*heads)
