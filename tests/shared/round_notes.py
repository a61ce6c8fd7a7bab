"""What a process of a round writes down about the package, beside what its callers see. Only the worker uses it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from round_history import Durable
from round_points import wrap

from lab_state.shared._answers import Settled

_REVISIONS: ContextVar[list[int] | None] = ContextVar("revisions", default=None)
"""The revisions of the answers to the call of this task."""


def note_call() -> list[int]:
    """Begin a list of revisions for the call that this task makes next."""
    revisions: list[int] = []
    _REVISIONS.set(revisions)
    return revisions


def note_revisions() -> None:
    """Let each call of this process note the revision of its answer, also where the result does not have it."""

    def ending(original: Callable[..., Any]) -> Callable[..., Any]:
        async def ended(*args: Any, **kwargs: Any) -> Any:
            end = await original(*args, **kwargs)
            if isinstance(end, Settled):
                _note(end.revision)
            return end

        return ended

    def running(original: Callable[..., Any]) -> Callable[..., Any]:
        async def run(*args: Any, **kwargs: Any) -> Any:
            result, revision = await original(*args, **kwargs)
            _note(revision)
            return result, revision

        return run

    by_body: dict[int, int] = {}

    def making(original: Callable[..., Any]) -> Callable[..., Any]:
        async def made(self: Any, key: str, bodies: Any) -> Any:
            revisions = note_call()  # this task was made in the context of one of the callers
            outcomes = await original(self, key, bodies)
            if revisions:
                by_body.update((id(body.make), revisions[-1]) for body in bodies)
            return outcomes

        return made

    def asking(original: Callable[..., Any]) -> Callable[..., Any]:
        async def ask(self: Any, key: str, prefix: str, make: Any, made: float) -> Any:
            try:
                return await original(self, key, prefix, make, made)
            finally:
                if (revision := by_body.pop(id(make), None)) is not None:
                    _note(revision)

        return ask

    wrap("lab_state.shared._port", "SharedPort._ended", ending)
    wrap("lab_state.shared._owner_flusher", "OwnerFlusher.run", running)
    wrap("lab_state.shared._bodies", "Bodies._made", making)
    wrap("lab_state.shared._bodies", "Bodies.run", asking)


def _note(revision: int) -> None:
    if (revisions := _REVISIONS.get()) is not None:
        revisions.append(revision)


def note_states(saw: Callable[[], object]) -> None:
    """Call a function whenever the copy of this process has changed, in the same step."""

    def showing(original: Callable[..., Any]) -> Callable[..., Any]:
        def shown(*args: Any) -> Any:
            result = original(*args)
            saw()
            return result

        return shown

    wrap("lab_state.shared._copy", "SharedCopy.changed", showing)
    wrap("lab_state.shared._copy", "SharedCopy.replace", showing)


def note_durable(add: Callable[[Durable], object]) -> None:
    """Let an owner write down what it knows to be durable, before it shows it."""

    def landing(original: Callable[..., Any]) -> Callable[..., Any]:
        def succeeded(self: Any, *args: Any) -> Any:
            add(Durable(time.monotonic_ns(), self._record.end))
            return original(self, *args)

        return succeeded

    def finding(original: Callable[..., Any]) -> Callable[..., Any]:
        async def find(files: Any, copy: Any) -> Any:
            found = await original(files, copy)
            if not files.recovery.unsettled:
                start = copy if found.whole is None else found.whole
                add(Durable(time.monotonic_ns(), found.tail[-1].end if found.tail else start.revision))
            return found

        return find

    def settling(original: Callable[..., Any]) -> Callable[..., Any]:
        async def settle(session: Any, base: Any, tail: Any) -> None:
            await original(session, base, tail)
            add(Durable(time.monotonic_ns(), tail[-1].end if tail else base.revision))

        return settle

    wrap("lab_state.shared._owner_flusher", "OwnerFlusher._succeeded", landing)
    wrap("lab_state.shared._member", "find", finding)
    wrap("lab_state.shared._member", "settle", settling)
