"""Run a subcommand on an event loop, and end with the exit code for its outcome."""

from __future__ import annotations

import asyncio
import functools
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec

from lab_state.cli._exits import BROKEN_PIPE, INTERRUPTED, UNAVAILABLE, Stop, code_of
from lab_state.cli._output import Output
from lab_state.exceptions import LabStateError

P = ParamSpec("P")


def asynchronous(
    function: Callable[Concatenate[Output, P], Coroutine[Any, Any, None]], *, writes: bool = False
) -> Callable[P, None]:
    """Return a function for click, which runs a coroutine function on an event loop of its own. The coroutine gets the output.

    Ctrl-C ends a reading subcommand at once. A subcommand that `writes` is cancelled, so it can complete a write that has begun.

    Raises:
        Stop: The subcommand ends with another exit code than 0.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        output = Output()
        if not writes:
            signal.signal(signal.SIGINT, _interrupt)
        try:
            asyncio.run(_finished(output, function(output, *args, **kwargs)))
        except BrokenPipeError:
            # Otherwise the interpreter would try to write the rest at its end, and print a warning.
            sys.stdout = None
            raise Stop(BROKEN_PIPE) from None
        except KeyboardInterrupt:
            raise Stop(INTERRUPTED) from None
        except (LabStateError, ValueError, ImportError) as error:
            raise Stop(code_of(error), str(error)) from error
        except OSError as error:
            raise Stop(UNAVAILABLE, str(error)) from error

    return run


def _interrupt(_number: int, _frame: object) -> None:
    """Raise the exception of Ctrl-C, as Python's default handler does. asyncio replaces the default handler, but not this one."""
    raise KeyboardInterrupt


def read_input() -> bytes:
    """Return all of stdin. Ctrl-C ends the wait at once."""
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        return sys.stdin.buffer.read()
    finally:
        signal.signal(signal.SIGINT, before)


async def _finished(output: Output, main: Coroutine[Any, Any, None]) -> None:
    """Await a coroutine, and write the rest of its output, even if it raises an error."""
    try:
        await main
    finally:
        output.flush()
