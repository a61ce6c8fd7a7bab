"""The figures that lab_state is held to, and those of what a user would pick instead, as ratios within one run.

Run with `nox -s bench`; `-- --quick` for a small run. Where sides are compared they take
turns, since machines drift, and the figure is the median of several rounds; memory is
measured once, in a process of its own, and what a call costs at each size is the median
of its calls. An absolute figure says what this machine did today, no more.

`--json FILE` keeps a run; with parts of it measured anew, the others stay. `--docs` draws
the tables and plots of docs/benchmarks.md, and the README's, and `--draw FILE` does so
from a run that was kept: of all parts, or not at all. `--rows FILE` puts the rows of some
parts alone into the table of goals; say in the page when they were measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import calls
import commands
import durable
import growth
import history
import history_reads
import hot
import large
import many
import migrations
import mirror
import pages
import ranges
import scan
import shared
import stalls
import uvloop
import versus
from measure import FULL, QUICK, Numbers, Results

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
PARTS = [
    "hot",
    "handles",
    "durable",
    "history",
    "large",
    "mirror",
    "values",
    "stalls",
    "scan",
    "calls",
    "imports",
    "memory",
    "operations",
    "writes",
    "sizes",
    "footprint",
    "growth",
    "many",
    "migrations",
    "shared",
    "command",
]


def run(work: Coroutine[Any, Any, None], loop: str = "asyncio") -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(work)


def measure(results: Results, part: str, directory: str, *, quick: bool) -> None:  # noqa: PLR0912 -- one for each part
    scale = QUICK if quick else FULL
    count = scale.keys
    results.part = part
    if part in {"hot", "handles"}:
        run((hot.hot_path if part == "hot" else hot.handles)(results, directory))
    elif part == "durable":
        run(durable.durable(results, directory, count, scale.rounds))
    elif part == "history":
        run(history.history(results, directory, scale))
        run(history_reads.history_reads(results, directory, scale))
    elif part == "large":
        run(large.large(results, directory, count))
    elif part == "mirror":
        run(mirror.mirror(results, directory, count))
    elif part == "values":
        run(stalls.values(results, quick=quick))
    elif part == "stalls":
        run(stalls.stalls(results, directory, quick=quick))
    elif part == "scan":
        run(scan.scan(results, directory, count))
        run(ranges.ranges(results, directory, scale))
    elif part == "calls":
        run(calls.calls(results, directory, count))
    elif part == "imports":
        large.imports(results)
    elif part == "memory":
        large.memory(results, directory, count)
    elif part == "sizes":
        run(versus.sizes(results, directory, scale))
    elif part == "footprint":
        versus.footprint(results, directory, scale)
    elif part == "growth":
        run(growth.growth(results, directory, [1000, count // 10, count]))
    elif part == "shared":
        run(shared.shared(results, directory, scale))
    elif part == "migrations":
        migrations.migrations(results, directory, count)
    elif part == "command":
        commands.command(results, directory, count, scale.rounds)
    elif part == "many":
        run(many.many(results, directory, count // 100))
    else:
        for loop in LOOPS:
            work = versus.operations if part == "operations" else versus.writes
            run(work(results, directory, loop, scale), loop)


def machine(directory: str, *, quick: bool) -> Numbers:
    """Return where and when it was measured; a figure without that says nothing."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", directory], capture_output=True, text=True, check=True)
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "disk": kind.stdout.strip(),
        "quick": quick,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer keys and rounds")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the run; parts not measured now stay as in it")
    parser.add_argument("--docs", action="store_true", help="draw the tables and plots of the documentation")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="measure nothing, draw from a run that was kept")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="measure nothing, put the rows of a kept run into the page"
    )
    parser.add_argument("--directory", help="on the disk to measure; where temporary files go, if left out")
    arguments = parser.parse_args()
    if arguments.draw:
        pages.draw(json.loads(arguments.draw.read_text()), PARTS)
        return
    if arguments.rows:
        pages.add_rows(json.loads(arguments.rows.read_text()))
        return
    results = Results()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        about = machine(directory, quick=arguments.quick)
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        for part in PARTS:
            if not arguments.only or part in arguments.only:
                begin = time.perf_counter()
                measure(results, part, directory, quick=arguments.quick)
                print(f"-- {part}: {time.perf_counter() - begin:.0f} s", flush=True)
    results.machines = dict.fromkeys(results.numbers.keys() | results.checks.keys(), about)
    if arguments.json and arguments.json.exists():
        results.take(json.loads(arguments.json.read_text()))
    kept = {"peers": versus.described(), **results.as_json()}
    if arguments.json:
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    pages.show(kept)
    if arguments.docs:
        pages.draw(kept, PARTS)


if __name__ == "__main__":
    main()
