"""What every test runs under: nothing in the package blocks the event loop. And what many begin with."""

from __future__ import annotations

import builtins
import fcntl
import gc
import io
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from blockbuster import BlockBusterFunction, blockbuster_ctx
from roles import ROLES, InRole, reason_to_differ

from lab_state import MemoryStorage
from lab_state.testing import FaultyStorage, ManualClock

# What blockbuster itself does not watch.
ALSO_BLOCKING = (
    (builtins, "open"),
    (io, "open"),
    (os, "open"),
    (os, "fsync"),
    (os, "fdatasync"),
    (os, "ftruncate"),
    (os, "pwrite"),
    (fcntl, "flock"),
)

# There is an event loop there, but in a thread, and only this code uses it.
IN_A_THREAD = ("lab_state/storage/s3/_connect.py", "_made")

# Its callers may block where the storage under test may not.
TEST_CODE = ["lab_state.testing"]


@pytest.fixture(autouse=True)
def _no_blocking() -> Iterator[None]:
    """Let a blocking call on the event loop, with the package in its stack, fail the test."""
    with blockbuster_ctx("lab_state", excluded_modules=TEST_CODE) as watched, ExitStack() as stack:
        for known in watched.functions.values():
            known.can_block_in(*IN_A_THREAD)
        for module, name in ALSO_BLOCKING:
            function = BlockBusterFunction(module, name, scanned_modules="lab_state", excluded_modules=TEST_CODE)
            function.can_block_in(*IN_A_THREAD)
            function.activate()
            stack.callback(function.deactivate)
        yield


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Undo the logging that a framework set up for the whole process, after each test."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)
    for handler in logging.root.handlers[:]:
        if not type(handler).__module__.startswith("_pytest"):
            logging.root.removeHandler(handler)


@pytest.fixture
def memory() -> MemoryStorage:
    return MemoryStorage()


@pytest.fixture
def storage(memory: MemoryStorage) -> FaultyStorage:
    return FaultyStorage(memory)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=ROLES)
def in_role(request: pytest.FixtureRequest, tmp_path: Path) -> InRole:
    """Return what makes a manager. The test runs with a state that is not shared, as an owner, and as a follower."""
    return InRole(request.param, tmp_path)


def pytest_collection_finish() -> None:
    """Let the garbage collector leave out all that exists before the first test. Otherwise each full collection examines 11,000 tests."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip in a shared state what must differ there."""
    for item in items:
        reason = reason_to_differ(item.nodeid)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
