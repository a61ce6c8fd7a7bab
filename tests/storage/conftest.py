"""Fixtures of the tests of `FileStorage` and `S3Storage`."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from file_tools import Disk, kill, start_child
from s3_proxy import Proxy
from s3_world import Bucket, endpoint

from lab_state.storage import _directory, _fs, _kept, _lookup


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """Yield a proxy to the store, with faults on demand."""
    async with Proxy(endpoint()) as proxy:
        yield proxy


@pytest.fixture
def collected() -> Iterator[None]:
    """Free the sessions that a failing test leaves open. They are garbage only after the event loop is closed."""
    yield
    gc.collect()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    faulty = Disk()
    for used in (_fs, _lookup, _directory, _kept):
        monkeypatch.setattr(used, "os", faulty)
    return faulty


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the files of a process that was killed with five acknowledged changes in its journal."""
    directory = tmp_path_factory.mktemp("killed") / "state"
    child = start_child("serve", directory)
    kill(child)
    return directory


@pytest.fixture
def crashed(killed: Path, tmp_path: Path) -> Path:
    """Return a copy of `killed`, to be opened."""
    return Path(shutil.copytree(killed, tmp_path / "crashed"))


@pytest.fixture
def public() -> Iterator[Path]:
    """Yield a directory that every user can enter, unlike `tmp_path`."""
    directory = Path(tempfile.mkdtemp(prefix="lab_state-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)
