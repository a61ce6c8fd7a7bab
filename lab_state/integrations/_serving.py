"""What the web frameworks share: managers by name, started and stopped together, found and looked after."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec

from lab_state.exceptions import LockedError
from lab_state.manager import Manager

KEY = "lab_state"
"""Where a framework's own state holds the managers."""

_OTHER_WORKER = "if that is another worker of this server, run it with one worker (see `Workers` in the documentation)"


def by_name(managers: Iterable[Manager]) -> dict[str, Manager]:
    """The managers by their names.

    Raises:
        TypeError: One of them is not a manager.
        ValueError: There is none, or two have the same name.
    """
    named: dict[str, Manager] = {}
    for manager in managers:
        if not isinstance(manager, Manager):
            raise TypeError(f"a lab_state.Manager was expected, not {manager!r}")
        add(named, manager)
    if not named:
        raise ValueError("give the managers that the application uses, one or more")
    return named


def add(named: dict[str, Manager], manager: Manager) -> None:
    """Add a manager.

    Raises:
        ValueError: There is one of the same name.
    """
    name = manager.config.name
    if name in named:
        raise ValueError(f"two managers are named {name!r}; in one application each needs a name of its own")
    named[name] = manager


@asynccontextmanager
async def running(managers: Iterable[Manager]) -> AsyncGenerator[None]:
    """Start the managers in order, and stop those that were started in reverse order, whatever happens.

    Starting and stopping may happen in different tasks.
    """
    async with AsyncExitStack() as stack:
        for manager in managers:
            try:
                await stack.enter_async_context(manager)
            except LockedError as error:
                error.args = (f"{error}; {_OTHER_WORKER}",)  # in one line: the last one of a traceback
                raise
        yield


class LastWord(logging.Filter):
    """Lets uvicorn's last line say why it exits; the line itself comes after the traceback, and does not.

    It changes that one line, once. Where there is no uvicorn, nothing is logged there.
    """

    _LOGGER = logging.getLogger("uvicorn.error")
    _LINE = "Application startup failed"

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._reason = f"{type(error).__name__}: {error}"

    def filter(self, record: logging.LogRecord) -> bool:
        """Complete the line."""
        if isinstance(record.msg, str) and record.msg.startswith(self._LINE):
            record.msg, record.args = f"{record.getMessage()} {self._reason}", ()
            self._LOGGER.removeFilter(self)
        return True

    @classmethod
    @asynccontextmanager
    async def told(cls, managers: Iterable[Manager]) -> AsyncGenerator[None]:
        """`running`, for a server that is likely to be uvicorn."""
        started = False
        for old in [known for known in cls._LOGGER.filters if isinstance(known, cls)]:
            cls._LOGGER.removeFilter(old)  # of an attempt that something else reported
        try:
            async with running(managers):
                started = True
                yield
        except BaseException as error:
            if not started:
                cls._LOGGER.addFilter(cls(error))
            raise


def choose(managers: Mapping[str, Manager] | None, name: str | None) -> Manager:
    """The manager of that name; the only one, without a name.

    Raises:
        LookupError: There is none, or no name was given and there are several.
    """
    if not managers:
        raise LookupError(
            "this application has no lab_state managers: give them to it, and see that the server runs its startup"
        )
    if name is None and len(managers) == 1:
        return next(iter(managers.values()))
    if name is None or name not in managers:
        asked = "a name is needed" if name is None else f"there is no manager {name!r}"
        raise LookupError(f"{asked}; this application has {', '.join(map(repr, managers))}")
    return managers[name]


def check_bound(seconds: float | None) -> float:
    """A bound for `health_of`; infinity for `None`.

    Raises:
        ValueError: It is not above 0.
        TypeError: It is not a number.
    """
    if seconds is None:
        return math.inf
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"max_unflushed_age must be a number of seconds or None, not {type(seconds).__name__}")
    if not seconds > 0:
        raise ValueError("max_unflushed_age must be above 0 seconds")
    return seconds


def health_of(managers: Mapping[str, Manager] | None, bound: float) -> tuple[int, bytes]:
    """An HTTP status and a JSON body: 200, or 503 where a manager does not run or cannot write.

    Args:
        managers: The managers, by name.
        bound: How old a change may be that is not durable, in seconds.
    """
    found = {name: manager.status() for name, manager in (managers or {}).items()}
    problems = [] if found else ["no manager was started"]
    for name, status in found.items():
        if status.phase != "running":
            problems.append(f"{name} is {status.phase}")
        elif status.fenced:
            problems.append(f"{name} is fenced: a newer writer owns it")
        elif status.unflushed_age > bound:
            problems.append(f"{name} has had changes that are not durable for {status.unflushed_age:.1f} s")
    body: dict[str, Any] = {"healthy": not problems, "problems": problems, "managers": found}
    return 503 if problems else 200, msgspec.json.encode(body)
