"""Run a subcommand on an event loop, and end with the exit code for its outcome."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec

from lab_state.cli._exits import INTERRUPTED, UNAVAILABLE, Stop, code_of, message_of
from lab_state.cli._output import Output, note
from lab_state.exceptions import LabStateError

P = ParamSpec("P")

PROGRAM = "lab-state"

_LOGGER = logging.getLogger("lab_state")


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
            _interrupt_at_once()
        log = _Log()
        _LOGGER.addHandler(log)
        try:
            asyncio.run(_finished(output, function(output, *args, **kwargs)))
            log.tell_errors()
        except KeyboardInterrupt:
            raise Stop(INTERRUPTED) from None
        except (LabStateError, ValueError, ImportError) as error:
            raise Stop(code_of(error), message_of(error)) from error
        except OSError as error:
            raise Stop(UNAVAILABLE, str(error)) from error
        finally:
            _LOGGER.removeHandler(log)

    return run


class _Log(logging.Handler):
    """The log of the library as lines on stderr. If a subcommand fails, the errors that led to its message are left out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Write a warning, and keep an error."""
        if record.levelno < logging.ERROR:
            note(f"{PROGRAM}: {record.getMessage()}")
        else:
            self._errors.append(record.getMessage())

    def tell_errors(self) -> None:
        """Write the errors of a subcommand that has succeeded in spite of them."""
        for text in self._errors:
            note(f"{PROGRAM}: {text}")


def _interrupt_at_once() -> Any:
    """Let Ctrl-C raise `KeyboardInterrupt` at once, and return the previous handler. A process that ignores Ctrl-C continues to ignore it."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    return before


def _interrupt(_number: int, _frame: object) -> None:
    """Raise the exception of Ctrl-C, as Python's default handler does. asyncio replaces the default handler, but not this one."""
    raise KeyboardInterrupt


def read_input() -> bytes:
    """Return all of stdin. Ctrl-C ends the wait at once."""
    before = _interrupt_at_once()
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
