"""The functions that all integrations of web frameworks share.

They start and stop managers and readers with the application, find them by name, and report their
health.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Self, TypeAlias, TypeVar

import msgspec

from lab_state._argument_types import kind_of
from lab_state._status import Status
from lab_state.cache import Reader
from lab_state.exceptions import LockedError
from lab_state.integrations._live import ServerStop
from lab_state.manager import Manager

Served: TypeAlias = Manager | Reader
S = TypeVar("S", bound=Manager | Reader)

KEY = "lab_state"
"""The name of the item with the managers and readers, in the `state` of an application or a request."""


class Named(Mapping[str, Served]):
    """Managers and readers by name, read-only.

    A framework may copy the objects in its state, even with `deepcopy`, before it passes them
    to a handler. `copy` and `deepcopy` return this object itself, because a manager cannot be copied.
    """

    def __init__(self, named: Mapping[str, Served]) -> None:
        self._named = dict(named)
        self._stop: ServerStop | None = None

    @property
    def stop(self) -> ServerStop | None:
        """The event that ends the streams when the server stops; `None` while no lifespan runs."""
        return self._stop

    @contextmanager
    def accepting_streams(self) -> Generator[None]:
        """Accept new streams during the block. At its end, set the event that ends the open streams."""
        self._stop = ServerStop()
        try:
            yield
        finally:
            self._stop.close()
            self._stop = None

    def __getitem__(self, name: str) -> Served:
        return self._named[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def __repr__(self) -> str:
        return repr(self._named)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self


_REMEDY = (
    "pass the managers and readers to the integration of the application, and make sure that the server runs the application's startup; "
    "a test client runs it at the start of its block (`with TestClient(app) as client`)"
)
NO_LIFESPAN = f"the application's lifespan does not run: {_REMEDY}"
_OTHER_WORKER = "if another worker of this server holds the lock, see docs/workers.md"


def by_name(served: Iterable[S], kinds: tuple[type[Any], ...] = (Manager, Reader)) -> dict[str, S]:
    """Return a dict of managers, readers or both. The keys are their names.

    Raises:
        TypeError: An object is not of one of the `kinds`.
        ValueError: There is no object, or two have the same name.
    """
    named: dict[str, S] = {}
    for one in served:
        if not isinstance(one, kinds):
            expected = " or ".join(f"a lab_state.{kind.__name__}" for kind in kinds)
            raise TypeError(f"{expected} was expected, not {kind_of(one)}")
        add(named, one)
    if not named:
        raise ValueError(f"no {' or '.join(map(_plural, kinds))} were given: pass one or more")
    return named


def add(named: dict[str, S], one: S) -> None:
    """Add a manager or a reader.

    Raises:
        ValueError: Another one has the same name.
    """
    name = one.config.name if isinstance(one, Manager) else one.name
    if name in named:
        raise ValueError(
            f"two managers or readers have the name {name!r}: give each of them in one application a different name"
        )
    named[name] = one


@asynccontextmanager
async def running(served: Iterable[Served]) -> AsyncGenerator[None]:
    """Start managers and readers in order. At the end, and after an error, stop the started ones, in reverse order.

    The start and the stop may run in different tasks. Advice for a server with several workers is added
    to the message of a `LockedError`.
    """
    async with AsyncExitStack() as stack:
        for one in served:
            try:
                await stack.enter_async_context(one)
            except LockedError as error:
                # The message is one line, so that the last line of the traceback has all of it.
                error.args = (f"{error}; {_OTHER_WORKER}",)
                raise
        yield


@asynccontextmanager
async def serving(served: Named) -> AsyncGenerator[None]:
    """Run managers and readers as `running` does, and accept streams meanwhile."""
    async with running(served.values()):
        with served.accepting_streams():
            yield


def choose(served: Mapping[str, Served] | None, kind: type[S], name: str | None) -> S:
    """Return the manager or reader with a name. If no name is given, return the only one.

    Raises:
        LookupError: There is no such manager or reader. Or there are several, and no name was given.
    """
    found = {known: one for known, one in (served or {}).items() if isinstance(one, kind)}
    if not found:
        raise LookupError(f"this application has no lab_state {_plural(kind)}: {_REMEDY}")
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name is None or name not in found:
        asked = "a name is needed" if name is None else f"there is no {kind.__name__.lower()} {name!r}"
        raise LookupError(f"{asked}; this application has {', '.join(map(repr, found))}")
    return found[name]


def stop_of(served: Mapping[str, Served] | None) -> ServerStop:
    """Return the event that ends a stream when the server stops. After this call, a signal that stops the server sets this event; see `ServerStop.listen`.

    Raises:
        LookupError: The application's lifespan does not run.
    """
    stop = served.stop if isinstance(served, Named) else None
    if stop is None:
        raise LookupError(NO_LIFESPAN)
    stop.listen()
    return stop


def _plural(kind: type[Any]) -> str:
    return f"{kind.__name__.lower()}s"


def check_bound(seconds: float | None) -> float:
    """Return `max_unflushed_age` as the bound for `health_of`. `None` becomes infinity.

    Raises:
        ValueError: The bound is not above 0.
        TypeError: The bound is not a number.
    """
    if seconds is None:
        return math.inf
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"max_unflushed_age must be a number of seconds or None, not {type(seconds).__name__}")
    if not seconds > 0:
        raise ValueError("max_unflushed_age must be above 0 seconds")
    return seconds


def health_of(served: Mapping[str, Served] | None, bound: float) -> tuple[int, bytes]:
    """Return the HTTP status and the JSON body of a health response.

    The status is 503 if a manager does not run or cannot write, if one of its background tasks has ended too early,
    if it has an old change that is not durable, if a reader is not up, or if there is neither a manager nor a reader.
    Otherwise the status is 200. A manager of a shared state cannot write if there was no sign of life of the owner
    for its `owner_timeout`.

    Args:
        served: The managers and readers, by name.
        bound: The highest age of a change that is not durable, in seconds.
    """
    problems = [] if served else ["no manager was started"]
    managers: dict[str, Status] = {}
    readers: dict[str, dict[str, bool]] = {}
    for name, one in (served or {}).items():
        if isinstance(one, Reader):
            readers[name] = {"up": one.up}
            problem = None if one.up else "receives no changes: there is no mirror, or it cannot be reached"
        else:
            status = one.status()
            managers[name] = status
            problem = _problem(status, bound, one.config.owner_timeout)
        if problem is not None:
            problems.append(f"{name} {problem}")
    body: dict[str, Any] = {"healthy": not problems, "problems": problems, "managers": managers, "readers": readers}
    return 503 if problems else 200, msgspec.json.encode(body)


def _problem(status: Status, bound: float, owner_timeout: float) -> str | None:
    if status.phase != "running":
        return f"is {status.phase}"
    if status.fenced:
        return "is fenced: a newer writer owns the state; end this process"
    if status.task_failure is not None:
        return f"has a background task that ended too early: {status.task_failure}"
    if status.unflushed_age > bound:
        return f"has a change that is {status.unflushed_age:.1f} s old and not durable"
    if status.lag >= owner_timeout:
        return f"has had no sign of life of an owner for {status.lag:.1f} s: writes fail, and reads return values as old as that"
    return None
