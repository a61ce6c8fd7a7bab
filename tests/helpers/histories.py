"""Histories for tests: a state with several generations, and the model of all its moments."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

from running import flusher_of

from lab_state import FileStorage, Manager
from lab_state import _journal as journal
from lab_state._journal import ANY_BASE, NO_BASE, FrameKind
from lab_state.storage._generations import Moment, format_name, journal_file, moment_of_snapshot, snapshot_file
from lab_state.testing import ManualClock

START = 1_700_000_000.0


def link_files(directory: Path, name: str = "lab") -> None:
    """Link the files in use into the history, as a writer does before it replaces them."""
    target = directory / f"{name}.history"
    target.mkdir(mode=0o700, exist_ok=True)
    snapshot, base = directory / f"{name}.json", NO_BASE
    first = Moment(0, 0)
    links: list[tuple[Path, str]] = []
    if snapshot.exists():
        data = snapshot.read_bytes()
        base = journal.base_of(len(data), zlib.crc32(data))
        first = moment_of_snapshot(data) or first
        links.append((snapshot, format_name(snapshot_file(*first, base))))
    path = directory / f"{name}.journal"
    scan = journal.scan(path.read_bytes(), name, str(path))
    if scan.frames and scan.frames[0].kind is FrameKind.FULL:
        first = moment_of_snapshot(scan.frames[0].payload) or first
    elif scan.header.base != base:
        first = Moment(0, 0)
    if any(kind is not FrameKind.CHECKPOINT for kind, _ in scan.frames):
        header = scan.header
        links.append((path, format_name(journal_file(first.revision, header.wall, header.base, header.salt))))
        if header.base == ANY_BASE:
            links = links[-1:]
    for file, link in links:
        if not (target / link).exists():
            os.link(file, target / link)


async def checkpoint(state: Manager) -> None:
    checkpoints = flusher_of(state).checkpoints
    checkpoints.start()
    await checkpoints.ended()


async def make_history(
    directory: Path, clock: ManualClock, *, generations: int = 3, records: int = 4, name: str = "lab"
) -> dict[int, tuple[float, dict[str, Any]]]:
    """Make a state with generations of some records each, one second apart. Return the time and the values of each revision."""
    model: dict[int, tuple[float, dict[str, Any]]] = {}
    async with Manager(name, FileStorage(directory), clock=clock) as state:
        for generation in range(generations):
            for number in range(records):
                clock.advance(1)
                await state.set(f"key-{number}", [generation, number])
                await state.flush()
                model[state.revision] = clock.time(), await state.get_all()
            if generation < generations - 1:
                clock.advance(1)
                link_files(directory, name)
                await checkpoint(state)
        clock.advance(1)
        link_files(directory, name)
    return model
