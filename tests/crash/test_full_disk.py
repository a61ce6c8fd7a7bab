"""Disks that are really full for a while, at every byte: nothing acknowledged is lost, and room mends all by itself.

A limit on the size of files is there for every user; with the environment variable
`LAB_STATE_FULL_TMPFS=1` a small file system in memory is filled too, which root may mount.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from application import Plan
from lives import check_death, in_memory, zygote
from matrix import ALL, RUNS

LIMITS = range(60, 4000, 30 if RUNS >= ALL else 180)
"""Bytes. All of them with the whole fault matrix: `LAB_STATE_FAULT_RUNS=280`."""
PAGE = 4096
PAGES = 16


@pytest.mark.timeout(60 + 2 * len(LIMITS))
@pytest.mark.parametrize("patient", [False, True])
def test_a_limit_on_the_size_of_files(tmp_path: Path, *, patient: bool) -> None:
    """After a real short write and EFBIG at any offset, a caller that waits or flushes has everything in the end."""
    errors: Counter[str] = Counter()
    with in_memory(tmp_path) as directory, zygote() as children:
        for number, limit in enumerate(LIMITS):
            plan = Plan(
                directory=str(directory / "state"),
                interval=0 if patient or number % 4 < 2 else None,
                end="kill" if number % 2 else "stop",
                limit=limit,
                patient=patient,
            )
            life = children.live(plan)
            check_death(life)
            life.check()
            life.check_what_is_left()
            assert len(life.of("settled")) == 1
            errors.update(said["where"] for said in life.of("error"))
            errors["checkpoint"] += len(life.of("checkpoint failed"))
            shutil.rmtree(directory / "state")
    sys.stdout.write(f"{len(LIMITS)} limits: {dict(errors)}\n")
    assert errors["change" if patient else "flush"] > 0
    if RUNS >= ALL:  # a few limits strike few checkpoints, or none
        assert errors["checkpoint"] > 0


@contextmanager
def tmpfs() -> Iterator[Path]:
    """Mount a file system of 16 pages."""
    with tempfile.TemporaryDirectory() as point:
        command = ["mount", "-t", "tmpfs", "-o", f"size={PAGES * PAGE}", "tmpfs", point]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.fail(
                f"LAB_STATE_FULL_TMPFS=1 asks for a tmpfs, and this user may not mount: {mounted.stderr.strip()}"
            )
        try:
            yield Path(point)
        finally:
            subprocess.run(["umount", point], check=True)


@pytest.mark.skipif(
    os.environ.get("LAB_STATE_FULL_TMPFS") != "1", reason="asked for with LAB_STATE_FULL_TMPFS=1, as nox -s crash does"
)
@pytest.mark.parametrize("patient", [False, True])
def test_a_full_file_system(*, patient: bool) -> None:
    """With no page left, or a few, nothing acknowledged is lost, and free space fixes everything."""
    errors: Counter[str] = Counter()
    with tmpfs() as directory, zygote() as children:
        for left in range(PAGES):
            for end in ("kill", "stop"):
                ballast = directory / "ballast"
                ballast.write_bytes(b"x" * PAGE * (PAGES - left))
                plan = Plan(
                    directory=str(directory / "state"), interval=0, end=end, ballast=str(ballast), patient=patient
                )
                life = children.live(plan)
                check_death(life)
                life.check()
                ballast.unlink(missing_ok=True)
                life.check_what_is_left()
                errors.update(said["where"] for said in life.of("error"))
                errors["checkpoint"] += len(life.of("checkpoint failed"))
                shutil.rmtree(directory / "state", ignore_errors=True)
    sys.stdout.write(f"{PAGES} kinds of full: {dict(errors)}\n")
    assert min(errors["change"], errors["checkpoint"]) > 0
