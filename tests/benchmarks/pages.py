"""The tables of docs/benchmarks.md, and the plots, drawn from one run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import svg
from measure import Numbers
from svg import duration, short

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
_BLOCK = r"(<!-- bench: {name} -->\n).*?(<!-- end -->)"
OURS = "lab_state"
NONE = "-"
STALL = 1e-3


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def beside(seconds: float, ours: float) -> str:
    """Return a duration, and its ratio to ours."""
    return f"{duration(seconds)} ({_times(seconds / ours)})"


def _times(ratio: float) -> str:
    return f"{figures(ratio)} x"


def figures(number: float) -> str:
    """Return the number with two digits, since more would mean nothing."""
    return f"{float(f'{number:.2g}'):,g}" if number < 1000 else f"{_round(number):,}"


def checks(run: Numbers) -> str:
    rows = [row for part in run["checks"].values() for row in part]
    return table(
        ("work", "reached", "to reach", ""),
        (
            (row["work"], row["reached"], row["bound"], "" if not row["bound"] else "yes" if row["met"] else "**no**")
            for row in rows
        ),
    )


def peers(run: Numbers) -> str:
    rows = ((peer["name"], peer["survives"], peer["setup"]) for peer in run["peers"])
    return table(("", "a change that returned survives", "set up"), rows)


def survives(run: Numbers) -> dict[str, str]:
    return {peer["name"]: peer["survives"] for peer in run["peers"]}


def operations(run: Numbers) -> str:
    loops = run["numbers"]["operations"]
    rows = (
        (name, *(beside(found[name][call], found[OURS][call]) for found in loops.values() for call in ("get", "set")))
        for name in loops["asyncio"]
    )
    return table(("", *(f"`{call}`, {loop}" for loop in loops for call in ("get", "set"))), rows)


def writes(run: Numbers) -> str:
    loops, worth = run["numbers"]["writes"], survives(run)
    base = loops["asyncio"]
    rows = (
        (
            name,
            worth[name],
            beside(one["one"], base[OURS]["one"]),
            f"{one['hundred']:,.0f}",
            duration(one["p99"]),
            duration(loops["uvloop"][name]["one"]),
            f"{loops['uvloop'][name]['hundred']:,.0f}",
        )
        for name, one in base.items()
    )
    head = ("", "survives", "one task", "100 tasks, a second", "their p99")
    return table((*head, "uvloop: one task", "100 tasks, a second"), rows)


def stands(run: Numbers) -> str:
    """Return a table of how long the event loop stands still for each kind of call."""
    reads, durable = run["numbers"]["operations"]["asyncio"], run["numbers"]["writes"]["asyncio"]
    rows = (
        (
            name,
            *(stood(one[f"{call} stall"]) for call in ("get", "set")),
            *(stood(durable[name][f"{tasks} stall"]) if name in durable else NONE for tasks in ("one", "hundred")),
        )
        for name, one in reads.items()
    )
    return table(("", "`get`", "`set`", "made durable, one task", "made durable, 100 tasks"), rows)


def sizes(number: str, shown: Any) -> Any:
    """Return a table of one number over the sizes of the state."""

    def drawn(run: Numbers) -> str:
        by_size, worth = run["numbers"]["sizes"], survives(run)
        names = next(iter(by_size.values()))
        rows = (
            (name, worth[name], *(shown(found, name, number) if name in found else NONE for found in by_size.values()))
            for name in names
        )
        return table(("", "survives", *(f"{short(int(size))} keys" for size in by_size)), rows)

    return drawn


def _beside(found: Mapping[str, Numbers], name: str, number: str) -> str:
    return beside(found[name][number], found[OURS][number])


def _alone(found: Mapping[str, Numbers], name: str, number: str) -> str:
    return duration(found[name][number])


def _factor(found: Mapping[str, Numbers], name: str, number: str) -> str:
    return figures(found[name][number])


def _gap(found: Mapping[str, Numbers], name: str, number: str) -> str:
    return stood(found[name][number])


def stood(seconds: float) -> str:
    """Return a stall as text. Below a millisecond the heartbeat cannot tell it from an idle loop."""
    return duration(seconds) if seconds >= STALL else "< 1 ms"


def footprint(run: Numbers) -> str:
    rows = (
        (name, short(one["keys"]), f"{one['ratio']:.1f}", duration(max(0.0, one["import"])))
        for name, one in run["numbers"]["footprint"].items()
    )
    return table(("", "keys", "memory / JSON", "import"), rows)


def growth(run: Numbers) -> str:
    found = run["numbers"]["growth"]
    rows = (
        (row["call"], row["cost"], *map(duration, row["seconds"]), "**grows**" if row["grows"] else "")
        for row in found["rows"]
    )
    return table(("call", "cost", *(f"{short(count)} keys" for count in found["counts"]), ""), rows)


def machine(run: Numbers) -> str:
    return "".join(sorted({_machine(about) for about in run["machines"].values()}))


def _machine(about: Numbers) -> str:
    quick = ", a small run (`--quick`)" if about["quick"] else ""
    return (
        f"Measured on {about['date']}{quick}: Python {about['python']}, {about['cores']} cores, {about['system']}, "
        f"{about['disk']}.\n"
    )


TABLES = {
    "machine": machine,
    "peers": peers,
    "operations": operations,
    "writes": writes,
    "stands": stands,
    "sizes": sizes("change", _beside),
    "stalls": sizes("stall", _gap),
    "written": sizes("written", _factor),
    "starts": sizes("start", _alone),
    "footprint": footprint,
    "growth": growth,
    "checks": checks,
}
NEEDS = {"stands": {"operations", "writes"}, "stalls": {"sizes"}, "written": {"sizes"}, "starts": {"sizes"}}


def drawn(run: Numbers) -> dict[str, str]:
    """Return each table whose part was measured."""
    there = {"machine", "peers", "checks", *run["numbers"]}
    return {name: make(run) for name, make in TABLES.items() if NEEDS.get(name, {name}) <= there}


def show(run: Numbers) -> None:
    for name, text in drawn(run).items():
        print(f"\n{name}\n\n{text}", end="")


def colour(name: str) -> str:
    return svg.OURS if name == OURS else svg.DUMPS if name.startswith("dict") else svg.OTHERS


def named(run: Numbers, name: str) -> str:
    """Return the name, with a mark if a change that returned can still be lost."""
    return name + ("" if survives(run)[name] == "power cut" else " *")


MARK = "* survives SIGKILL, but not a power cut; all others survive both."


def plots(run: Numbers) -> dict[str, str]:
    found: dict[str, str] = {}
    if "sizes" in run["numbers"]:
        by_size = run["numbers"]["sizes"]
        biggest = max(by_size, key=int)
        series = [
            svg.Series(
                named(run, name), colour(name), {int(size): one[name]["change"] for size, one in by_size.items()}
            )
            for name in sorted(by_size[biggest], key=lambda name: -by_size[biggest][name]["change"])
        ]
        across = f"keys in the state; {MARK}" if any("*" in one.name for one in series) else "keys in the state"
        found["change"] = svg.lines("One durable change in a state of so many keys", across, series)
        stalls = sorted(((one["stall"], name) for name, one in by_size[biggest].items()))
        found["stall"] = svg.bars(
            f"How long the event loop stands still, one durable change in {short(int(biggest))} keys",
            "Logarithmic. Less is better. Longest gap of a 0.5 ms heartbeat, less that of an idle loop.",
            [(named(run, name), colour(name), max(value, STALL), stood(value)) for value, name in stalls],
            logarithmic=True,
        )
    if "writes" in run["numbers"]:
        rates = sorted(
            ((one["hundred"], name) for name, one in run["numbers"]["writes"]["asyncio"].items()), reverse=True
        )
        found["writes"] = svg.bars(
            "Writes a second from 100 tasks, each waiting for its own",
            f"More is better. {MARK}",
            [(named(run, name), colour(name), rate, f"{_round(rate):,}") for rate, name in rates],
        )
    return found


def _round(number: float) -> int:
    """Round to two digits."""
    return int(round(number, 1 - math.floor(math.log10(number)))) if number else 0


def draw(run: Numbers, parts: Iterable[str]) -> None:
    """Put the tables between their markers, and the plots beside the page."""
    missing = set(parts) - run["machines"].keys()
    if missing:
        raise SystemExit(f"not measured: {', '.join(sorted(missing))}; the page is of all parts, or it says half")
    page = PAGE.read_text()
    for name, text in drawn(run).items():
        place = re.search(_BLOCK.format(name=name), page, re.DOTALL)
        if place is None:
            raise SystemExit(f"{PAGE} has no place for the table {name!r}: <!-- bench: {name} --> ... <!-- end -->")
        page = f"{page[: place.end(1)]}\n{text}\n{page[place.start(2) :]}"
    PAGE.write_text(page)
    IMAGES.mkdir(exist_ok=True)
    for name, picture in plots(run).items():
        (IMAGES / f"{name}.svg").write_text(picture)
