"""What a new file takes over from the file that it replaces: owner, group, mode and access list."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab_state import Config, FileStorage, Manager
from lab_state.storage import _ownership
from lab_state.storage._ownership import keep, narrowed

ACL = "system.posix_acl_access"
DEFAULT_ACL = "system.posix_acl_default"


def access_list(user: int, permissions: int, mask: int) -> bytes:
    """Return an access list: `rw-` for the owner, nothing for group and others, these permissions for one more user."""
    nobody = 0xFFFFFFFF
    entries = [(1, 6, nobody), (2, permissions, user), (4, 0, nobody), (16, mask, nobody), (32, 0, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@pytest.fixture
def new(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "new", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old"
    path.touch(0o600)
    return path


def mode(file: int | Path) -> int:
    return stat.S_IMODE(os.fstat(file).st_mode if isinstance(file, int) else file.stat().st_mode)


async def test_the_mode_of_both_files_is_kept(tmp_path: Path) -> None:
    """A new file keeps the mode of the replaced one, without the setuid bit.

    A first journal gets that of the snapshot.
    """
    for _ in range(2):
        async with Manager(Config(name="lab", flush_interval=0), FileStorage(tmp_path)) as state:
            await state.incr("n")
        for name in ("lab.json", "lab.journal"):
            (tmp_path / name).chmod(0o4640)
    async with Manager(Config(name="lab", flush_interval=0), FileStorage(tmp_path)) as state:
        await state.incr("n")
        assert mode(tmp_path / "lab.journal") == 0o640
    assert mode(tmp_path / "lab.json") == 0o640
    (tmp_path / "lab.journal").unlink()
    async with Manager(Config(name="lab", flush_interval=0), FileStorage(tmp_path)) as state:
        await state.incr("n")
        assert mode(tmp_path / "lab.journal") == 0o640


def test_without_a_file_to_replace(new: int, tmp_path: Path) -> None:
    """Without a file to replace, only the owner may use the new file. A link is not used as a model."""
    (tmp_path / "link").symlink_to("nowhere")
    keep(new, str(tmp_path / "none"), str(tmp_path / "link"))
    assert mode(new) == 0o600


def test_an_owner_and_a_group_are_kept(new: int, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Group, mode and owner are set in this order: after a change of owner this process may not change the rest."""
    old.chmod(0o640)
    uid, gid = old.stat().st_uid, old.stat().st_gid
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(os, "lstat", lambda path: replaced(Path(path).stat(), uid + 1, gid + 1))
    monkeypatch.setattr(os, "fchown", lambda *arguments: calls.append(("fchown", *arguments)))
    monkeypatch.setattr(os, "fchmod", lambda *arguments: calls.append(("fchmod", *arguments)))
    keep(new, str(old))
    assert calls == [("fchown", new, -1, gid + 1), ("fchmod", new, 0o640), ("fchown", new, uid + 1, -1)]


def replaced(found: os.stat_result, uid: int, gid: int) -> os.stat_result:
    return os.stat_result((*found[:4], uid, gid, *found[6:]))


def test_a_group_that_cannot_be_kept(new: int, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the group cannot be kept, the group of the process gets only the permissions that all users had."""

    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    old.chmod(0o644)
    found = old.stat()
    monkeypatch.setattr(os, "lstat", lambda path: replaced(Path(path).stat(), found.st_uid + 1, found.st_gid + 1))
    monkeypatch.setattr(os, "fchown", forbidden)
    keep(new, str(old))
    assert mode(new) == 0o644
    old.chmod(0o640)
    keep(new, str(old))
    assert mode(new) == 0o600
    os.setxattr(old, ACL, access_list(12345, 4, 4))
    keep(new, str(old))
    assert mode(new) == 0o600
    with pytest.raises(OSError, match="No data"):
        os.getxattr(new, ACL)


@pytest.mark.parametrize(("mode", "expected"), [(0o644, 0o644), (0o640, 0o600), (0o604, 0o600), (0o675, 0o655)])
def test_a_narrowed_mode(mode: int, expected: int) -> None:
    """Group and others get only the permissions that both had."""
    assert narrowed(mode) == expected


def test_an_access_list_is_kept(new: int, old: Path) -> None:
    """An access list is kept. The group bits of such a file show its mask, which would give the group too much."""
    os.setxattr(old, ACL, access_list(12345, 4, 4))
    assert mode(old) == 0o640
    keep(new, str(old))
    assert os.getxattr(new, ACL) == os.getxattr(old, ACL)


def test_an_access_list_that_cannot_be_kept(new: int, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the access list cannot be kept, only the owner may use the new file."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    os.setxattr(old, ACL, access_list(12345, 4, 4))
    monkeypatch.setattr(os, "setxattr", unsupported)
    keep(new, str(old))
    assert mode(new) == 0o600


def test_an_access_list_of_the_directory_is_not_added(tmp_path: Path, old: Path) -> None:
    """The access list that a new file inherits from the directory is removed: the mode of the old file would make it effective."""
    old.chmod(0o640)
    os.setxattr(tmp_path, DEFAULT_ACL, access_list(12345, 4, 4))
    fd = os.open(tmp_path / "inherits", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.getxattr(fd, ACL)
        keep(fd, str(old))
        assert mode(fd) == 0o640
        with pytest.raises(OSError, match="No data"):
            os.getxattr(fd, ACL)
    finally:
        os.close(fd)


def test_a_file_that_cannot_be_looked_up() -> None:
    """A replaced file that cannot be looked up is an error, so permissions are never changed by mistake."""
    with pytest.raises(OSError, match="too long"):
        keep(-1, "x" * 300)
    assert _ownership._access_list("x" * 300) is None
