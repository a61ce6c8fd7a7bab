"""Files that are not as `FileStorage` left them: links, FIFOs, mount points, copies, changes under a running manager."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from lab_state import Config, FileStorage, LockedError, Manager, UnsupportedError
from lab_state.storage import _fs, _os_errors

FILES = ["lab.json", "lab.journal", "lab.lock"]


def manager(directory: Path, name: str = "lab", **settings: Any) -> Manager:
    return Manager(Config(name=name, **{"flush_interval": 0, **settings}), FileStorage(directory))


# Names that are not those of regular files


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dangling", [False, True])
async def test_a_link_in_place_of_a_file(tmp_path: Path, name: str, *, dangling: bool) -> None:
    """It is refused, whether it leads somewhere or not, and what it leads to stays as it was."""
    directory, target = tmp_path / "state", tmp_path / "target"
    directory.mkdir()
    if not dangling:
        target.write_bytes(b'{"precious":1}')
    (directory / name).symlink_to(target)
    with pytest.raises(UnsupportedError, match=rf"{name} is a symbolic link: put the file itself there"):
        await manager(directory).start()
    assert (directory / name).is_symlink()
    assert target.exists() != dangling
    assert dangling or target.read_bytes() == b'{"precious":1}'


@pytest.mark.parametrize("name", FILES)
async def test_a_fifo_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    """It is refused at once: to open it would be to wait for its other end."""
    os.mkfifo(tmp_path / name)
    async with asyncio.timeout(10):
        with pytest.raises(UnsupportedError, match=rf"{name} is a FIFO, not a file: move it away"):
            await manager(tmp_path).start()


@pytest.mark.parametrize("name", FILES)
async def test_a_fifo_that_takes_the_place_of_a_file_while_it_is_opened(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that was opened is looked at once more; a FIFO would read as an empty file."""
    os.mkfifo(tmp_path / name)
    real = _fs.check_regular

    def late(path: str, mode: int) -> None:
        if path.endswith(name) and not late_calls:
            late_calls.append(path)
        else:
            real(path, mode)

    late_calls: list[str] = []
    monkeypatch.setattr(_fs, "check_regular", late)
    with pytest.raises(UnsupportedError, match=rf"{name} is a FIFO"):
        await manager(tmp_path).start()
    assert late_calls


@pytest.mark.parametrize("kind", [stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
def test_what_else_a_name_may_stand_for(kind: int) -> None:
    """Sockets and devices are refused; a regular file is not."""
    with pytest.raises(UnsupportedError, match=r"x is a (socket|device), not a file: move it away"):
        _os_errors.check_regular("x", kind | 0o600)
    _os_errors.check_regular("x", stat.S_IFREG | 0o600)


async def test_a_lock_file_that_becomes_a_link_fences(tmp_path: Path) -> None:
    """Another process, which refuses the link, has to find the lock under its name."""
    async with manager(tmp_path / "state") as state:
        await state.set("a", 1)
        lock = tmp_path / "state" / "lab.lock"
        lock.rename(tmp_path / "moved")
        lock.symlink_to(tmp_path / "moved")
        assert not _fs.is_file(str(lock), (lock.stat().st_dev, lock.stat().st_ino))
        lock.unlink()
        (tmp_path / "moved").rename(lock)


# Names that are no text


async def test_a_host_name_that_is_no_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock file holds what can be written of it, and the message of a second writer names it."""
    monkeypatch.setattr(socket, "gethostname", lambda: "h\udcff")
    async with manager(tmp_path):
        with pytest.raises(LockedError, match=r"on h\?, since"):
            await manager(tmp_path).start()
