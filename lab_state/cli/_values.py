"""The subcommands that print keys and values: `get`, `keys` and `dump`."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from lab_state._entries import Stored
from lab_state.cli._exits import USAGE, Stop, no_key
from lab_state.cli._output import Output
from lab_state.cli._storages import described, entries_of, expiry_of, is_line, json_of, raw_of, read
from lab_state.cli._target import Target
from lab_state.cli._text import moment_text

_AT_ONCE = 1000

_encode_lines = msgspec.json.Encoder().encode_lines


async def get(output: Output, state: Target, key: str, at: str | None, *, json: bool) -> None:
    """Print the value of a key."""
    view = await read(state, at)
    stored = entries_of(view).get(key)
    if stored is None:
        raise no_key(key, state)
    if json:
        value = Raw(raw_of(stored))
        output.one(key=key, value=value, expires=expiry_of(stored), **described(view))
        return
    data = raw_of(stored)
    output.raw(msgspec.json.format(data, indent=2) if output.is_terminal else data)
    output.hint(moment_text(view.live, view.revision, view.durable_revision))


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
    if json and (nl or tree):
        raise Stop(USAGE, "--json and --nl exclude each other, and a tree is printed only as lines: use --nl")
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
    """Return the lines of a tree of sorted keys, which are split after each `/`: depth, name and number of keys. Return at most `limit` lines."""
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


class _Line(msgspec.Struct, gc=False):
    """A line of `dump --nl`. msgspec writes many of them in one call, and copies each stored value as it is."""

    key: str
    value: object
    expires: int | None = None


async def dump(output: Output, state: Target, prefix: str, at: str | None, *, nl: bool) -> None:
    """Print the keys with a prefix and their values: one object, or a line for each key."""
    view = await read(state, at)
    entries = entries_of(view)
    keys = sorted(key for key in entries if key.startswith(prefix)) if prefix else sorted(entries)
    if not (nl or keys):
        output.raw(b"{}")
        return
    for start in range(0, len(keys), _AT_ONCE):
        some = keys[start : start + _AT_ONCE]
        if nl:
            output.part(_lines_of(some, entries))
        else:
            output.part((b",\n" if start else b"{") + _members_of(some, entries))
    if not nl:
        output.raw(b"}")


def _lines_of(keys: list[str], entries: dict[str, Stored]) -> bytes:
    """Return the lines of `dump --nl` for some keys."""
    data = _encode_lines(
        [_Line(key, stored) if (stored := entries[key]).__class__ is Raw else _line(key, stored) for key in keys]
    )
    # Only a file of another program has values with line breaks or tabs. So one check covers all values.
    if is_line(data, len(keys)):
        return data
    return _encode_lines([_Line(key, Raw(raw_of(entries[key])), expiry_of(entries[key])) for key in keys])


def _line(key: str, stored: Stored) -> _Line:
    return _Line(key, Raw(json_of(stored)), expiry_of(stored))


def _members_of(keys: list[str], entries: dict[str, Stored]) -> bytes:
    """Return some members of the object that `dump` prints, one a line."""
    names = _encode_lines(keys).split(b"\n")
    data = b",\n".join([b"%b:%b" % (name, json_of(entries[key])) for name, key in zip(names, keys, strict=False)])
    if is_line(data, len(keys) - 1):
        return data
    return b",\n".join([b"%b:%b" % (name, raw_of(entries[key])) for name, key in zip(names, keys, strict=False)])
