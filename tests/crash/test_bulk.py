"""SIGKILL of a writer that loads in bulk: the loss is bounded, and what is found is the state at one revision."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab_state import FileStorage, Manager
from lab_state._early import MANY_BYTES

PAGE = 50_000
AHEAD = 2 * MANY_BYTES // (2 * PAGE)
"""So many changes of two pages are two records of 8 MiB. The writer is never further ahead of what is durable."""

LOADER = f"""
import asyncio, sys
from lab_state import Config, FileStorage, Manager

async def main():
    async with Manager(Config(name="bulk", flush_interval=3600), FileStorage(sys.argv[1])) as state:
        number = 0
        while True:
            number += 1
            pages = {{f"left {{number}}": "x" * {PAGE}, f"right {{number}}": "y" * {PAGE}}}
            if number % 2:
                await state.set_many(pages)
            else:
                async with state.transaction() as tx:
                    for key, page in pages.items():
                        tx.set(key, page)
                        await asyncio.sleep(0)
            print(number, flush=True)
            await asyncio.sleep(0)
            await state.wait_durable(max(0, number - {AHEAD}))

asyncio.run(main())
"""


async def found(directory: Path) -> list[str]:
    async with Manager("bulk", FileStorage(directory)) as state:
        return await state.keys()


@pytest.mark.parametrize("killed_after", [200, 301])
def test_a_bulk_writer_loses_two_records_at_most(tmp_path: Path, killed_after: int) -> None:
    """With a flush interval of an hour, SIGKILL amid 20 to 30 MB loses the last 16 MiB at most, and splits no change."""
    with subprocess.Popen([sys.executable, "-c", LOADER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as loader:
        assert loader.stdout is not None
        written = 0
        for line in loader.stdout:
            written = int(line)
            if written == killed_after:
                loader.send_signal(signal.SIGKILL)
    assert loader.returncode == -signal.SIGKILL
    assert written >= killed_after
    keys = asyncio.run(found(tmp_path))
    last = len(keys) // 2
    assert sorted(keys) == sorted(f"{side} {number}" for side in ("left", "right") for number in range(1, last + 1))
    assert written - AHEAD - 1 <= last <= written + 1
