"""Calls that an owner has executed, and their answers. This module does no I/O."""

from __future__ import annotations

from typing import Generic, Literal, NamedTuple, TypeVar, cast

from msgspec import Raw

from lab_state.exceptions import InvalidValueError, TypeMismatchError
from lab_state.shared._messages import Answer, Ok, Raised

R = TypeVar("R")


class Executed(Generic[R]):
    """A call that was executed on the layer.

    Attributes:
        at: The revision of the layer after the call. The answer waits until this revision is durable.
        changed: Whether the call changed something.
        revision: The revision of the answer. If the call changed something, this is 0 at first. `Engine.landed` sets it for the
            calls of the owner's tasks. For a call of a client, `Waiting.answer` gets the revision instead.
        error: The error that the call raised; `None` if it returned.
    """

    __slots__ = ("_result", "at", "changed", "error", "revision")

    def __init__(self, at: int, result: R | None, error: Exception | None = None, *, changed: bool) -> None:
        self.at: int = at
        self.changed: bool = changed
        self.revision: int = 0 if changed else at
        self.error: Exception | None = error
        self._result = result

    @property
    def result(self) -> R:
        """The result of the call.

        Raises:
            Exception: The call raised this error.
        """
        if self.error is not None:
            raise self.error
        return cast("R", self._result)


class Waiting(NamedTuple):
    """A call of a client that was executed, but is not answered yet."""

    number: int
    executed: Executed[bytes]

    def answer(self, end: int) -> Answer:
        """Return the answer. `end` is the revision at which the record of the call ends."""
        executed = self.executed
        revision = end if executed.changed else executed.at
        if (error := executed.error) is None:
            return Ok(self.number, revision, Raw(executed.result))
        assert isinstance(error, TypeMismatchError | InvalidValueError)
        kind: Literal["TypeMismatchError", "InvalidValueError"] = (
            "TypeMismatchError" if isinstance(error, TypeMismatchError) else "InvalidValueError"
        )
        return Raised(self.number, revision, kind, error.args[0], error.path)
