"""What `test_kill.py` kills: a process that changes a state and says what it tries and what is acknowledged.

Run as a script it is the zygote: it has imported the package once, and forks a child
for each line `<cycle> <seed>` on its standard input. The child opens the state, says
what it found, and makes changes until it is killed. Each of its lines is one write to
the pipe, so none is torn, and all come before the zygote's `DEAD`:

    PID <pid>               the child is there
    AT <revision> <digest>  it has started, and this is what it found
    TRY <revision>          the change that makes this revision follows
    ACK <revision>          every change up to this one is durable, says lab_state
    DEAD <wait status>      the child has ended

The test imports the module for `Model`, which knows what each change does.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import zlib
from typing import Any, NamedTuple

import msgspec

from lab_state import Config, FileStorage, Manager

NAME = "state"
_LARGE, _STAYING, _GOING = 200_000, 400, 30


class Change(NamedTuple):
    """One mutating call, which makes one revision."""

    call: str
    keys: tuple[str, ...]
    values: dict[str, Any]


class Model:
    """What the state must be: a pure function of the cycles' changes, one revision each.

    A change is a function of its cycle and its revision, and of the state before it. Its
    values name both, so a change of an earlier cycle that comes back from the dead shows.
    """

    def __init__(self, entries: dict[str, Any], revision: int) -> None:
        self.entries = entries
        self.revision = revision

    def digest(self) -> str:
        return digest(self.entries)

    def next(self, cycle: int) -> Change:
        """Make the next change, and return it."""
        revision = self.revision + 1
        change = self._choose(random.Random(cycle * 1_000_003 + revision), cycle, revision)
        for key in change.keys:
            del self.entries[key]
        self.entries.update(change.values)
        self.revision = revision
        return change

    def _choose(self, dice: random.Random, cycle: int, revision: int) -> Change:
        value = {"cycle": cycle, "revision": revision}
        going = tuple(key for key in self.entries if key.startswith("going/"))
        draw = dice.random()
        if self.entries and draw < 0.2:
            change = Change("delete", (dice.choice(sorted(self.entries)),), {})
        elif going and draw < 0.23:
            change = Change("delete_all going/", going, {})
        elif self.entries and draw < 0.232:
            change = Change("delete_all", tuple(self.entries), {})
        elif draw < 0.4:
            keys = [f"staying/{dice.randrange(_STAYING)}" for _ in range(dice.randrange(1, 12))]
            change = Change("set_many", (), dict.fromkeys(keys, value))
        elif draw < 0.43:
            large = f"{cycle} {revision} " + "x" * dice.randrange(_LARGE)
            change = Change("set", (), {f"large/{dice.randrange(4)}": large})
        elif draw < 0.7:
            change = Change("set", (), {f"going/{dice.randrange(_GOING)}": value})
        else:
            change = Change("set", (), {f"staying/{dice.randrange(_STAYING)}": revision})
        return change


def digest(entries: dict[str, Any]) -> str:
    return f"{zlib.crc32(msgspec.json.encode(dict(sorted(entries.items())))):08x}-{len(entries)}"


async def make(state: Manager, change: Change) -> None:
    call, keys, values = change
    if call == "delete":
        await state.delete(keys[0])
    elif call == "delete_all going/":
        await state.delete_all("going/")
    elif call == "delete_all":
        await state.delete_all()
    elif call == "set_many":
        await state.set_many(values)
    else:
        for key, value in values.items():
            await state.set(key, value)


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


async def live(directory: str, cycle: int, dice: random.Random) -> None:
    """Change the state for ever, in groups of one size or another, in one of the two ways to be durable."""
    each = dice.random() < 0.5
    config = Config(name=NAME, flush_interval=0 if each else None)
    state = Manager(config, FileStorage(directory))
    await state.start()
    model = Model(await state.get_all(), state.revision)
    say(f"AT {model.revision} {model.digest()}")
    while True:
        changes = []
        for _ in range(dice.choice((1, 1, 2, 5, 20))):
            changes.append(model.next(cycle))
            say(f"TRY {model.revision}")
        if each:  # tasks begin in this order, and share writes
            await asyncio.gather(*(make(state, change) for change in changes))
        else:
            for change in changes:
                await make(state, change)
            await state.flush()
        if state.revision != model.revision:
            raise RuntimeError("a change did not make one revision")
        say(f"ACK {model.revision}")
        if dice.random() < 0.01:
            await state.stop()
            await state.start()


def main() -> None:
    directory = sys.argv[1]
    for line in sys.stdin:
        cycle, seed = map(int, line.split())
        pid = os.fork()
        if pid == 0:
            say(f"PID {os.getpid()}")
            asyncio.run(live(directory, cycle, random.Random(seed)))
        _, status = os.waitpid(pid, 0)
        say(f"DEAD {-signal.SIGKILL if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else status}")


if __name__ == "__main__":
    main()
