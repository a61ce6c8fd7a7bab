"""The session that writes the mirror of a state in Redis.

Each step is one MULTI transaction on a connection that watches the two hashes. If another client
has changed them since the last transaction, Redis does not execute the step. Delayed commands of an older
connection count as such a change, too. A heartbeat is also a MULTI transaction. So the writer
notices another client's change at the next heartbeat.

A fill writes to two keys with new names. Redis drops these keys after a minute without a write.
At the end, one MULTI transaction renames them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from lab_state.cache._connection import EXEC, MULTI, Command, Connection, command, hset, sent_bytes
from lab_state.cache._format import (
    HEAD,
    MOST_MESSAGE_BYTES,
    Keys,
    head,
    message,
    message_bytes,
    new_fill,
    resync,
    seen_in,
)
from lab_state.cache._protocol import SPOILT, Seen, Slice, Step

_FILL_SECONDS = 60  # the time to live of the two keys of a fill; each slice renews it
_SENT_AT_ONCE = 64 * 1024
_UNANSWERED = 8  # the largest number of slices of a fill whose answers are not read yet
_HEAD = HEAD.encode()


class RedisSession:
    """The session of one writer in Redis; see `CacheSession`."""

    def __init__(self, connection: Connection, keys: Keys, writer: str) -> None:
        self._connection = connection
        self._keys = keys
        self._writer = writer
        self._seen = Seen(None, 0)  # the mirror at the moment of the last WATCH
        self._filled = ""  # the id of the fill that wrote this mirror
        self._expiring = True  # whether the mirror may have expiry times
        self._watch = [
            command(b"WATCH", keys.values, keys.expires),
            command(b"HGET", keys.values, _HEAD),
            command(b"HGET", keys.expires, _HEAD),
        ]
        self._unwatch = command(b"UNWATCH")
        self._count = command(b"HLEN", keys.expires)

    def __repr__(self) -> str:
        """Return the class, and the key of the mirror."""
        return f"<RedisSession of {self._keys.values.decode()!r}>"

    async def look(self) -> Seen:
        """Return the writer and the revision of the mirror. If the mirror is unchanged, send a heartbeat; see `CacheSession.look`."""
        before, connection = self._seen, self._connection
        if before.writer != self._writer:
            # A key that was watched before may have changed. Without UNWATCH, the next step would fail.
            await connection.send(self._unwatch, self._count, *self._watch)
            unwatched, count = await connection.answers(2)
            connection.good([unwatched])
            self._expiring = not isinstance(count, int) or count > 1
            await self._read_watch()
            return self._seen
        heartbeat = message(before.revision, before.revision, self._writer, Slice({}, {}, []))
        commands = [MULTI, command(b"PUBLISH", self._keys.channel, heartbeat), self._count]
        answers = await self._execute(commands)
        if answers is None:
            return SPOILT if self._seen == before else self._seen
        self._expiring = answers[1] > 1
        return self._seen

    async def fill(self, revision: int, slices: AsyncIterator[Slice], over: Seen) -> bool:
        """Write the state to two new keys, and then rename them to the keys of the mirror; see `CacheSession.fill`."""
        keys, there = self._keys, self._keys.fill()
        mark = head(revision, self._writer, new_fill())
        # The first slice also writes the new head to both hashes. If a head is missing at the end, Redis has dropped a hash.
        marks = [hset(key, {HEAD: mark}) for key in there]
        keep = [command(b"EXPIRE", key, b"%d" % _FILL_SECONDS) for key in there]
        # The next transactions write to other keys, so a change of a watched key of the mirror must not make them fail.
        self._connection.good(await self._connection.call(self._unwatch))
        unanswered: deque[int] = deque()
        async for part in slices:
            # This is one transaction, so that the keys never exist without a time to live.
            sent = [MULTI, *marks, *self._members(*there, part, replace=False), *keep, EXEC]
            marks = []
            await self._connection.send(*sent)
            unanswered.append(len(sent))
            if len(unanswered) > _UNANSWERED:
                await self._executed(unanswered.popleft())
        while unanswered:
            await self._executed(unanswered.popleft())
        whole = [command(b"HGET", key, _HEAD) for key in there]
        await self._connection.send(command(b"WATCH", *there), *whole, *self._watch)
        watched, *found = await self._connection.answers(3)
        self._connection.watched(watched)
        await self._read_watch()
        if found != [mark, mark] or (self._seen != over and self._seen.writer != self._writer):
            self._connection.good(await self._connection.call(self._unwatch, command(b"UNLINK", *there)))
            return False
        done = await self._execute(
            [
                MULTI,
                # RENAME would free a large old hash in one step, and all clients would wait for that.
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
        """Send the step as one transaction, in slices; see `CacheSession.apply`."""
        if self._seen != (self._writer, step.start):
            return False
        keys = self._keys
        commands: list[Command] = [MULTI]
        if step.cleared:
            commands.append(command(b"UNLINK", keys.values, keys.expires))
        self._expiring = self._expiring and not step.cleared
        count, total, before = 0, 0, None
        connection, clear = self._connection, step.cleared
        async for part in slices:
            if before is not None:
                commands += self._members(keys.values, keys.expires, before, replace=True)
                total += message_bytes(before)
                if total <= MOST_MESSAGE_BYTES:
                    data = message(step.start, step.end, self._writer, before, clear=clear, more=True)
                    commands.append(command(b"PUBLISH", keys.channel, data))
                    clear = False
            before = part
            if sent_bytes(commands) >= _SENT_AT_ONCE:
                await connection.send(*commands)
                count, commands = count + len(commands), []
        assert before is not None  # `slices` yields at least one slice
        # The size is estimated before the message is made, so that no message above the bound is made.
        total += message_bytes(before)
        data = (
            message(step.start, step.end, self._writer, before, clear=clear)
            if total <= MOST_MESSAGE_BYTES
            else resync(step.start, step.end, self._writer)
        )
        mark = head(step.end, self._writer, self._filled)
        last = before._replace(values={**before.values, HEAD: mark})
        commands += self._members(keys.values, keys.expires, last, replace=True)
        commands.append(hset(keys.expires, {HEAD: mark}))
        commands.append(command(b"PUBLISH", keys.channel, data))
        return await self._execute(commands, count) is not None

    async def aclose(self) -> None:
        """Close the connection; see `CacheSession.aclose`."""
        await self._connection.aclose()

    def _members(self, values: bytes, expires: bytes, part: Slice, *, replace: bool) -> list[Command]:
        """Return the commands that write a slice to two hashes. With `replace`, also delete old expiry times of these keys."""
        commands: list[Command] = [hset(values, part.values)] if part.values else []
        if part.deleted:
            commands.append(command(b"HDEL", values, *map(str.encode, part.deleted)))
        if part.expires:
            commands.append(hset(expires, {key: b"%d" % at for key, at in part.expires.items()}))
        if replace and self._expiring:
            stay = [key.encode() for key in (*part.values, *part.deleted) if key not in part.expires]
            commands += [command(b"HDEL", expires, *stay)] if stay else []
        self._expiring = self._expiring or bool(part.expires)
        return commands

    async def _execute(self, commands: Sequence[Command], before: int = 0) -> list[Any] | None:
        """Send the rest of a transaction, after the first `before` commands. Watch again in the same round trip.

        Return the answers. If a watched key was changed, nothing was done: return `None`.
        """
        sent = [*commands, EXEC, *self._watch]
        await self._connection.send(*sent)
        done = await self._executed(before + len(sent) - len(self._watch))
        await self._read_watch()
        return done

    async def _executed(self, count: int) -> list[Any] | None:
        """Return the answers of a transaction of `count` commands. MULTI and EXEC are counted. Return `None` if a watched key was changed."""
        answers = await self._connection.answers(count)
        self._connection.good(answers)
        executed: list[Any] | None = answers[-1]
        self._connection.good(executed or ())
        return executed

    async def _read_watch(self) -> None:
        watched, one, two = await self._connection.answers(len(self._watch))
        self._connection.watched(watched)
        for answer in (one, two):
            if isinstance(answer, Exception) and not str(answer).startswith("WRONGTYPE"):
                raise self._connection.problem(answer)
        heads = [answer if isinstance(answer, bytes) else None for answer in (one, two)]
        self._seen, self._filled = seen_in(*heads)
