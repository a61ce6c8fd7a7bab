"""`_forgotten`: a manager that is collected while it runs, and what a second start says of the first."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import warnings
from pathlib import Path

import pytest
from running import flusher_of

from lab_state import Config, FileStorage, LockedError, Manager, MemoryStorage
from lab_state._forgotten import _close
from lab_state.storage import StorageSession


def descriptors(directory: Path) -> list[str]:
    """Return the files of a directory that this process has open."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(fd.readlink()))
        except OSError:  # the one that lists them
            continue
    return [path for path in found if path.startswith(str(directory))]


def collect() -> None:
    """Collect what was forgotten, and wait until it is closed."""
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "lab_state forgotten":
            thread.join()


def started_line() -> int:
    """Return the number of the next line, which starts a manager."""
    return sys._getframe(1).f_lineno + 1


async def forgets(directory: Path) -> None:
    state = Manager("nb", FileStorage(directory))
    await state.start()
    await state.set("a", 1)
    await state.flush()
    del state
    gc.collect()


def test_a_forgotten_manager_is_told_and_lets_go(tmp_path: Path) -> None:
    """A `ResourceWarning` says where it was started; once its loop is closed the state can be started again."""
    with pytest.warns(
        ResourceWarning, match=r"was collected while it runs: .* started at .*test_forgotten\.py:\d+, in"
    ):
        asyncio.run(forgets(tmp_path))
    collect()
    assert descriptors(tmp_path) == []

    async def again() -> None:
        async with Manager("nb", FileStorage(tmp_path)) as state:
            assert await state.get("a") == 1

    asyncio.run(again())


def test_a_manager_that_outlives_its_loop_lets_go_when_it_is_collected(tmp_path: Path) -> None:
    """The loop is closed first, and the manager is collected later."""

    async def main() -> Manager:
        state = Manager(Config(name="nb", flush_interval=None), FileStorage(tmp_path))
        await state.start()
        return state

    kept = [asyncio.run(main())]
    collect()
    assert descriptors(tmp_path) != []
    with pytest.warns(ResourceWarning, match="was collected while it runs"):
        kept.clear()
    collect()
    assert descriptors(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*was collected while it runs:ResourceWarning")
def test_many_forgotten_managers_leave_nothing(tmp_path: Path) -> None:
    """No descriptors are left, and so no locks."""
    for number in range(20):
        asyncio.run(forgets(tmp_path / str(number)))
    collect()
    assert descriptors(tmp_path) == []


def test_what_was_ended_is_not_told(tmp_path: Path) -> None:
    """A manager that was never started, was stopped, or ended as by a crash gives no warning."""

    async def main() -> None:
        Manager("new", FileStorage(tmp_path))
        async with Manager("stopped", FileStorage(tmp_path)):
            pass
        state = Manager("crashed", FileStorage(tmp_path))
        await state.start()
        await flusher_of(state).abort().aclose()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())
        collect()


async def test_a_second_start_says_where_the_first_was(tmp_path: Path) -> None:
    """The message that the state is locked names the line that started it in this process."""
    async with Manager("nb", FileStorage(tmp_path)):
        with pytest.raises(LockedError) as caught:
            await Manager("nb", FileStorage(tmp_path)).start()
        assert "the first one was started at " in str(caught.value)
        assert f"{__file__}:" in str(caught.value)
        assert "in test_a_second_start_says_where_the_first_was" in str(caught.value)
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(LockedError, match="the first one was started at "):  # by another path too
            await Manager("nb", FileStorage(tmp_path / "link")).start()
    async with Manager("nb", FileStorage(tmp_path)):
        pass


async def test_a_stopped_manager_is_not_the_first_one(tmp_path: Path) -> None:
    """If another writer has the state by now, the message does not name the place where this process had started it."""
    stopped = Manager("nb", FileStorage(tmp_path))
    await stopped.start()
    await stopped.stop()
    session = await FileStorage(tmp_path).open("nb")
    try:
        with pytest.raises(LockedError) as caught:
            await Manager("nb", FileStorage(tmp_path)).start()
        assert "the first one was started at" not in str(caught.value)
        assert stopped.status().phase == "stopped"
    finally:
        await session.aclose()


async def test_storages_with_one_repr_and_two_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative directory and a storage in memory look the same in two places. Each place has its own first start."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    relative = FileStorage("states")
    async with Manager("nb", relative), Manager("nb", MemoryStorage()):
        monkeypatch.chdir(tmp_path / "b")
        other = FileStorage("states")
        assert repr(other) == repr(relative)
        line = started_line()
        async with Manager("nb", other):
            with pytest.raises(LockedError) as caught:
                await Manager("nb", FileStorage("states")).start()
            assert f"{__file__}:{line}" in str(caught.value)
        memory = MemoryStorage()
        line = started_line()
        async with Manager("nb", memory):
            with pytest.raises(LockedError) as caught:
                await Manager("nb", memory).start()
            assert f"{__file__}:{line}" in str(caught.value)


async def test_a_storage_with_slots_has_no_first_start() -> None:
    """A storage that supports no weak reference, and gives no place, is refused without the line of the first start."""

    class Slotted:
        __slots__ = ("open", "read")

        def __init__(self, inner: MemoryStorage) -> None:
            self.open = inner.open
            self.read = inner.read

    storage = Slotted(MemoryStorage())
    async with Manager("nb", storage):
        with pytest.raises(LockedError) as caught:
            await Manager("nb", storage).start()
        assert "the first one" not in str(caught.value)


async def test_a_start_in_a_task_of_its_own_is_named_by_asyncio() -> None:
    """Where nothing of the application awaits the start, the line is the loop's."""
    storage = MemoryStorage()
    state = Manager("nb", storage)
    await asyncio.create_task(state.start())
    with pytest.raises(LockedError, match=r"the first one was started at .*asyncio"):
        await Manager("nb", storage).start()
    await state.stop()


def test_a_session_that_cannot_be_closed_is_left() -> None:
    """What closing raises is swallowed: nothing waits for it."""

    class Session:
        async def aclose(self) -> None:
            raise RuntimeError

    session: StorageSession = Session()  # type: ignore[assignment]
    _close(session)
    collect()
