"""A real power cut of a real file system: it is shut down under the writer, its journal unwritten, and mounted again.

With the environment variable `LAB_STATE_POWER_CUT=1`: needs root, loop devices, and the
`mkfs` of the file systems. `LAB_STATE_POWER_CUT_CYCLES` cuts for each, 30 unless told.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lives import in_memory
from witness import Witness, zygote

from lab_state import Config, FileStorage, Manager, StorageError, UnsupportedError, read_state, restore_state

pytestmark = pytest.mark.skipif(
    os.environ.get("LAB_STATE_POWER_CUT") != "1", reason="asked for with LAB_STATE_POWER_CUT=1, as nox -s crash does"
)

CYCLES = int(os.environ.get("LAB_STATE_POWER_CUT_CYCLES", "30"))
LONGEST_LIFE = 0.3
"""Seconds, of which a start takes a part that grows with what mount options make of a sync."""
FS_IOC_SHUTDOWN, NOLOGFLUSH = 0x8004587D, 2
MKFS = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
PACKAGES = {"ext4": "e2fsprogs", "xfs": "xfsprogs"}
MIB = {"ext4": 64, "xfs": 320}
OPTIONS = {"ext4": ["defaults", "commit=1", "commit=1000", "data=writeback", "data=journal"], "xfs": ["defaults"]}


def run(why: str, *command: str | Path) -> None:
    """Run a command that is asked for by name: where it cannot be, the test fails and says what is missing."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{why} ({' '.join(map(str, command))}): {done.stderr.strip() or done.stdout.strip()}")


