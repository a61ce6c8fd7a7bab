"""The subcommands that print keys and values: `get`, `keys` and `dump`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import msgspec

from lab_state._entries import Expiring, Stored
from lab_state.cli._exits import no_key
from lab_state.cli._output import Output
from lab_state.cli._storages import described, entries_of, expiry_of, json_of, raw_of, read, sorted_items
from lab_state.cli._target import Target
from lab_state.cli._text import live_text

_AT_ONCE = 1000

_encode = msgspec.json.Encoder().encode


async def get(output: Output, state: Target, key: str, at: str | None, *, json: bool) -> None:
    """Print the value of a key."""
    view = await read(state, at)
    stored = entries_of(view).get(key)
    if stored is None:
        raise no_key(key, state)
    if json:
        value = msgspec.Raw(raw_of(stored))
        output.one(key=key, value=value, expires=expiry_of(stored), **described(view))
        return
    data = raw_of(stored)
    output.raw(msgspec.json.format(data, indent=2) if output.is_terminal else data)
    output.hint(f"{live_text(view.live)}; revision {view.revision}, durable {view.durable_revision}")


async def keys(
    output: Output,
    state: Target,
    prefix: str,
    at: str | None,
    *,
    after: str | None,
    limit: int | None,
    tree: bool,
    json: bool,
    nl: bool,
) -> None:
    """Print the keys with a prefix, in order."""
    view = await read(state, at)
    found = await view.keys(prefix, after=after, limit=None if tree else limit)
    if tree:
        for depth, name, count in branches(found, limit):
            if nl:
                output.json({"depth": depth, "name": name, "keys": count})
            else:
                output.line(
                    "  " * depth + output.text(name) + (f"  ({count})" if count > 1 or name[-1:] == "/" else "")
                )
    elif nl:
        for key in found:
            output.json(key)
    elif json:
        output.one(keys=found, **described(view))
    else:
        for key in found:
            output.line(output.text(key))


def branches(keys: list[str], limit: int | None) -> list[tuple[int, str, int]]:
    """Return the lines of a tree of sorted keys, which are split after each `/`: depth, name and number of keys. At most `limit` lines."""
    lines: list[tuple[int, str, int]] = []
    counts: dict[str, int] = {}
    for key in keys:
        for branch in _branches_of(key):
            counts[branch] = counts.get(branch, 0) + 1
    for branch in sorted(counts):
        if limit is not None and len(lines) >= limit:
            break
        depth = branch.count("/", 0, -1)
        lines.append((depth, branch[branch.rfind("/", 0, -1) + 1 :], counts[branch]))
    return lines


def _branches_of(key: str) -> list[str]:
    ends = [at + 1 for at, char in enumerate(key) if char == "/"]
    return [key[:end] for end in ends if end < len(key)] + [key]


async def dump(output: Output, state: Target, prefix: str, at: str | None, *, nl: bool) -> None:
    """Print the whole state: one object, or a line for each key."""
    view = await read(state, at)
    items = sorted_items(view, prefix)
    if nl:
        while some := list(islice(items, _AT_ONCE)):
            output.part(_joined(some, line_of, b"\n") + b"\n")
        return
    opening = b"{"
    while some := list(islice(items, _AT_ONCE)):
        output.part(opening + _joined(some, _member_of, b",\n"))
        opening = b",\n"
    output.raw(b"{}" if opening == b"{" else b"}")


def _joined(items: list[tuple[str, Stored]], form: Callable[[str, Stored, bytes], bytes], between: bytes) -> bytes:
    """Return the items in lines. Only a file of another program has values of several lines. So one check covers all values."""
    data = between.join([form(key, stored, json_of(stored)) for key, stored in items])
    if data.count(b"\n") == len(items) - 1 and b"\r" not in data:
        return data
    return between.join([form(key, stored, raw_of(stored)) for key, stored in items])


def _member_of(key: str, _stored: Stored, value: bytes) -> bytes:
    return b"%s:%s" % (_encode(key), value)


def line_of(key: str, stored: Stored, value: bytes) -> bytes:
    """Return the line of `dump --nl` for a key and the JSON of its value, without its end."""
    if isinstance(stored, Expiring):
        return b'{"key":%s,"value":%s,"expires":%d}' % (_encode(key), value, stored.at)
    return b'{"key":%s,"value":%s,"expires":null}' % (_encode(key), value)
