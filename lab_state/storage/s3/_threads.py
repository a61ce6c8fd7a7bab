"""The threads of one session: for looking up host names, hashing, and writing a spool."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from lab_state.exceptions import UnavailableError

P = ParamSpec("P")
R = TypeVar("R")

_MOST = 2
"""Looking up a host name, which can take long, beside writing a spool."""


class Threads(ThreadPoolExecutor):
    """At most two threads, each started when it is first needed."""

    def __init__(self, name: str) -> None:
        """Take the name of the state."""
        super().__init__(_MOST, thread_name_prefix=f"lab_state {name}")

    def submit(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Call a function in a thread.

        Raises:
            UnavailableError: No thread can be started, or these were told to end.
        """
        try:
            return super().submit(function, *args, **kwargs)
        except RuntimeError as error:
            raise UnavailableError(
                f"a thread of this process is needed, and there is none ({error}): "
                "raise the limit of processes and threads (`ulimit -u`, the pids of a container)"
            ) from error
