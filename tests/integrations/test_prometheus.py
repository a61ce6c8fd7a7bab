"""Prometheus: what a scrape returns, in any thread."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from forked import in_child
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from lab_state import Config, FileStorage, KeyNotFoundError, Manager, MemoryStorage, UnavailableError
from lab_state.integrations import prometheus
from lab_state.integrations.prometheus import LabStateCollector
from lab_state.testing import FaultyStorage, ManualClock


def scrape(*managers: Manager) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(LabStateCollector(*managers))
    return registry


def value_of(registry: CollectorRegistry, metric: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"lab_state_{metric}", {"name": "a", **labels})


async def test_what_is_told() -> None:
    """Each figure of the status and each counter has a metric."""
    clock, storage = ManualClock(), FaultyStorage(MemoryStorage())
    async with Manager(Config(name="a", flush_interval=None), storage, clock=clock) as state:
        registry = scrape(state)
        assert value_of(registry, "up") == 1
        assert value_of(registry, "last_flush_timestamp_seconds") is None
        await state.set("one", 1)
        await state.flush()
        storage.fail("commit")
        await state.set("two", 2)
        with pytest.raises(UnavailableError):
            await state.flush()
        with pytest.raises(KeyNotFoundError):
            await state.get("three")
        await state.delete("one")
        clock.advance(2.5)
        status = state.status()
        told = {
            "keys": 1,
            "revision": 3,
            "durable_revision": 1,
            "unflushed_keys": 2,
            "unflushed_age_seconds": 2.5,
            "last_flush_timestamp_seconds": 1_700_000_000,
            "snapshot_bytes": status.snapshot_bytes,
            "journal_bytes": status.journal_bytes,
            "flush_failures_total": 1,
        }
        assert {name: value_of(registry, name) for name in told} == told
        operations = {
            ("get", "error"): 1,
            ("set", "success"): 2,
            ("set", "error"): 0,
            ("delete", "success"): 1,
            ("expire", "success"): 0,
            ("flush", "success"): 1,
            ("flush", "error"): 1,
        }
        assert {
            (operation, status): value_of(registry, "operations_total", operation=operation, status=status)
            for operation, status in operations
        } == operations


async def test_a_shared_state(tmp_path: Path) -> None:
    """The owner tells the number of its followers. A follower tells who the owner is, and how long it has been silent."""
    clock, config, storage = ManualClock(), Config("a", shared=True), FileStorage(tmp_path)
    # The clock of the owner stands still, so the owner gives no sign of life.
    owner, follower = Manager(config, storage, clock=ManualClock()), Manager(config, storage, clock=clock)
    names = ("is_owner", "owner_pid", "followers", "lag_seconds")
    async with owner, follower:
        clock.advance(2.5)
        told = [[value_of(scrape(state), name) for name in names] for state in (owner, follower)]
    assert told == [[1, os.getpid(), 1, 0], [0, os.getpid(), None, 2.5]]
    assert [value_of(scrape(owner), name) for name in names] == [None, None, None, 0]


async def test_the_histogram_of_flushes() -> None:
    """Buckets are cumulative, end with `+Inf`, and come with their sum and count."""
    async with Manager(Config(name="a", flush_interval=None), MemoryStorage()) as state:
        for n in range(3):
            await state.set("key", n)
            await state.flush()
        text = generate_latest(scrape(state)).decode()
    (family,) = (
        found for found in text_string_to_metric_families(text) if found.name == "lab_state_operation_duration_seconds"
    )
    assert family.type == "histogram"
    samples = {
        (sample.name.removeprefix(family.name), sample.labels.get("le")): sample.value for sample in family.samples
    }
    counts = [count for (name, _), count in samples.items() if name == "_bucket"]
    assert counts == sorted(counts)
    assert samples["_bucket", "+Inf"] == samples["_count", None] == 3
    assert ("_bucket", "0.0005") in samples
    assert samples["_sum", None] == state.metrics().flush_seconds
    assert {sample.labels["operation"] for sample in family.samples} == {"flush"}


async def test_several_managers_in_one_collector() -> None:
    """Each manager has its own label. One that does not run is down, and its counters are still there."""
    a, b = Manager("a", MemoryStorage()), Manager("b", MemoryStorage())
    registry = scrape(a, b)
    assert value_of(registry, "up") == 0
    async with a, b:
        await b.set("key", 1)
        assert [value_of(registry, "keys", name=name) for name in "ab"] == [0, 1]
    assert [value_of(registry, "up", name=name) for name in "ab"] == [0, 0]
    assert value_of(registry, "operations_total", name="b", operation="set", status="success") == 1
    with pytest.raises(ValueError, match="two managers or readers have the name 'a'"):
        LabStateCollector(a, Manager("a", MemoryStorage()))


async def test_registering_twice_is_noticed() -> None:
    """The registry knows the names of the metrics without a scrape."""
    registry = scrape(Manager("a", MemoryStorage()))
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(LabStateCollector(Manager("b", MemoryStorage())))


async def test_the_server_of_prometheus_scrapes_while_keys_expire() -> None:
    """Scrapes from threads read on the manager's loop, while it writes, deletes and expires keys."""
    async with Manager(Config(name="a", flush_interval=0.001), MemoryStorage()) as state:
        server, thread = start_http_server(0, "127.0.0.1", scrape(state))
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            async with aiohttp.ClientSession(url) as session:

                async def get() -> str:
                    async with session.get("/metrics") as response:
                        assert response.status == 200
                        return await response.text()

                scrapes = [asyncio.create_task(get()) for _ in range(8)]
                n = 0
                while not all(one.done() for one in scrapes):
                    await state.set_many({f"k{n}.{i}": i for i in range(20)}, ttl=0.001)
                    await asyncio.sleep(0)
                    n += 1
                texts = [await one for one in scrapes]
        finally:
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            thread.join()
    assert all('lab_state_up{name="a"} 1.0' in text for text in texts)


