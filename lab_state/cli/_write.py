"""The subcommands that change a state: `set`, `delete`, `load` and `edit`."""

from __future__ import annotations

import sys

import msgspec

from lab_state._arguments import check_key, milliseconds
from lab_state.cli._editing import edited, is_same
from lab_state.cli._exits import NOT_FOUND, Stop, no_key
from lab_state.cli._input import parse_lines, parse_object, parse_value
from lab_state.cli._output import Output
from lab_state.cli._run import read_input
from lab_state.cli._storages import check_deposes, entries_of, expiry_of, raw_of, read
from lab_state.cli._target import Target
from lab_state.cli._text import counted
from lab_state.cli._writers import writer
from lab_state.exceptions import InvalidValueError


async def set_(
    output: Output,
    state: Target,
    key: str,
    value: str,
    *,
    ttl: float | None,
    since: int | None,
    create: bool,
    depose: bool,
    json: bool,
) -> None:
    """Store a value."""
    check_key(key)
    found = parse_value(value)
    if ttl is not None:
        milliseconds(ttl)
    async with writer(state, create=create, depose=depose) as writing:
        revision = await writing.set(key, found, ttl, since)
    _done(output, revision, json=json)


async def delete(output: Output, state: Target, keys: tuple[str, ...], *, depose: bool, json: bool) -> None:
    """Delete keys. The exit code is 1 if one of them did not exist."""
    wanted = list(dict.fromkeys(map(check_key, keys)))
    async with writer(state, depose=depose) as writing:
        count, revision = await writing.delete(wanted)
    if json:
        output.one(revision=revision, deleted=count)
    else:
        output.line(f"deleted {count}; revision {revision}")
    if count < len(wanted):
        raise Stop(NOT_FOUND, f"{len(wanted) - count} of {counted(len(wanted), 'key')} did not exist")


async def load(
    output: Output, state: Target, *, nl: bool, replace: bool, create: bool, depose: bool, json: bool
) -> None:
    """Store what `dump` has printed, as one change. All of the input is checked before the state is opened."""
    if sys.stdin.isatty():
        output.note("lab-state: reading from the terminal; end with Ctrl-D")
    data = read_input()
    items = parse_lines(data) if nl else parse_object(data)
    async with writer(state, create=create, depose=depose) as writing:
        count, revision = await writing.load(items, replace=replace)
    if json:
        output.one(revision=revision, keys=count)
    else:
        output.line(f"loaded {counted(count, 'key')}; revision {revision}")


async def edit(output: Output, state: Target, key: str, *, depose: bool, json: bool) -> None:
    """Edit a value in an editor, and store it if it was changed."""
    check_deposes(state, depose=depose)
    view = await read(state)
    stored = entries_of(view).get(key)
    if stored is None:
        raise no_key(key, state)
    before = raw_of(stored)
    text = msgspec.json.format(before, indent=2) + b"\n"
    with edited(text) as found:
        if is_same(text, found):
            output.note("lab-state: not changed, nothing was written")
            return
        try:
            value = parse_value(found, "the edited value")
        except InvalidValueError as error:
            raise InvalidValueError(f"{error}: nothing was written") from None
        async with writer(state, depose=depose) as writing:
            revision = await writing.replace(key, before, expiry_of(stored), value, view.revision)
    _done(output, revision, json=json)


def _done(output: Output, revision: int, *, json: bool) -> None:
    if json:
        output.one(revision=revision)
    else:
        output.line(f"revision {revision}")
