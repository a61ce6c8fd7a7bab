"""The demo: real servers, real text over HTTP, real SIGKILL.

Everything happens on the loopback interface and in a temporary directory. The directory is kept, so that its files can
be looked at. After Ctrl-C it is removed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path

import act_kill
import act_workers
import httpx2 as httpx
from lines import lines
from screen import Screen
from servers import DemoError

LINES = 2400  # in six seconds
RATE = 400.0
KILLS = 8  # about a second each
MOST_KILLS = 1000
FEWEST = 100  # enough for each client to send some before the kill
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Run the demo. Return its exit status: 0, or 1 if it failed, or 128 and the number of the signal that ended it."""
    options = parsed()
    try:
        return asyncio.run(run(options))
    except KeyboardInterrupt:  # between the end of the loop, with its handlers, and the next line
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def parsed() -> argparse.Namespace:
    """Return the options. Wrong ones end the process with a message."""
    parser = argparse.ArgumentParser("demo", description="Kill servers in the middle of a load, and see what is lost.")
    parser.add_argument(
        "--act", type=int, choices=(1, 2), help="run one act: 1 kills two servers, 2 kills workers that share a state"
    )
    parser.add_argument(
        "--lines", type=int, default=LINES, help="how many lines each server of act 1 gets (%(default)s)"
    )
    parser.add_argument("--kills", type=int, default=KILLS, help="how many owners act 2 kills (%(default)s)")
    parser.add_argument("--rate", type=float, default=RATE, help="lines a second for each server (%(default)s)")
    options = parser.parse_args()
    most = len(lines())
    if not FEWEST <= options.lines <= most:
        parser.error(f"--lines {options.lines}: give a number from {FEWEST} to {most}, as many as the pages have")
    if not 1 <= options.kills <= MOST_KILLS:
        parser.error(f"--kills {options.kills}: give a number from 1 to {MOST_KILLS:,}")
    if not 1 <= options.rate <= 1e6:  # noqa: PLR2004
        parser.error(f"--rate {options.rate}: give a number from 1 to 1,000,000")
    return options


async def run(options: argparse.Namespace) -> int:
    """Run the acts in a new directory. Return the exit status, after a message that says how it ended."""
    began = time.monotonic()
    signals = cancelled_by_signals()
    directory = Path(tempfile.mkdtemp(prefix="lab_state-demo-"))
    failure = None
    with contextlib.suppress(asyncio.CancelledError):
        failure = await failure_of(acts(directory, options))
    if signals:  # if the signal came during the start of a server, there may be a failure, too
        shutil.rmtree(directory)
        print("Interrupted. The servers have ended, and their files are removed.", file=sys.stderr)
        return 128 + signals[0]
    if failure is not None:
        print(f"The demo failed: {failure}\nThe files and logs are in {directory}", file=sys.stderr)
        return 1
    print(f"This took {time.monotonic() - began:.1f} s. The files stay in {directory}")
    return 0


def cancelled_by_signals() -> list[int]:
    """Let Ctrl-C, SIGTERM and the end of the terminal cancel this task. Return a list that will have their numbers."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    signals: list[int] = []

    def cancel(number: int) -> None:
        signals.append(number)
        task.cancel()

    for number in STOPS:
        loop.add_signal_handler(number, cancel, number)
    return signals


async def acts(directory: Path, options: argparse.Namespace) -> None:
    """Run both acts, or one of them."""
    if options.act != 2:  # noqa: PLR2004
        await act_kill.run(directory, lines()[: options.lines], options.rate)
    if options.act is None:
        Screen().say("")
    if options.act != 1:
        await act_workers.run(directory, lines(), options.rate, options.kills)


async def failure_of(act: Awaitable[None]) -> str | None:
    """Await an act. Return why it failed, or `None`."""
    failure = None
    try:
        await act
    except* (DemoError, httpx.HTTPError) as errors:
        failure = str(first(errors))
    return failure


def first(error: BaseException) -> BaseException:
    """Return the first error of a group of groups."""
    return first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
