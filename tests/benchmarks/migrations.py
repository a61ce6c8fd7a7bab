"""The migration of a large state: its time, its memory, and the start of a state that needs none.

The bound is the time in which msgspec decodes and encodes each value once for each migration. The functions of both
migrations are those of a user, so their time counts, too. Times are processor time of the whole process, so other
processes on the machine count little.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from measure import Results

from lab_state import Config, FileStorage, Manager, MigrationDraft, Schema

VALUE: dict[str, Any] = {
    "id": 12345,
    "name": "Ann Example",
    "email": "user@mail.example.org",
    "active": True,
    "score": 12.5,
}
ROUNDS = 5
NAME = "people"


class User(msgspec.Struct):
    """The type of the newest version."""

    id: int
    first: str
    last: str
    mail: str
    active: bool
    score: float


def split(draft: MigrationDraft) -> None:
    for key, user in draft.items("users/"):
        user["first"], _, user["last"] = user.pop("name").partition(" ")
        draft.set(key, user)


def rename(draft: MigrationDraft) -> None:
    for key, user in draft.items("users/"):
        user["mail"] = user.pop("email")
        draft.set(key, user)


def schema() -> Schema:
    made = Schema(3, types={"users/": User})
    made.migration(to=2)(split)
    made.migration(to=3)(rename)
    return made


def write(directory: str, count: int) -> None:
    """Write a state of version 1, as a program without a schema leaves it."""
    values = {f"users/{number:07}": VALUE | {"id": number} for number in range(count)}
    (Path(directory) / f"{NAME}.json").write_bytes(msgspec.json.encode(values))

    async def settle() -> None:
        async with Manager(NAME, FileStorage(directory)) as state:
            await state.set("n", count)

    asyncio.run(settle())


def msgspec_seconds(count: int) -> float:
    """Return the time in which msgspec decodes and encodes the values twice."""
    stored = [msgspec.json.encode(VALUE | {"id": number}) for number in range(count)]
    decode, encode = msgspec.json.Decoder().decode, msgspec.json.Encoder().encode
    begin = time.process_time()
    for _ in range(2):
        stored = [encode(decode(data)) for data in stored]
    return time.process_time() - begin


async def start_seconds(directory: str, code: Schema | None) -> float:
    """Return the time of a start. The state is left as it was started."""
    state = Manager(Config(NAME, flush_interval=None), FileStorage(directory), schema=code)
    begin = time.process_time()
    await state.start()
    taken = time.process_time() - begin
    assert state._flusher is not None
    await state._flusher.abort().aclose()
    return taken


def child(directory: str, code: str) -> dict[str, float]:
    """Start in a process of its own, and return the seconds, and the memory now and at its highest, in MB."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, directory, code], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def migrations(results: Results, directory: str, count: int) -> None:
    """Measure both migrations, and starts without one."""
    Path(directory).mkdir(exist_ok=True)
    bounds, ratios, plain, migrated = [], [], [], []
    memory: list[float] = []
    for number in range(3):
        place = f"{directory}/migrations-{number}"
        Path(place).mkdir()
        write(place, count)
        bounds.append(msgspec_seconds(count))
        without = child(place, "none")
        found = child(place, "schema")
        plain.append(without["seconds"])
        migrated.append(found["seconds"] - without["seconds"])
        ratios.append(migrated[-1] / bounds[-1])
        memory.append(found["highest"] / without["now"])
    ratio, most = statistics.median(ratios), statistics.median(memory)
    reached = f"{ratio:.2f} x, {statistics.median(migrated):.1f} s"
    results.add(f"two migrations of {count:,} values, of msgspec alone", reached, "3 x", met=ratio <= 3)
    results.add("memory at its highest, of that after a plain start", f"{most:.2f} x", "2 x", met=most <= 2)

    place = f"{directory}/migrations-0"
    starts: dict[str, list[float]] = {"same": [], "any": []}
    for _ in range(ROUNDS):
        for code, found_seconds in starts.items():
            found_seconds.append(child(place, code)["seconds"])
    with_schema, without_schema = (statistics.median(starts[code]) for code in ("same", "any"))
    change = with_schema / without_schema - 1
    results.add(
        "a start with a schema, of one without", f"{change:+.1%}, {with_schema:.2f} s", "noise: 5 %", met=change <= 0.05
    )
    results.put(
        keys=count,
        msgspec_seconds=statistics.median(bounds),
        start_seconds=statistics.median(plain),
        migration_seconds=statistics.median(migrated),
        memory=most,
        start_with_schema=with_schema,
        start_without_schema=without_schema,
    )


def _memory(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    from lab_state._migrations import ANY  # noqa: PLC0415 -- a start without the checks of a schema

    directory, code = sys.argv[1:]
    codes: dict[str, Schema | None] = {"none": None, "any": ANY, "schema": schema(), "same": schema()}
    seconds = asyncio.run(start_seconds(directory, codes[code]))
    print(json.dumps({"seconds": seconds, "now": _memory("VmRSS"), "highest": _memory("VmHWM")}))


if __name__ == "__main__":
    main()
