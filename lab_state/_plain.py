"""`Plain`: calls of `Calls` as methods without `await`. The function `plain` makes each of them, except `items`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from inspect import signature
from typing import Any, ClassVar, Concatenate, Final, Literal, ParamSpec, TypeVar, overload

from lab_state._arguments import OnMismatch
from lab_state._calls import Calls
from lab_state._handle import Handle
from lab_state._items import PlainItems

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


def plain(fn: Callable[Concatenate[Calls, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Plain, P], R]:
    """Return a method without `await` that runs a call of `Calls`. It has the same arguments, overloads and docstring."""

    def call(self: Plain, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(fn(self._calls, *args, **kwargs))

    call.__name__, call.__qualname__, call.__doc__ = fn.__name__, fn.__name__, fn.__doc__
    # With `functools.wraps`, `inspect.unwrap` would find a coroutine function, and FastAPI would await the result.
    call.__signature__ = signature(fn)  # type: ignore[attr-defined]
    return call


class Plain(Handle):
    """The calls without `await` that `Blocking` and `Transaction` share. Their method `_run` runs the coroutine of a call to its end."""

    __slots__ = ("_calls",)

    _may_wait: ClassVar[bool]
    """Whether a call may await. If not, its coroutine runs to the end in one step."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        raise NotImplementedError

    def __bool__(self) -> Literal[True]:
        """Return True, even if the state is empty."""
        return True

    @overload
    def items(
        self,
        prefix: str = ...,
        *,
        after: str | None = ...,
        limit: int | None = ...,
        reverse: bool = ...,
        type: type[T],
        on_mismatch: OnMismatch = ...,
    ) -> PlainItems[T]: ...
    @overload
    def items(
        self,
        prefix: str = ...,
        *,
        after: str | None = ...,
        limit: int | None = ...,
        reverse: bool = ...,
        type: Any = ...,
        on_mismatch: OnMismatch = ...,
    ) -> PlainItems[Any]: ...
    def items(
        self,
        prefix: str = "",
        *,
        after: str | None = None,
        limit: int | None = None,
        reverse: bool = False,
        type: Any = Any,
        on_mismatch: OnMismatch = "raise",
    ) -> PlainItems[Any]:
        """Iterate over the keys that start with `prefix` and their values, all of one moment; see `Manager.items`."""
        steps = self._calls._steps(prefix, after, limit, type, on_mismatch, reverse=reverse)  # noqa: SLF001 -- `Plain` and its `Calls` belong together
        return PlainItems(steps, self._run, pause=self._may_wait)

    get: Final = plain(Calls.get)
    get_many: Final = plain(Calls.get_many)
    get_all: Final = plain(Calls.get_all)
    check: Final = plain(Calls.check)
    exists: Final = plain(Calls.exists)
    keys: Final = plain(Calls.keys)
    expires_in: Final = plain(Calls.expires_in)
    touch: Final = plain(Calls.touch)
    delete: Final = plain(Calls.delete)
    delete_many: Final = plain(Calls.delete_many)
    delete_all: Final = plain(Calls.delete_all)
    pop: Final = plain(Calls.pop)
    update: Final = plain(Calls.update)
    get_or_set: Final = plain(Calls.get_or_set)
    set_if_absent: Final = plain(Calls.set_if_absent)
    incr: Final = plain(Calls.incr)
