"""Reads of a history: one moment of the oldest generation, beside the start of the same files; and the list of generations."""

from __future__ import annotations

import gc
import shutil
import statistics
from datetime import timedelta
from pathlib import Path

from measure import VALUE, Results, Scale, flusher_of, key_of, timed

from lab_state import Config, FileStorage, Manager, list_generations, read_state

_FEW = 100
_MANY = 1000
_LONGEST_LIST = 0.1


async def history_reads(results: Results, directory: str, scale: Scale) -> None:
    """Measure `read_state(at=)` and `list_generations`."""
    await _oldest(results, directory, scale)
    await _list(results, directory, scale.rounds * 3)


async def _make(storage: FileStorage, name: str, generations: int, keys: int) -> None:
    """Make a state with so many generations. The oldest snapshot has so many keys, and the others have few."""
    async with Manager(Config(name), storage) as state:
        for start in range(0, keys, 1000):
            await state.set_many({key_of(number): VALUE for number in range(start, min(start + 1000, keys))})
            await state.flush()
        await flusher_of(state).checkpoints.write(wait=True)
        await state.delete_all()
        await state.flush()
        for number in range(generations):
            await state.set("key", number)
            await state.flush()
            await flusher_of(state).checkpoints.write(wait=True)


async def _oldest(results: Results, directory: str, scale: Scale) -> None:
    storage = FileStorage(f"{directory}/old", history=timedelta(days=7), history_bytes=None)
    await _make(storage, "old", _FEW, scale.keys)
    found = await list_generations("old", storage)
    assert len(found) >= _FEW
    largest = max(Path(directory, "old", "old.history").glob("*.json"), key=lambda path: path.stat().st_size)
    whole = int(largest.name[:20])
    # The same files, as a state of their own: the large snapshot with its journal.
    alone = Path(directory, "alone")
    alone.mkdir()
    for end in ("json", "journal"):
        (file,) = Path(directory, "old", "old.history").glob(f"{whole:020}-*.{end}")
        shutil.copy(file, alone / f"old.{end}")
    kept = {path.name: path.read_bytes() for path in alone.iterdir()}

    async def read() -> None:
        view = await read_state("old", storage, at=whole)
        assert len(view) == scale.keys

    async def start() -> None:
        state = Manager(Config("old", flush_interval=None), FileStorage(alone))
        await state.start()
        states.append(state)

    states: list[Manager] = []
    pairs: list[tuple[float, float]] = []
    for _ in range(scale.rounds):
        gc.collect()
        pairs.append((await timed(read, collecting=True), await timed(start, collecting=True)))
        await states.pop().stop()
        for name, data in kept.items():
            (alone / name).write_bytes(data)
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    shown = f"{ratio:.2f} ({mine * 1e3:.0f} / {theirs * 1e3:.0f} ms)"
    results.add(f"read_state(at=) of the oldest of {len(found)} / its start()", shown, "<= 1.5", met=ratio <= 1.5)


async def _list(results: Results, directory: str, rounds: int) -> None:
    storage = FileStorage(f"{directory}/many", history=timedelta(days=7), history_bytes=None)
    await _make(storage, "many", _MANY, 10)

    async def listed() -> None:
        assert len(await list_generations("many", storage)) >= _MANY

    seconds = statistics.median([await timed(listed) for _ in range(rounds)])
    shown = f"{seconds * 1e3:.0f} ms"
    results.add(f"list_generations of {_MANY}", shown, "<= 100 ms", met=seconds <= _LONGEST_LIST)
