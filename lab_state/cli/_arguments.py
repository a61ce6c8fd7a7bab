"""The types of arguments that several subcommands have, with their shell completion."""

from __future__ import annotations

import os
import re
from typing import Any

import click
from click.shell_completion import CompletionItem

from lab_state.cli._target import S3, Place, Target, parse_place, parse_state

_SUFFIXES = (".json", ".journal")

_KEPT = re.compile(r"\.(?:history|damaged-\d+(?:-\d+)?)$")
"""The end of the name of a directory that lab_state itself makes beside a state."""

_MOST_LEVELS = 8
"""The largest number of levels of directories that one completion searches. There is a bound, because links may lead in a circle."""


class StateType(click.ParamType[Target]):
    """STATE: `directory/name`, the path of its `.json`, or `s3://bucket/prefix/name`."""

    name = "state"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Target:
        """Return the target, or end with a usage error."""
        try:
            return parse_state(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the states and the directories whose names begin with the incomplete text."""
        return [CompletionItem(name) for name in complete(incomplete)]


class PlaceType(click.ParamType[Place]):
    """DIRECTORY: a directory, or `s3://bucket/prefix`."""

    name = "directory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        """Return the place, or end with a usage error."""
        try:
            return parse_place(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete the name of a directory."""
        return [CompletionItem(incomplete, type="dir")]


def complete(text: str) -> list[str]:
    """Return the states on disk and the directories whose paths begin with a text, for a shell. A directory ends in a slash.

    If a directory is the only offer, offer its content instead. Otherwise a shell would add a space after the directory.
    """
    found = _offers(text)
    for _ in range(_MOST_LEVELS):
        if len(found) != 1 or not found[0].endswith("/"):
            break
        found = _offers(found[0]) or found
    return found


def _offers(text: str) -> list[str]:
    if text.startswith(S3):
        return []
    head, slash, last = text.rpartition("/")
    try:
        with os.scandir(head + slash or ".") as entries:
            found = {_offer(entry) for entry in entries if entry.name.startswith(last)}
    except OSError:
        return []
    return [f"{head}{slash}{name}" for name in sorted(found - {""})]


def _offer(entry: os.DirEntry[str]) -> str:
    if entry.is_dir():
        return "" if _KEPT.search(entry.name) else f"{entry.name}/"
    stem, suffix = os.path.splitext(entry.name)
    return stem if suffix in _SUFFIXES else ""


STATE = StateType()
PLACE = PlaceType()