def test_a_loop_that_is_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manager whose loop does not answer is reported as down. The others are reported as usual."""
    monkeypatch.setattr(prometheus, "_PATIENCE", 0.01)
    held, scraped = threading.Event(), threading.Event()
    state, other = Manager("a", MemoryStorage()), Manager("b", MemoryStorage())

    async def main() -> None:
        async with state:
            held.set()
            scraped.wait(30)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    held.wait(30)
    registry = scrape(state, other)
    found: list[Any] = [value_of(registry, "up"), value_of(registry, "keys"), value_of(registry, "keys", name="b")]
    scraped.set()
    thread.join()
    assert found == [0, None, 0]


async def test_a_scrape_in_a_forked_child() -> None:
    """A manager of the parent is reported as down, with its revision at the fork. The other managers are reported as usual."""
    async with Manager("a", MemoryStorage()) as state:
        await state.set("key", 1)
        registry = scrape(state, Manager("b", MemoryStorage()))
        figures = [("up", "a"), ("revision", "a"), ("up", "b"), ("revision", "b")]
        found = await in_child(lambda: [value_of(registry, metric, name=name) for metric, name in figures])
        assert value_of(registry, "up") == 1
    assert found == [0, 1, 0, 0]


def test_a_loop_that_is_gone() -> None:
    """A manager whose event loop was closed while it ran is reported as down, and is still read."""
    state = Manager(Config(name="a", flush_interval=None), MemoryStorage())

    async def main() -> None:
        await state.start()
        await state.set("key", 1)

    asyncio.run(main())
    found = scrape(state)
    assert (value_of(found, "up"), value_of(found, "keys")) == (0, 1)
    asyncio.run(state.stop())


def test_a_loop_that_closes_during_the_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the loop is closed during a scrape, the manager is reported as down."""
    state = Manager("a", MemoryStorage())
    with asyncio.Runner() as runner:
        runner.run(state.start())
        with monkeypatch.context() as patched:
            patched.setattr(runner.get_loop(), "is_running", lambda: True)
            patched.setattr(runner.get_loop(), "call_soon_threadsafe", closed)
            assert value_of(scrape(state), "up") == 0
        runner.run(state.stop())


def closed(*_: object) -> None:
    raise RuntimeError("Event loop is closed")
