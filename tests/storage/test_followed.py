"""The followed mark: a `.json` that was copied from a running state does not open without its journal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from file_tools import flusher, manager
from running import flusher_of, running
from s3_world import Bucket

from lab_state import CorruptionError, FileStorage, Manager, MemoryStorage, read_state
from lab_state._codec import encode_snapshot
from lab_state._journal import is_followed
from lab_state.storage.s3._format import Stamp, stamped
from lab_state.testing import ManualClock


def member(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "lab.json").read_bytes())["$lab_state"]
    return found


async def checkpoint(state: Manager) -> None:
    checkpoints = flusher(state).checkpoints
    checkpoints.start()
    await checkpoints.ended()


@pytest.fixture
async def copied(tmp_path: Path) -> Path:
    """Return a directory with the `.json` alone of a state that runs, and a change in its journal."""
    async with manager(tmp_path / "state") as state:
        await state.set("a", 1)
        await state.flush()
        await checkpoint(state)
        await state.set("a", 2)
        await state.flush()
        (tmp_path / "copied").mkdir()
        shutil.copy(tmp_path / "state" / "lab.json", tmp_path / "copied")
        shutil.copy(tmp_path / "state" / "lab.journal", tmp_path)
    return tmp_path / "copied"


async def test_the_snapshot_of_a_running_state_has_the_mark(tmp_path: Path) -> None:
    """A clean stop removes it, also if nothing has changed since the last checkpoint."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        await state.flush()
        await checkpoint(state)
        assert member(tmp_path)["followed"] is True
        assert await state.backup(tmp_path / "backup") == 1
        assert "followed" not in (tmp_path / "backup").read_text()
    assert "followed" not in member(tmp_path)
    before = (tmp_path / "lab.json").read_bytes()
    async with manager(tmp_path) as state:
        assert await state.get("a") == 1
    assert (tmp_path / "lab.json").read_bytes() == before


async def test_a_copy_without_its_journal_is_refused(copied: Path) -> None:
    """By a start and by `read_state`. Nothing is changed, and the message says what is missing and what to do."""
    text = 'this journal is missing .* put that journal back, or restore .* delete `,"crc32":"…"`'
    before = (copied / "lab.json").read_bytes()
    with pytest.raises(CorruptionError, match=text) as caught:
        await manager(copied).start()
    assert caught.value.path.endswith("/copied/lab.journal")
    with pytest.raises(CorruptionError, match=text):
        await read_state("lab", FileStorage(copied))
    assert {path.name for path in copied.iterdir()} == {"lab.json", "lab.lock"}
    assert (copied / "lab.json").read_bytes() == before


async def test_a_copy_with_its_journal_is_the_state(copied: Path) -> None:
    """The two files together have all changes."""
    shutil.copy(copied.parent / "lab.journal", copied)
    async with manager(copied) as state:
        assert await state.get("a") == 2
    assert "followed" not in member(copied)


async def test_a_copy_that_a_person_has_accepted_opens(copied: Path) -> None:
    """It has its own content, as one new revision."""
    data = (copied / "lab.json").read_text()
    (copied / "lab.json").write_text(data[: data.rindex(',"crc32":')] + "}}")
    async with manager(copied) as state:
        assert (await state.get("a"), state.revision) == (1, 2)


async def test_a_copy_over_a_stopped_state_is_refused(tmp_path: Path, copied: Path) -> None:
    """The journal there has no records, but it follows another snapshot."""
    shutil.copy(copied / "lab.json", tmp_path / "state")
    with pytest.raises(CorruptionError, match="follows another snapshot"):
        await manager(tmp_path / "state").start()
    with pytest.raises(CorruptionError, match="follows another snapshot"):
        await read_state("lab", FileStorage(tmp_path / "state"))


async def test_a_start_and_a_stop_after_a_crash_remove_the_mark(tmp_path: Path) -> None:
    """Also if the process was killed right after a checkpoint, so that no record follows the snapshot."""
    async with manager(tmp_path / "state") as state:
        await state.set("a", 1)
        await state.flush()
        await checkpoint(state)
        shutil.copytree(tmp_path / "state", tmp_path / "killed")
    assert member(tmp_path / "killed")["followed"] is True
    async with manager(tmp_path / "killed") as state:
        assert await state.get("a") == 1
    assert "followed" not in member(tmp_path / "killed")


async def test_a_state_in_memory_opens_with_the_mark(clock: ManualClock) -> None:
    """Its journal is always there."""
    memory = MemoryStorage()
    async with running(memory, clock) as state:
        await state.set("a", 1)
        await state.flush()
        await checkpoint(state)
        assert is_followed(memory.places["test"].snapshot or b"")
        await flusher_of(state).abort().aclose()
    async with running(memory, clock) as state:
        assert await state.get("a") == 1
    assert not is_followed(memory.places["test"].snapshot or b"")


async def test_a_state_in_s3_opens_with_the_mark(tmp_path: Path, bucket: Bucket) -> None:
    """Records that the snapshot covers are deleted there. A copy on disk of the running state is refused."""
    async with Manager("lab", bucket.storage()) as state:
        await state.set("a", 1)
        await state.flush()
        await checkpoint(state)
        data = bucket.read_raw("lab")["state/modules/lab.json"]
        assert is_followed(data)
        assert await (await read_state("lab", bucket.storage())).get("a") == 1
        session = flusher_of(state).abort()
        await session.aclose()
    (tmp_path / "lab.json").write_bytes(data)
    with pytest.raises(CorruptionError, match="A running manager wrote the snapshot"):
        await manager(tmp_path).start()
    async with Manager("lab", bucket.storage()) as state:
        assert await state.get("a") == 1
    assert not is_followed(bucket.read_raw("lab")["state/modules/lab.json"])


@pytest.mark.parametrize("calls", [None, {"b" * 16: (1, {})}])
def test_the_mark_is_found_at_the_end(calls: Any) -> None:
    """With and without the stamp of S3. A value that looks like it, and a file of another program, have no mark."""
    parts = list(encode_snapshot({"a": 1}, 1, 0, copy_loaded=False, calls=calls, is_followed=True))
    assert is_followed(b"".join(parts))
    assert is_followed(b"".join([*parts[:-1], stamped(parts[-1], Stamp(2**63 - 1, 2**63 - 1))]))
    assert not is_followed(b"".join(encode_snapshot({"a": 1}, 1, 0, copy_loaded=False, calls=calls)))
    assert not is_followed(b'{"a":{"b":1,"followed":true}}')
    assert not is_followed(b"")
