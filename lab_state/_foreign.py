"""Calls of foreign code, from a task that must not end when such a call fails.

Foreign code is a storage, or a function of the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from lab_state._log import Log
from lab_state.exceptions import FencedError, StorageError, UnavailableError

R = TypeVar("R")


async def only_storage_errors(call: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """Await a call of a storage. Turn each of its errors into a `StorageError`.

    Three exceptions pass unchanged: a cancellation of the present task, an interrupt (`KeyboardInterrupt`
    or `SystemExit`), and the `GeneratorExit` of a closed event loop.
    """
    try:
        return await call()
    except asyncio.CancelledError as error:
        if is_cancelled():
            raise
        raise storage_error(error, ", which no storage should raise") from error  # a cancellation inside the storage
    except Exception as error:
        if (told := storage_error(error, ", which no storage should raise")) is error:
            raise
        raise told from error


def is_cancelled() -> bool:
    """Return whether the present task was cancelled. If not, a `CancelledError` comes from the call that the task awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def storage_error(problem: BaseException, blame: str = "") -> StorageError:
    """Return the problem if it is a `StorageError` whose `str()` works. Otherwise return an `UnavailableError` with the problem as its cause.

    `blame` is added to the message of the new error, after the class of the problem.
    """
    if isinstance(problem, StorageError):
        with contextlib.suppress(Exception):
            str(problem)
            return problem
    error = UnavailableError(f"the storage call ended with {type(problem).__name__}{blame}")
    error.__cause__ = problem
    return error


def described(problem: BaseException) -> str:
    """Return a text with the class of a foreign error, and the place where it was raised, if that is known.

    The text of the error is left out, because it may contain a value or a credential.
    """
    name, trace = type(problem).__name__, problem.__traceback__
    if trace is None:
        return name
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return f"{name} at {code.co_filename}:{trace.tb_lineno}, in {code.co_name}"


def pass_on(interrupt: BaseException) -> NoReturn:
    """Raise an interrupt. This is for a callback of the event loop, because the interrupt then ends the loop."""
    raise interrupt


def check_on_fenced(on_fenced: object) -> None:
    """Check that `on_fenced` is a plain function: it can be called, and is not async.

    Raises:
        TypeError: `on_fenced` is not a plain function.
    """
    if not callable(on_fenced):
        raise TypeError(f"on_fenced must be a function of one argument, the error; not {type(on_fenced).__name__}")
    if inspect.iscoroutinefunction(on_fenced) or inspect.iscoroutinefunction(getattr(on_fenced, "__call__", None)):  # noqa: B004 -- asks whether the call is async
        raise TypeError("on_fenced must be a plain function, not async: nothing would await it")


def tell_fenced(on_fenced: Callable[[FencedError], object], error: FencedError, name: str, logger: Log) -> None:
    """Call `on_fenced`, a function of the application. Log an error of the function, or a returned coroutine."""
    try:
        result = on_fenced(error)
    except Exception as problem:  # noqa: BLE001 -- every error of the function is logged
        logger.error("%s: on_fenced failed: %s", name, described(problem))  # noqa: TRY400 -- one line
        return
    if inspect.iscoroutine(result):
        result.close()
        logger.error("%s: on_fenced returned a coroutine, which nothing awaits: pass a plain function", name)
