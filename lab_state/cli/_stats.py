"""The subcommand `stats`: the sizes of keys and prefixes, and the keys that expire. `count` does no I/O."""

from __future__ import annotations

from collections import Counter
from heapq import nlargest
from typing import NamedTuple

from msgspec import Raw

from lab_state._entries import Expiring, Stored
from lab_state.cli._output import Output
from lab_state.cli._storages import described, entries_of, raw_of, read
from lab_state.cli._target import Target
from lab_state.cli._text import counted, moment_text, size_text, time_text

PERCENTS = (50, 90, 99, 100)
_SPANS = (("minute", 60_000), ("hour", 3_600_000), ("day", 86_400_000))


class Counts(NamedTuple):
    """The figures of a state. A size is the number of bytes of key and value, in UTF-8.

    Attributes:
        keys: The number of keys.
        size: The size of all keys.
        prefixes: For each prefix the number of its keys, and their size. A prefix is the beginning of a key, up to and
            including the first `/`. It is empty for a key without a `/`.
        largest: The largest keys, with their sizes.
        percentiles: For each of `PERCENTS`: the size that this percentage of the keys does not exceed.
        expiring: The number of keys that expire.
        within: The number of keys that expire within a minute, an hour and a day.
        next: The first expiry, in milliseconds since 1970; `None` if no key expires.
    """

    keys: int
    size: int
    prefixes: dict[str, tuple[int, int]]
    largest: list[tuple[str, int]]
    percentiles: dict[int, int]
    expiring: int
    within: dict[str, int]
    next: int | None


def count(entries: dict[str, Stored], now: int, top: int) -> Counts:
    """Return the figures of entries. `now` is in milliseconds since 1970, and `top` the number of largest keys."""
    keys: Counter[str] = Counter()
    bytes_of: Counter[str] = Counter()
    sizes: list[int] = []
    times: list[int] = []
    for key, stored in entries.items():
        value = stored
        if isinstance(value, Expiring):
            times.append(value.at)
            value = value.value
        size = memoryview(value).nbytes if isinstance(value, Raw) else len(raw_of(value))
        size += len(key) if key.isascii() else len(key.encode())
        sizes.append(size)
        prefix = key[: key.find("/") + 1]
        keys[prefix] += 1
        bytes_of[prefix] += size
    largest = nlargest(top, zip(sizes, entries, strict=True))
    ordered = sorted(sizes)
    return Counts(
        len(sizes),
        sum(sizes),
        {prefix: (keys[prefix], size) for prefix, size in bytes_of.most_common()},
        [(key, size) for size, key in largest],
        {percent: ordered[max(0, -(-len(ordered) * percent // 100) - 1)] for percent in PERCENTS if ordered},
        len(times),
        {name: sum(at <= now + span for at in times) for name, span in _SPANS},
        min(times, default=None),
    )


async def stats(output: Output, state: Target, at: str | None, *, top: int, json: bool) -> None:
    """Print the figures of a state."""
    view = await read(state, at)
    found = count(entries_of(view), view._core.state.now(), top)  # noqa: SLF001 -- a view has no public call for its time
    if json:
        output.one(
            **described(view),
            keys=found.keys,
            bytes=found.size,
            prefixes=[{"prefix": name, "keys": keys, "bytes": size} for name, (keys, size) in found.prefixes.items()],
            largest=[{"key": key, "bytes": size} for key, size in found.largest],
            percentiles={str(percent): size for percent, size in found.percentiles.items()},
            expiring={"keys": found.expiring, "next": found.next, "within": found.within},
        )
        return
    output.line(moment_text(view.live, view.revision, view.durable_revision))
    output.line(f"{counted(found.keys, 'key')}, {size_text(found.size)}")
    percentiles = ", ".join(f"{percent} % up to {size_text(size)}" for percent, size in found.percentiles.items())
    if found.keys:
        output.line(f"a key with its value: {percentiles}")
    if found.expiring:
        within = ", ".join(f"{number} within one {name}" for name, number in found.within.items())
        output.line(f"expiring keys: {found.expiring}; {within}; the next at {time_text(found.next)}")
    shown = list(found.prefixes.items())[: max(top, 1)]
    if shown:
        output.line("")
        rows = [[output.text(name) or "(no prefix)", str(keys), size_text(size)] for name, (keys, size) in shown]
        output.table(("PREFIX", "KEYS", "BYTES"), rows, right=(1, 2))
        if len(found.prefixes) > len(shown):
            output.line(f"and {len(found.prefixes) - len(shown)} more")
    if found.largest:
        output.line("")
        rows = [[output.text(key), size_text(size)] for key, size in found.largest]
        output.table(("LARGEST KEYS", "BYTES"), rows, right=(1,))
