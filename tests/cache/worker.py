"""What `test_kill.py` kills: a process that changes a state with a mirror, and says what it does.

Run as a script it is the zygote: it has imported the package once, and forks a child for
each line `<cycle> <changes> <url>` on its standard input. The lines of a child:

    PID <pid>               the child is there
    AT <revision> <digest>  it has started, and this is what it found
    TRY <revision>          the change that makes this revision follows
    ACK <revision>          every change up to this one is durable, says lab_state
    REST <revision>         it makes no more changes, and waits to be killed
    DEAD <wait status>      the child has ended

The test imports the module for `Model`, which knows what each change does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
import zlib
from typing import Any

import msgspec
import redis.asyncio  # noqa: F401 -- so that no child has to

from lab_state import Config, FileStorage, Manager, RedisCache

NAME = "state"
AT = "at"
"""The key that has the revision of the change that made the state what it is."""


class Model:
    """What the state must be: a pure function of the cycles' changes, one revision each."""

    def __init__(self, entries: dict[str, Any], revision: int) -> None:
        self.entries = entries
        self.revision = revision

    def next(self, cycle: int) -> tuple[bool, list[str], dict[str, Any]]:
        """Make the next change: whether all is deleted first, what is deleted, what is set."""
        revision = self.revision + 1
        dice = random.Random(cycle * 1_000_003 + revision)
        cleared = dice.random() < 0.03
        if cleared:
            self.entries.clear()
        going = [key for key in sorted(self.entries) if key != AT and dice.random() < 0.05]
        for key in going:
            del self.entries[key]
        value = dice.choice([{"cycle": cycle, "n": revision}, revision, None, "x" * dice.choice((1, 3000)), [True]])
        coming = {f"key/{dice.randrange(60)}": value for _ in range(dice.choice((0, 1, 1, 2, 20)))}
        coming[AT] = revision
        self.entries.update(coming)
        self.revision = revision
        return cleared, going, coming


def digest(entries: dict[str, Any]) -> str:
    return f"{zlib.crc32(msgspec.json.encode(dict(sorted(entries.items())))):08x}-{len(entries)}"


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


async def live(directory: str, cycle: int, changes: int, url: str) -> None:
    dice = random.Random(cycle)
    config = Config(name=NAME, flush_interval=dice.choice((0, 0.003, None)))
    state = Manager(config, FileStorage(directory), RedisCache(url))
    await state.start()
    model = Model(await state.get_all(), state.revision)
    say(f"AT {model.revision} {digest(model.entries)}")
    for _ in range(changes):
        cleared, going, coming = model.next(cycle)
        say(f"TRY {model.revision}")
        async with state.transaction() as tx:
            if cleared:
                tx.delete_all()
            tx.delete_many(going)
            for key, value in coming.items():
                tx.set(key, value, ttl=dice.choice((None, None, 10_000)))
        if state.revision != model.revision:
            raise RuntimeError("a change did not make one revision")
        if dice.random() < 0.5:
            await state.flush()
            say(f"ACK {model.revision}")
        else:
            await asyncio.sleep(0.001)
    await state.flush()
    say(f"ACK {model.revision}")
    say(f"REST {model.revision}")
    await asyncio.Event().wait()


def main() -> None:
    directory = sys.argv[1]
    logging.disable()
    for line in sys.stdin:
        cycle, changes, url = line.split()
        pid = os.fork()
        if pid == 0:
            say(f"PID {os.getpid()}")
            asyncio.run(live(directory, int(cycle), int(changes), url))
        _, status = os.waitpid(pid, 0)
        say(f"DEAD {-signal.SIGKILL if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else status}")


if __name__ == "__main__":
    main()
