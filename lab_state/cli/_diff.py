"""The subcommand `diff`: it compares two states, or two moments of a state. `differences` does no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Raw

from lab_state._entries import MISSING, Absent, Stored
from lab_state._state_view import StateView
from lab_state.cli._exits import NOT_FOUND, Stop
from lab_state.cli._output import Output
from lab_state.cli._storages import entries_of, expiry_of, raw_of, read
from lab_state.cli._target import parse_state, split_moment
from lab_state.cli._text import time_text

_SHOWN = 60
"""The largest number of characters of a value in a line for people."""


Entry: TypeAlias = Stored | Literal[Absent.MISSING]


class Difference(NamedTuple):
    """A key whose entries before and after differ. A missing entry is `MISSING`."""

    key: str
    before: Entry
    after: Entry

    @property
    def kind(self) -> str:
        """The kind of the difference: `added`, `removed` or `changed`."""
        return "added" if self.before is MISSING else "removed" if self.after is MISSING else "changed"


def differences(before: dict[str, Stored], after: dict[str, Stored]) -> Iterator[Difference]:
    """Yield the keys with different values or expiry times, and the keys that only one of the states has, in order."""
    keys = [key for key, stored in before.items() if not _is_same(stored, after.get(key, MISSING))]
    keys += [key for key in after if key not in before]
    for key in sorted(keys):
        yield Difference(key, before.get(key, MISSING), after.get(key, MISSING))


def _is_same(one: Stored, other: Entry) -> bool:
    if other is MISSING or expiry_of(one) != expiry_of(other):
        return False
    first, second = raw_of(one), raw_of(other)
    return first == second or _canonical(first) == _canonical(second)


def _canonical(data: bytes) -> bytes:
    """Return the JSON with sorted members. Then equal values have equal bytes, and 1 differs from 1.0 and from true."""
    return msgspec.json.encode(msgspec.json.decode(data), order="sorted")


async def diff(output: Output, first: str, second: str, *, nl: bool) -> None:
    """Print the differences. The exit code is 1 if there are any."""
    before, after = [entries_of(await _read(text)) for text in (first, second)]
    is_different = False
    for found in differences(before, after):
        is_different = True
        if nl:
            output.json(_line(found))
        else:
            _show(output, found)
    if is_different:
        raise Stop(NOT_FOUND)


async def _read(text: str) -> StateView:
    state, when = split_moment(text)
    return await read(parse_state(state), when)


def _line(found: Difference) -> dict[str, Any]:
    line: dict[str, Any] = {"key": found.key, "kind": found.kind}
    for name, stored in (("before", found.before), ("after", found.after)):
        if not isinstance(stored, Absent):
            line[name] = {"value": Raw(raw_of(stored)), "expires": expiry_of(stored)}
    return line


def _show(output: Output, found: Difference) -> None:
    sign = {"added": "+", "removed": "-", "changed": "~"}[found.kind]
    values = " -> ".join(
        _short(output, stored) for stored in (found.before, found.after) if not isinstance(stored, Absent)
    )
    output.line(f"{sign} {output.text(found.key)}  {values}")


def _short(output: Output, stored: Stored) -> str:
    text = output.json_text(raw_of(stored))
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    at = expiry_of(stored)
    return text if at is None else f"{text} (expires {time_text(at)})"
