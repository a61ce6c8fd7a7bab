"""Programs that the tests of `FileStorage` run in another process: a kill, a limit, another user, a fork.

`python file_child.py <command> <directory>` prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from lab_state import Config, FileStorage, Manager, StorageError, StorageSession

NOBODY = 65534


def manager(directory: str) -> Manager:
    return Manager(Config(name="lab", flush_interval=None), FileStorage(directory))


def say(**report: object) -> None:
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()


def serve(directory: str) -> None:
    """Make five changes that are flushed, and one that is not flushed. Then wait to be killed."""

    async def main() -> None:
        state = manager(directory)
        await state.start()
        for number in range(5):
            await state.set(f"key-{number}", number)
            await state.flush()
        await state.set("never-flushed", value=True)
        say(pid=os.getpid())
        await asyncio.Event().wait()

    asyncio.run(main())


def limited(directory: str) -> None:
    """Reach a real limit of the file size in the middle of a frame, three times. Then raise the limit, flush, and wait to be killed."""

    async def main() -> None:
        journal = Path(directory) / "lab.journal"
        state = manager(directory)
        await state.start()
        await state.set("before", "x" * 1000)
        await state.flush()
        size, acknowledged = journal.stat().st_size, journal.read_bytes()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
        failures = []
        for number in range(3):
            await state.set(f"full-{number}", "y" * 1000)
            try:
                await state.flush()
            except StorageError as error:
                failures.append(type(error).__name__)
        untouched = journal.read_bytes() == acknowledged
        inode = journal.stat().st_ino
        memory = sorted(await state.keys())
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        await state.flush()
        say(
            failures=failures,
            untouched=untouched,
            memory=memory,
            appended=journal.stat().st_ino == inode,
            durable=state.durable_revision == state.revision,
        )
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main())


def refused(directory: str) -> None:
    """Try to start as a user without permissions on the directory. If this process runs as root, change to such a user first."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        asyncio.run(manager(directory).start())
    except Exception as error:  # noqa: BLE001 -- the test looks at the class
        say(error=type(error).__name__, message=str(error))
    else:
        say(error=None, message="")
    os._exit(0)  # functions that run at exit must not write here


def forked(directory: str) -> None:
    """Fork while a manager runs. The child uses the session that it inherited."""
    with asyncio.Runner() as runner:
        state = manager(directory)
        runner.run(state.start())
        runner.run(state.set("parent", 1))
        runner.run(state.flush())
        flusher = state._flusher
        assert flusher is not None
        session = flusher._session
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writing, json.dumps(_attempts(session)).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        attempts = json.loads(os.read(reading, 10_000))
        runner.run(state.set("parent", 2))
        runner.run(state.flush())
        runner.run(state.stop())
    say(**attempts)


def _attempts(session: StorageSession) -> dict[str, list[str]]:
    async def slices() -> AsyncIterator[bytes]:
        yield b"{}"

    async def commit() -> None:
        async with asyncio.timeout(2):
            await session.commit(b"{}", slices)

    async def checkpoint() -> None:
        async with asyncio.timeout(2):
            await session.checkpoint(slices)

    answers = {}
    for attempt in (commit, checkpoint):
        try:
            asyncio.run(attempt())
        except Exception as error:  # noqa: BLE001 -- the test looks at the class
            answers[attempt.__name__] = [type(error).__name__, str(error)]
        else:
            answers[attempt.__name__] = ["nothing was raised", ""]
    return answers


def inherited(directory: str) -> None:
    """Fork while a manager runs. The child uses that manager, in the event loop that it inherited."""
    with asyncio.Runner() as runner:
        state = manager(directory)
        runner.run(state.start())
        runner.run(state.set("parent", 1))
        runner.run(state.flush())
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            answers = {}
            for name, call in (
                ("set", lambda: state.set("child", 1)),
                ("flush", state.flush),
                ("stop", state.stop),
                ("start", state.start),
            ):
                try:
                    runner.run(call())
                except Exception as error:  # noqa: BLE001 -- the test looks at the class
                    answers[name] = [type(error).__name__, str(error)]
                else:
                    answers[name] = ["nothing was raised", ""]
            os.write(writing, json.dumps(answers).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        answers = json.loads(os.read(reading, 10_000))
        runner.run(state.set("parent", 2))
        runner.run(state.flush())
        status = state.status()
        runner.run(state.stop())
    say(**answers, parent=[status.durable_revision, status.flush_failures])


def outlived(directory: str) -> None:
    """Fork a child that does nothing and does not end. Then stop the manager, and start it again."""
    with asyncio.Runner() as runner:
        state = manager(directory)
        runner.run(state.start())
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        runner.run(state.stop())
        try:
            runner.run(state.start())
        except StorageError as error:
            say(error=type(error).__name__, message=str(error))
        else:
            runner.run(state.stop())
            say(error=None, message="")
        os.close(writing)
        os.waitpid(pid, 0)


COMMANDS: dict[str, Callable[[str], None]] = {
    command.__name__: command for command in (serve, limited, refused, forked, inherited, outlived)
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](sys.argv[2])
