"""Functions that fork the process of a test, and programs that fork and are then killed.

`python forked.py <command> <directory>` prints one line of JSON when it is ready to be killed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from lab_state import Config, FileStorage, Manager
from lab_state.storage import _fs


def fork() -> int:
    """Call `os.fork` in a process that has threads."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 and later warn, because the process has threads
        return os.fork()


async def in_child(function: Callable[[], Any]) -> Any:
    """Call a function in a forked child. Return its result, which is sent as JSON."""
    return await asyncio.to_thread(begin_in_child(function))


def begin_in_child(function: Callable[[], Any]) -> Callable[[], Any]:
    """Call a function in a forked child. Return a function that waits for the result."""
    reading, writing = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            answer = json.dumps(function())
        except BaseException:  # noqa: BLE001 -- the test reports it
            answer = json.dumps(traceback.format_exc())
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)

    def wait() -> Any:
        with os.fdopen(reading, "rb") as file:
            answer = file.read()
        os.waitpid(pid, 0)
        return json.loads(answer)

    return wait


def error_of(call: Callable[[], Any]) -> list[str]:
    """Return the class and the message of the error that a call raises before its first wait. The call may be a coroutine."""
    try:
        result = call()
        if isinstance(result, Coroutine):
            try:
                result.send(None)
            except StopIteration as stop:
                return ["returned", repr(stop.value)]
            return ["waits", ""]
    except Exception as error:  # noqa: BLE001 -- the test looks at the class
        return [type(error).__name__, str(error)]
    return ["returned", repr(result)]


def open_in(directory: str) -> list[str]:
    """Return the files of a directory that this process has open."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            path = descriptor.readlink()
        except FileNotFoundError:  # the descriptor of the directory listing itself
            continue
        if str(path).startswith(f"{directory}/"):
            found.append(path.name)
    return found


# Processes that are killed


def say(report: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()


def _sleep(writing: int | None = None) -> None:
    """Report that this process runs, and sleep until it is killed."""
    if writing is not None:
        os.write(writing, b"1")
    signal.pause()


def children(directory: str) -> None:
    """Fork in every possible way while a manager runs. The children do not end."""

    async def main() -> None:
        state = Manager(Config(name="lab", flush_interval=0), FileStorage(directory))
        await state.start()
        await state.set("a", 1)
        fork_context = multiprocessing.get_context("fork")
        reading, writing = os.pipe()
        pool = concurrent.futures.ProcessPoolExecutor(1, fork_context)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            (worker,) = {await asyncio.get_running_loop().run_in_executor(pool, os.getpid)}
            process = fork_context.Process(target=_sleep, args=(writing,))
            process.start()
        if (pid := fork()) == 0:
            _sleep(writing)
        for _ in range(2):  # both children run, and have closed the files that they inherited
            await asyncio.to_thread(os.read, reading, 1)
        say({"children": [worker, process.pid, pid]})
        await asyncio.Event().wait()

    asyncio.run(main())


def held(directory: str, function: str) -> None:
    """Fork while a thread of the storage is inside a function of `_fs`. Then continue. The child does not end."""
    entered, gate = threading.Event(), threading.Event()
    real = getattr(_fs, function)
    armed = function == "open_lock"

    def hold(*args: Any) -> Any:
        result = real(*args)
        if armed and not gate.is_set():
            entered.set()
            gate.wait()
        return result

    setattr(_fs, function, hold)

    async def main() -> None:
        nonlocal armed
        state = Manager(Config(name="lab", flush_interval=0), FileStorage(directory))
        work: asyncio.Task[Any] = asyncio.create_task(state.start())
        if function != "open_lock":
            await work
            await state.set("a", 1)
            armed = True
            value = 2 if function == "_sync_data" else "x" * 5 * 1024 * 1024  # a checkpoint is due
            work = asyncio.create_task(state.set("b", value))
        await asyncio.to_thread(entered.wait)
        reading, writing = os.pipe()
        if (pid := fork()) == 0:
            os.write(writing, json.dumps(open_in(directory)).encode())
            os.close(writing)
            _sleep()
        os.close(writing)
        with os.fdopen(reading) as file:
            inherited = await asyncio.to_thread(file.read)
        gate.set()
        await work
        await state.set("c", 3)
        say({"children": [pid], "inherited": json.loads(inherited)})
        await asyncio.Event().wait()

    asyncio.run(main())


if __name__ == "__main__":
    programs: dict[str, Callable[..., object]] = {"children": children, "held": held}
    programs[sys.argv[1]](*sys.argv[2:])
