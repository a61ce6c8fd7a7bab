"""Run a subcommand on an event loop, and end with the exit code for its outcome."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec

from lab_state.cli._exits import BROKEN_PIPE, INTERRUPTED, UNAVAILABLE, Stop, code_of
from lab_state.cli._output import Output
from lab_state.exceptions import LabStateError

P = ParamSpec("P")


def asynchronous(
    function: Callable[Concatenate[Output, P], Coroutine[Any, Any, None]],
) -> Callable[P, None]:
    """Return a function for click, which runs a coroutine function on an event loop of its own. The coroutine gets the output.

    Raises:
        Stop: The subcommand ends with another exit code than 0.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        output = Output()
        try:
            asyncio.run(_finished(output, function(output, *args, **kwargs)))
        except BrokenPipeError:
            # Otherwise the interpreter would try to write the rest at its end, and print a warning.
            sys.stdout = None  # type: ignore[assignment]
            raise Stop(BROKEN_PIPE) from None
        except KeyboardInterrupt:
            raise Stop(INTERRUPTED) from None
        except (LabStateError, ValueError, ImportError) as error:
            raise Stop(code_of(error), str(error)) from error
        except OSError as error:
            raise Stop(UNAVAILABLE, str(error)) from error

    return run


async def _finished(output: Output, main: Coroutine[Any, Any, None]) -> None:
    """Await a coroutine, and write what is left of its output, also if it raises."""
    try:
        await main
    finally:
        output.flush()
