"""What lab_state logs: the page lists every line, and INFO is for starts, stops, roles and slow checkpoints."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from running import flusher_of, until

import lab_state
from lab_state import Config, FileStorage, Manager, MemoryStorage, StorageSession, UnavailableError
from lab_state._log import Log
from lab_state.testing import FaultyStorage, ManualClock

PACKAGE = Path(lab_state.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "logging.md"
LEVELS = ("debug", "info", "warning", "error")
SECRET = "hunter2"


def lines_in_code() -> set[tuple[str, str]]:
    """Return level and format string of each call of a logger in the package."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name == "_log.py":  # passes lines on
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS):
                continue
            line = node.args[0]
            assert isinstance(line, ast.Constant), f"{path}:{node.lineno}: a line of the log is a literal"
            found.add((node.func.attr.upper(), str(line.value)))
    return found


def lines_of_page() -> set[tuple[str, str]]:
    rows = re.findall(
        r"^\| (DEBUG|INFO|WARNING|ERROR) \| (`+)(.+?)\2 \| (.+?) \| (.+?) \|$", PAGE.read_text(), re.MULTILINE
    )
    return {(level, line) for level, _, line, _, _ in rows}


def test_the_page_lists_every_line() -> None:
    """docs/logging.md has level and text of each line that lab_state logs, and no other line."""
    code, page = lines_in_code(), lines_of_page()
    assert len(code) > 40
    assert code - page == set(), "not on the page: add a row with level, line, when, and what to do"
    assert page - code == set(), "not in the code: change or delete the row"


def test_few_lines_are_info() -> None:
    """INFO is a start, a migration, a stop, a new role, and a slow checkpoint."""
    info = sorted(line for level, line in lines_in_code() if level == "INFO")
    assert [line.split("%s: ", 1)[1].split(" ", 1)[0] for line in info] == [
        "a",
        "follows",
        "loaded",
        "migrated",
        "migrates",
        "restore_state(%r,",
        "stopped",
        "the",
        "this",
    ]


def test_no_other_way_to_log() -> None:
    """No module calls a method of a logger that the page does not know, or `logging` itself."""
    others = re.compile(
        r"\b_?logger\.(exception|critical|log|warn|fatal)\(|\blogging\.(debug|info|warning|error|exception)\("
    )
    assert [path.name for path in PACKAGE.rglob("*.py") if others.search(path.read_text())] == []


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "lab_state")
    return caplog


