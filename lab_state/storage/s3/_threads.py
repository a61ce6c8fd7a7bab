"""The threads of one session: they import the client, look up host names, compute checksums, and write and read spools."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from lab_state.exceptions import UnavailableError

P = ParamSpec("P")
R = TypeVar("R")

_MOST = 2
"""The number of threads. The lookup of a host name can take long. Meanwhile, the second thread does other work."""


class S3Threads(ThreadPoolExecutor):
    """A pool of at most two threads. A thread is started when it is first needed."""

    def __init__(self, name: str) -> None:
        """Create the pool. The names of its threads contain `name`, the name of the state."""
        super().__init__(_MOST, thread_name_prefix=f"lab_state {name}")

    def submit(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Call a function in a thread.

        Raises:
            UnavailableError: No thread can be started, or the pool was shut down.
        """
        try:
            return super().submit(function, *args, **kwargs)
        except RuntimeError as error:
            raise UnavailableError(
                f"no thread is available ({error}): "
                "raise the limit of processes and threads (`ulimit -u`, the pids of a container)"
            ) from error
