"""What `test_storm.py` kills: a process in which hundreds of tasks write, and are cancelled at random.

A zygote like `worker.py`'s, with other lines. Nothing that a task wrote in an earlier
life is in its way: keys name the life and the task.

    AT <revision>                       it has started; what it found is in the file `found`, as JSON
    TRY <task> <call>                   the task begins
    ACK <task> <call> <revision>        its call returned
    GONE <task> <call>                  it was cancelled before its call returned
    LOST <reason>                       something is wrong in this very life
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

import msgspec

from lab_state import Config, FileStorage, Manager
from lab_state.storage import _file_writer

NAME = "storm"
FOUND = "found"
TASKS = 200
CALLS = ("set", "incr", "transaction", "update", "flush", "wait")
_MIN_CHECKPOINT_BYTES = 20_000


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


class Storm:
    """One life."""

    def __init__(self, state: Manager, cycle: int, dice: random.Random) -> None:
        self._state = state
        self._cycle = cycle
        self._dice = dice
        self._number = 0
        self._durable = self._revision = 0

    async def blow(self) -> None:
        """Run until the process is killed."""
        tasks: set[asyncio.Task[None]] = set()
        while True:
            while len(tasks) < TASKS:
                self._number += 1
                task = asyncio.create_task(self._one(f"{self._cycle}-{self._number}", self._dice.choice(CALLS)))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            for task in self._dice.sample(sorted(tasks, key=id), self._dice.randrange(TASKS // 4)):
                task.cancel()
            for _ in range(self._dice.randrange(4)):
                await asyncio.sleep(0)
                self._look()

    def _look(self) -> None:
        revision, durable = self._state.revision, self._state.durable_revision
        if revision < self._revision or durable < self._durable or durable > revision:
            say(f"LOST {self._revision}->{revision} {self._durable}->{durable}")
        self._revision, self._durable = revision, durable

    async def _one(self, task: str, call: str) -> None:
        say(f"TRY {task} {call}")
        try:
            revision = await self._call(task, call)
        except asyncio.CancelledError:
            say(f"GONE {task} {call}")
        except Exception as error:  # noqa: BLE001 -- there is none that is right here
            say(f"LOST {task} {call} {error!r}")
        else:
            if self._state.durable_revision < revision:
                say(f"LOST {task} {call} returned before it was durable")
            say(f"ACK {task} {call} {revision}")

    async def _call(self, task: str, call: str) -> int:
        """Make a call, and return the revision that is durable now."""
        state = self._state
        if call == "set":
            return await state.set(f"set/{task}", task)
        if call == "incr":
            await state.incr("count")
            await state.set(f"incr/{task}", task)
        elif call == "transaction":
            async with state.transaction() as tx:
                await asyncio.sleep(0)
                tx.set(f"left/{task}", task)
                await asyncio.sleep(0)
                tx.set(f"right/{task}", task)
        elif call == "update":
            await state.update("last", lambda _: task, default="")
        else:
            seen = state.revision
            await (state.flush() if call == "flush" else state.wait_durable(seen))
            return seen
        return 0


async def live(directory: str, cycle: int, dice: random.Random) -> None:
    _file_writer._MIN_CHECKPOINT_BYTES = _MIN_CHECKPOINT_BYTES
    state = Manager(Config(name=NAME, flush_interval=0), FileStorage(directory))
    await state.start()
    everything = msgspec.json.encode(await state.get_all())
    Path(directory, FOUND).write_bytes(everything)  # a line of that length would be torn by a kill
    say(f"AT {state.revision}")
    await Storm(state, cycle, dice).blow()


def main() -> None:
    directory = sys.argv[1]
    for line in sys.stdin:
        cycle, seed = map(int, line.split())
        pid = os.fork()
        if pid == 0:
            say(f"PID {os.getpid()}")
            asyncio.run(live(directory, cycle, random.Random(seed)))
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        say(f"DEAD {-signal.SIGKILL if killed else status}")


if __name__ == "__main__":
    main()