class Disk:
    """A file system in a file, on a loop device."""

    def __init__(self, kind: str, image: Path, point: Path) -> None:
        if os.geteuid() != 0:
            pytest.fail("LAB_STATE_POWER_CUT=1 asks for mounts, and only root may mount")
        tool = MKFS[kind][0]
        if shutil.which(tool) is None:
            pytest.fail(f"LAB_STATE_POWER_CUT=1 asks for {tool}, which is missing: apt-get install {PACKAGES[kind]}")
        if not Path("/dev/loop-control").exists():
            pytest.fail("LAB_STATE_POWER_CUT=1 asks for loop devices, and there is no /dev/loop-control")
        self.kind, self.image, self.point = kind, image, point
        self._mounted = False
        with image.open("wb") as file:
            file.truncate(MIB[kind] << 20)
        run(f"no {kind} could be made", *MKFS[kind], image)

    def mount(self, options: str) -> None:
        options = f"loop,{options}"
        run(f"{self.kind} cannot be mounted here", "mount", "-t", self.kind, "-o", options, self.image, self.point)
        self._mounted = True

    def unmount(self) -> None:
        run("it cannot be unmounted", "umount", self.point)
        self._mounted = False

    def let_go(self) -> None:
        """Unmount lazily, since a child may still be there after a failure."""
        if self._mounted:
            run("it cannot be unmounted", "umount", "--lazy", self.point)

    def cut(self) -> None:
        """Cut the power: from this moment on nothing reaches the disk, and what the file system had not written is lost."""
        point = os.open(self.point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(point, FS_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
        except OSError as error:
            pytest.fail(f"the kernel does not shut {self.kind} down (FS_IOC_SHUTDOWN): {error.strerror}")
        finally:
            os.close(point)


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    with in_memory(tmp_path) as memory, tempfile.TemporaryDirectory() as point:
        made = Disk(request.param, memory / "image", Path(point))
        try:
            yield made
        finally:
            made.let_go()


def test_a_cut_is_a_cut(disk: Disk) -> None:
    """After a cut, synced names and bytes are there, and unsynced ones are gone."""
    disk.mount("defaults")
    for name, synced in (("synced", True), ("unsynced", False)):
        with (disk.point / name).open("wb") as file:
            file.write(b"x" * 5000)
            if synced:
                file.flush()
                os.fsync(file.fileno())
    disk.cut()
    disk.unmount()
    disk.mount("defaults")
    assert (disk.point / "synced").read_bytes() == b"x" * 5000
    unsynced = disk.point / "unsynced"
    assert not unsynced.exists() or unsynced.read_bytes() != b"x" * 5000


async def start_and_set(directory: Path) -> None:
    async with Manager("lab", FileStorage(directory)) as state:
        await state.set("new", "v" * 5000)


def test_a_copied_directory(disk: Disk, tmp_path: Path) -> None:
    """A copied state that was not synced is there after a cut that follows the first commit."""
    asyncio.run(start_and_set(tmp_path / "old"))
    disk.mount("defaults")
    shutil.copytree(tmp_path / "old", disk.point / "new" / "state")

    async def commit_and_cut() -> None:
        state = Manager(Config(name="lab", flush_interval=0), FileStorage(disk.point / "new" / "state"))
        await state.start()
        await state.set("more", 1)
        await asyncio.to_thread(disk.cut)
        with contextlib.suppress(StorageError):
            await state.stop()

    asyncio.run(commit_and_cut())
    disk.unmount()
    disk.mount("defaults")

    async def found() -> dict[str, object]:
        async with Manager("lab", FileStorage(disk.point / "new" / "state")) as state:
            return await state.get_all()

    assert asyncio.run(found()) == {"new": "v" * 5000, "more": 1}


def test_files_that_cannot_be_replaced(disk: Disk, tmp_path: Path) -> None:
    """A file that is a mount point, or that `chattr` has made immutable, is refused at the start."""
    asyncio.run(start_and_set(tmp_path / "old"))
    snapshot = tmp_path / "old" / "lab.json"
    run("no bind mount", "mount", "--bind", snapshot, snapshot)
    try:
        with pytest.raises(UnsupportedError, match=r"lab\.json is a mount point"):
            asyncio.run(start_and_set(tmp_path / "old"))
    finally:
        run("it cannot be unmounted", "umount", snapshot)
    disk.mount("defaults")
    directory = Path(shutil.copytree(tmp_path / "old", disk.point / "state"))
    run("no chattr", "chattr", "+i", directory / "lab.json")
    with pytest.raises(UnsupportedError, match=r"lab\.json is immutable or append-only"):
        asyncio.run(start_and_set(directory))
    run("no chattr", "chattr", "-i", directory / "lab.json")
    run("no chattr", "chattr", "+a", directory)
    with pytest.raises(UnsupportedError, match=r"renaming .* failed: Operation not permitted; give this user"):
        asyncio.run(start_and_set(directory))
    run("no chattr", "chattr", "-a", directory)
    asyncio.run(start_and_set(directory))


async def make_damaged(directory: Path) -> dict[str, bytes]:
    """Make a state with a history, and damage its snapshot and its journal. Return their bytes."""
    for number in range(3):
        async with Manager("lab", FileStorage(directory, history=3600)) as state:
            await state.set("number", number)
            await state.set("large", f"{number}" * 50_000)
    for path in (directory / "lab.json", directory / "lab.journal"):
        path.write_bytes(path.read_bytes().replace(b"e", b"f"))
    return {path.name: path.read_bytes() for path in directory.glob("lab.j*")}


@pytest.mark.timeout(60 + 10 * CYCLES)
def test_a_restore_over_a_damaged_state(disk: Disk, tmp_path: Path) -> None:
    """After a cut at any time, each damaged file is whole: in its place or in `lab.damaged-…`. A restore that returned is there."""
    damaged = asyncio.run(make_damaged(tmp_path / "damaged"))
    dice, restored = random.Random(1), 0

    async def restore_and_cut(directory: Path, delay: float) -> bool:
        restoring = asyncio.create_task(restore_state("lab", FileStorage(directory), 2, into="lab"))
        await asyncio.wait([restoring], timeout=delay)
        has_returned = restoring.done() and restoring.exception() is None
        await asyncio.to_thread(disk.cut)
        with contextlib.suppress(StorageError):
            await restoring
        return has_returned

    for cycle in range(CYCLES):
        disk.mount(dice.choice(OPTIONS[disk.kind]))
        directory = Path(shutil.copytree(tmp_path / "damaged", disk.point / f"state-{cycle}"))
        is_synced = cycle % 2 == 0
        if is_synced:
            os.sync()
        has_returned = asyncio.run(restore_and_cut(directory, dice.random() * LONGEST_LIFE if cycle % 3 else 60))
        disk.unmount()
        disk.mount("defaults")
        if has_returned:
            view = asyncio.run(read_state("lab", FileStorage(directory)))
            assert asyncio.run(view.get("number")) == 0
        if has_returned or is_synced:
            for name, data in damaged.items():
                places = [directory / name, *directory.glob(f"lab.damaged-*/{name}")]
                assert any(path.exists() and path.read_bytes() == data for path in places)
        restored += has_returned
        disk.unmount()
    sys.stdout.write(
        f"{CYCLES} power cuts of {disk.kind} during a restore, {restored} after it: no damaged file was lost\n"
    )
    assert restored


@pytest.mark.timeout(60 + 10 * CYCLES)
def test_nothing_acknowledged_is_lost(disk: Disk, tmp_path: Path) -> None:
    """After each cut the state is a prefix of what was tried, with everything that was acknowledged before the cut."""
    dice, witness = random.Random(20_250_202), Witness()
    directory = disk.point / "state"
    with (tmp_path / "stderr").open("w") as stderr, zygote(directory, stderr.fileno()) as children:
        for cycle in range(1, CYCLES + 1):
            disk.mount(dice.choice(OPTIONS[disk.kind]))
            witness.never_started += 1
            cut = False
            for word, *rest in children.live(cycle, dice, LONGEST_LIFE):
                if word == "END":
                    # Everything read so far was acknowledged before the cut. After it, a sync may return
                    # without an error and without an effect: what is acknowledged then proves nothing.
                    disk.cut()
                    cut = True
                    with contextlib.suppress(ProcessLookupError):  # the error has killed it
                        os.kill(int(rest[0]), signal.SIGKILL)
                elif word == "DEAD":
                    assert cut, f"the child died by itself: {(tmp_path / 'stderr').read_text()[-2000:]}"
                else:
                    witness.hear(cycle, word, *rest, evidence=not cut)
            disk.unmount()
    disk.mount("defaults")
    asyncio.run(witness.check_the_end(directory))
    sys.stdout.write(
        f"{CYCLES} power cuts of {disk.kind}: {witness.all_acknowledged} changes acknowledged, none lost; "
        f"{witness.all_lost} tried and gone; {witness.never_started} cut before they had started\n"
    )
    assert witness.all_acknowledged > CYCLES
    assert witness.never_started < CYCLES
