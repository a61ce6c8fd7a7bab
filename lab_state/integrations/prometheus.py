"""For Prometheus: a collector that reads managers during each scrape, from any thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
from collections.abc import Callable, Generator, Iterator

import msgspec
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lab_state._metrics import Metrics
from lab_state._status import Status
from lab_state.exceptions import ClosedError, UnsupportedError
from lab_state.integrations._lifespan import by_name
from lab_state.manager import Manager

__all__ = ["LabStateCollector"]

_PATIENCE = 5.0
"""The seconds for which a scrape waits for the event loop of each manager. By default, the timeout of Prometheus is 10 seconds."""

_GAUGES: tuple[tuple[str, str, Callable[[Status], float | None]], ...] = (
    ("lab_state_keys", "Keys in the state.", lambda status: status.keys),
    ("lab_state_revision", "The number of the latest change.", lambda status: status.revision),
    (
        "lab_state_durable_revision",
        "Every change up to this revision is durable.",
        lambda status: status.durable_revision,
    ),
    ("lab_state_unflushed_keys", "Keys with changes that are not durable.", lambda status: status.unflushed_keys),
    (
        "lab_state_unflushed_age_seconds",
        "Age in seconds of the oldest change that is not durable. A crash may lose the changes since then.",
        lambda status: status.unflushed_age,
    ),
    (
        "lab_state_last_flush_timestamp_seconds",
        "End of the last flush that wrote something, in seconds since 1970; absent before the first.",
        lambda status: status.last_flush_at,
    ),
    ("lab_state_snapshot_bytes", "Size of the snapshot.", lambda status: status.snapshot_bytes),
    ("lab_state_journal_bytes", "Size of the journal after the snapshot.", lambda status: status.journal_bytes),
    (
        "lab_state_is_owner",
        "1 in the process that owns the state, 0 in its followers; absent while the manager does not run.",
        lambda status: None if status.role is None else status.role == "owner",
    ),
    (
        "lab_state_owner_pid",
        "The process id of the owner; absent while there is none.",
        lambda status: status.owner_pid,
    ),
    (
        "lab_state_followers",
        "Managers that follow this one; present only in the owner of a shared state.",
        lambda status: status.followers,
    ),
    (
        "lab_state_lag_seconds",
        "Seconds since the last sign of life of the owner. Reads may lack changes that became durable since then.",
        lambda status: status.lag,
    ),
)


class LabStateCollector(Collector):
    """Metrics of managers: `REGISTRY.register(LabStateCollector(state))`.

    Each metric has a label `name`. The collector reads all metrics during a scrape, and does
    nothing between scrapes. Any thread may scrape. A running manager is read on its event loop. If
    that loop does not answer within 5 seconds, `lab_state_up` is 0, and the other metrics of this
    manager are missing. If the manager does not run, or its loop is closed, `lab_state_up` is also 0, but the other
    metrics are still reported. A manager that runs in the parent of a forked child does not run in the child.
    """

    def __init__(self, *managers: Manager) -> None:
        """Keep the managers, which need not run yet.

        Args:
            managers: One or more managers, each with a different name.

        Raises:
            ValueError: No manager was given, or two have the same name.
            TypeError: An argument is not a manager.
        """
        self._managers = by_name(managers, (Manager,))

    def __repr__(self) -> str:
        """Return the class and the names of the managers."""
        return f"<LabStateCollector of {list(self._managers)}>"

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics without values. The registry calls this at a registration, which then need not wait for an event loop."""
        return iter(_Families())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics with their present values. Any thread may call this. Wait up to 5 s for each manager."""
        families = _Families()
        for name, manager in self._managers.items():
            families.add(name, _read(manager))
        return iter(families)


def _read(manager: Manager) -> tuple[Status, Metrics] | None:
    """Return status and metrics of a manager; `None` if its event loop does not answer, or is closed during the call."""

    def read() -> tuple[Status, Metrics]:
        return manager.status(), manager.metrics()

    try:
        loop = manager._core.durability.loop  # noqa: SLF001 -- a manager has no public call for its event loop
    except (ClosedError, UnsupportedError):
        # The manager does not run, or runs in the parent of this forked process: `status` and `metrics` are safe in any thread.
        return read()
    if loop.is_closed():  # the manager was not stopped, so its phase is still `running`
        status, metrics = read()
        return msgspec.structs.replace(status, phase="stopped"), metrics
    if loop is _running_loop() or not loop.is_running():
        return read()
    answer: concurrent.futures.Future[tuple[Status, Metrics]] = concurrent.futures.Future()
    try:
        loop.call_soon_threadsafe(lambda: answer.set_result(read()))
        return answer.result(_PATIENCE)
    except (RuntimeError, TimeoutError):  # the loop was closed during the call, or does not answer
        return None


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _Families:
    """The metrics of one scrape. `add` adds the values of a manager."""

    def __init__(self) -> None:
        self._up = GaugeMetricFamily("lab_state_up", "Whether the manager runs and answers.", labels=["name"])
        self._gauges = [GaugeMetricFamily(name, text, labels=["name"]) for name, text, _ in _GAUGES]
        self._failures = CounterMetricFamily(
            "lab_state_flush_failures", "Flushes and checkpoints that failed since the last start.", labels=["name"]
        )
        self._operations = CounterMetricFamily(
            "lab_state_operations",
            "Operations by status; for `get`, only the calls that failed.",
            labels=["name", "operation", "status"],
        )
        self._durations = HistogramMetricFamily(
            "lab_state_operation_duration_seconds", "Duration of commits that succeeded.", labels=["name", "operation"]
        )

    def __iter__(self) -> Generator[Metric]:
        yield self._up
        yield from self._gauges
        yield self._failures
        yield self._operations
        yield self._durations

    def add(self, name: str, answer: tuple[Status, Metrics] | None) -> None:
        self._up.add_metric([name], answer is not None and answer[0].phase == "running")
        if answer is None:
            return
        status, metrics = answer
        for family, (_, _, read) in zip(self._gauges, _GAUGES, strict=True):
            value = read(status)
            if value is not None:
                family.add_metric([name], value)
        self._failures.add_metric([name], status.flush_failures)
        for (operation, result), count in metrics.operations.items():
            self._operations.add_metric([name, operation, result], count)
        self._durations.add_metric(
            [name, "flush"],
            buckets=[("+Inf" if bound == math.inf else str(bound), count) for bound, count in metrics.flush_buckets],
            sum_value=metrics.flush_seconds,
        )