def texts(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the INFO lines, and forget them."""
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    caplog.clear()
    return found


async def test_a_start_and_a_stop_are_told(tmp_path: Path, info: pytest.LogCaptureFixture) -> None:
    """A start says keys, revision, seconds and how the state ended before; a stop says revisions and seconds."""
    path = re.escape(str(tmp_path / "jobs.json"))
    for keys, end in enumerate(("a new state", "after a clean end")):
        async with Manager(Config("jobs", flush_interval=None), FileStorage(tmp_path)) as state:
            (line,) = texts(info)
            assert re.fullmatch(
                rf"jobs: loaded revision {keys} \(keys: {keys}\) from {path} in \d\.\d\d\d s: {end}", line
            )
            await state.set(f"key {keys}", SECRET)
        (line,) = texts(info)
        assert re.fullmatch(
            rf"jobs: stopped at revision {keys + 1}, durable up to revision {keys + 1}, in \d\.\d\d\d s", line
        )


async def test_an_unclean_end_is_told(info: pytest.LogCaptureFixture) -> None:
    """A start after a crash says that the end was unclean, and how many records it has replayed."""
    storage = MemoryStorage()
    state = Manager(Config("jobs", flush_interval=0), storage)
    await state.start()
    await state.set("a", SECRET)
    await state.set("b", SECRET)
    await flusher_of(state).abort().aclose()
    texts(info)
    async with Manager("jobs", storage):
        (line,) = texts(info)
        assert line.startswith("jobs: loaded revision 2 (keys: 2) from ")
        assert line.endswith(" s: after an unclean end (records replayed: 2)")


async def test_seconds_are_those_of_the_clock(info: pytest.LogCaptureFixture) -> None:
    """The seconds of a start include the time that opening the storage took."""
    clock = ManualClock()

    class Slow(FaultyStorage):
        async def open(self, name: str) -> StorageSession:
            clock.advance(2.5)
            return await super().open(name)

    async with Manager("jobs", Slow(MemoryStorage()), clock=clock):
        pass
    assert "in 2.500 s" in texts(info)[0]


async def test_a_stop_that_fails_says_what_is_durable(info: pytest.LogCaptureFixture) -> None:
    """The line of a stop that raises has a durable revision below the revision."""
    storage = FaultyStorage(MemoryStorage())
    state = Manager(Config("jobs", flush_interval=None, stop_timeout=0.1), storage)
    await state.start()
    await state.set("a", SECRET)
    storage.fail("commit", times=99)
    with pytest.raises(UnavailableError):
        await state.stop()
    assert "jobs: stopped at revision 1, durable up to revision 0, in " in texts(info)[1]


async def test_a_start_that_fails_is_not_told_as_one(info: pytest.LogCaptureFixture) -> None:
    """A start that could not load the state has no INFO line, and neither has the stop after it."""
    storage = FaultyStorage(MemoryStorage())
    storage.fail("open")
    state = Manager("jobs", storage)
    with pytest.raises(UnavailableError):
        await state.start()
    await state.stop()
    assert texts(info) == []


@pytest.mark.parametrize("seconds", [0.9, 1.1])
async def test_a_slow_checkpoint_is_told(info: pytest.LogCaptureFixture, seconds: float) -> None:
    """A checkpoint above one second is one INFO line with its size; a quicker one has none."""
    clock, storage = ManualClock(), FaultyStorage(MemoryStorage())
    async with Manager(Config("jobs", flush_interval=None), storage, clock=clock) as state:
        texts(info)
        storage.hang("checkpoint")
        await state.set("a", "x" * 100_000)
        await state.flush()
        await until(lambda: "checkpoint" in storage.calls)
        clock.advance(seconds)
        storage.resume()
        await until(lambda: flusher_of(state).checkpoints.records == 0)
        told = texts(info)
    assert len(told) == (seconds > 1)
    assert all(re.fullmatch(r"jobs: a checkpoint of 100\d\d\d bytes took 1\.1 s", line) for line in told)


async def test_no_value_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """At every level, through failures of flush, checkpoint and stop, no value is logged."""
    caplog.set_level(logging.DEBUG)
    storage = FaultyStorage(MemoryStorage())
    state = Manager(Config("jobs", flush_interval=0, stop_timeout=0.1), storage)
    await state.start()
    for _ in range(3):
        storage.fail("commit")
        with pytest.raises(UnavailableError):
            await state.set("a", SECRET)
    await state.flush()
    storage.fail("checkpoint")
    storage.fail("aclose")
    await state.stop()
    assert len(caplog.records) > 4
    assert SECRET not in caplog.text


def test_debug_is_left_out_without_the_method() -> None:
    """A logger without `debug` gets the other lines."""
    told: list[str] = []

    class Three:
        def info(self, message: str, /) -> None:
            told.append(message)

        warning = error = info

    log = Log(Three())
    log.debug("a %s", 1)
    log.info("b %s", 2)
    assert told == ["b 2"]


def test_debug_is_logged_where_there_is_the_method(caplog: pytest.LogCaptureFixture) -> None:
    """A logger of `logging` gets DEBUG lines, with the place of the call."""
    caplog.set_level(logging.DEBUG, "lab_state")
    log: Any = Log(logging.getLogger("lab_state"))
    log.debug("a %s", 1)
    (record,) = caplog.records
    assert (record.levelname, record.getMessage(), record.filename) == ("DEBUG", "a 1", Path(__file__).name)
