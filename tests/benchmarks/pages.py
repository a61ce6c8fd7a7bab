"""The tables of docs/benchmarks.md, written from one run; the plots are drawn from the tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import plots
from measure import Numbers
from plots import NONE, OURS, PAGE, rounded, stall_text
from svg import duration, short

_BLOCK = r"(<!-- bench: {name} -->\n).*?(<!-- end -->)"


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
    return f"{float(f'{number:.2g}'):,g}" if number < 1000 else rounded(number)


def checks(run: Numbers) -> str:
    rows = [row for part in run["checks"].values() for row in part]
    return table(
        ("what is measured", "result", "goal", "met"),
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
    head = ("time for each write, one task", plots.RATE, "of 100 tasks, 99 of 100 writes take at most")
    loop = ("uvloop: time for each write, one task", "uvloop: writes a second, 100 tasks")
    return table(("", "survives", *head, *loop), rows)


def blocked(run: Numbers) -> str:
    """Return a table of the longest stall of the event loop during each kind of call."""
    reads, durable = run["numbers"]["operations"]["asyncio"], run["numbers"]["writes"]["asyncio"]
    rows = (
        (
            name,
            *(stall_text(one[f"{call} stall"]) for call in ("get", "set")),
            *(stall_text(durable[name][f"{tasks} stall"]) if name in durable else NONE for tasks in ("one", "hundred")),
        )
        for name, one in reads.items()
    )
    return table(("", "`get`", "`set`", "durable writes, one task", "durable writes, 100 tasks"), rows)


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
    return stall_text(found[name][number])


def footprint(run: Numbers) -> str:
    rows = (
        (name, short(one["keys"]), f"{one['ratio']:.1f}", duration(max(0.0, one["import"])))
        for name, one in run["numbers"]["footprint"].items()
    )
    return table(("", "keys", "memory / size of the JSON", "time to import"), rows)


def growth(run: Numbers) -> str:
    found = run["numbers"]["growth"]
    rows = (
        (row["call"], row["cost"], *map(duration, row["seconds"]), "**grows**" if row["grows"] else "")
        for row in found["rows"]
    )
    return table(("call", "cost", *(f"{short(count)} keys" for count in found["counts"]), ""), rows)


def scans(run: Numbers) -> str:
    found = run["numbers"]["scan"]
    rows = (
        (name, *(beside(one[size], found["scans"][OURS][size]) for size in ("10", "1000")), found["setup"][name])
        for name, one in found["scans"].items()
    )
    return table(("", "10 keys", "1,000 keys", "how"), rows)


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
    "blocked": blocked,
    "sizes": sizes("change", _beside),
    "stalls": sizes("stall", _gap),
    "written": sizes("written", _factor),
    "starts": sizes("start", _alone),
    "footprint": footprint,
    "growth": growth,
    "scan": scans,
    "checks": checks,
}
NEEDS = {"blocked": {"operations", "writes"}, "stalls": {"sizes"}, "written": {"sizes"}, "starts": {"sizes"}}


def drawn(run: Numbers) -> dict[str, str]:
    """Return each table whose part was measured."""
    there = {"machine", "peers", "checks", *run["numbers"]}
    return {name: make(run) for name, make in TABLES.items() if NEEDS.get(name, {name}) <= there}


def show(run: Numbers) -> None:
    for name, text in drawn(run).items():
        print(f"\n{name}\n\n{text}", end="")


def draw(run: Numbers, parts: Iterable[str]) -> None:
    """Put the tables between their markers, and the plots beside the page."""
    missing = set(parts) - run["machines"].keys()
    if missing:
        raise SystemExit(f"not measured: {', '.join(sorted(missing))}; the page is of all parts, or it says half")
    page = PAGE.read_text()
    for name, text in drawn(run).items():
        page = _with_table(page, name, text)
    PAGE.write_text(page)
    plots.draw()


_OF_ONE_PART = ("growth", "scan")
"""Tables that have all figures of one part."""


def add_rows(run: Numbers) -> None:
    """Put the rows of some parts into the table of checks, in place of the rows for the same work, or at the end.

    A table that belongs to one of these parts alone is replaced.
    """
    page = with_rows(PAGE.read_text(), checks(run).splitlines()[2:])
    for name, text in drawn(run).items():
        if name in _OF_ONE_PART:
            page = _with_table(page, name, text)
    PAGE.write_text(page)


def with_rows(page: str, rows: Iterable[str]) -> str:
    """Return the page with these rows in its table of checks."""
    place = _place(page, "checks")
    lines = page[place.end(1) : place.start(2)].strip().splitlines()
    at = {_work(line): number for number, line in enumerate(lines)}
    for row in rows:
        if (number := at.get(_work(row))) is None:
            lines.append(row)
        else:
            lines[number] = row
    return _with_table(page, "checks", "\n".join(lines) + "\n")


def _with_table(page: str, name: str, text: str) -> str:
    """Return the page with a new text of a table."""
    place = _place(page, name)
    return f"{page[: place.end(1)]}\n{text}\n{page[place.start(2) :]}"


def _work(row: str) -> str:
    """Return the first cell of a row: what is measured."""
    return row.partition(" | ")[0]


def _place(page: str, name: str) -> re.Match[str]:
    """Return the place of a table in the page."""
    place = re.search(_BLOCK.format(name=name), page, re.DOTALL)
    if place is None:
        raise SystemExit(f"{PAGE} has no place for the table {name!r}: <!-- bench: {name} --> ... <!-- end -->")
    return place
