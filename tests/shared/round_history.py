"""The history of a round: the calls of all processes, and what each process showed.

Each process appends its events to a file of its own, one JSON object a line. So the file survives the
process. All times are those of `CLOCK_MONOTONIC`, in nanoseconds, which is one clock for the machine.

Each call has an id that no other call has, and what it stores contains this id. So the effect of a call can
be recognised in each state:

* `n/...`: a number. Each call adds another power of 4, so the digits of the number in base 4 count the calls.
* `l/...`: a list of ids. Each call appends its id. Nothing else changes the list.
* `s/...`: the id of the call that has stored it. Such a key may be deleted.
* `e/...`: the same, with a time to live.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

Kind: TypeAlias = Literal[
    "incr",  # `incr` of a number
    "append",  # `update` of a list
    "append_both",  # `transact`: reads two lists, and appends to both. The result has both lists as they were
    "set",
    "set_many",
    "delete",
    "delete_all",
    "pop",
    "add",  # `set_if_absent`
    "get_or_set",
    "claim",  # `transact`: reads a key, and stores the id if the key is missing. The result is the value that was read
    "look",  # `transact` that only reads. The result has the values
    "expire",  # `set` with a time to live
    "mismatch",  # `incr` of a list, which raises
    "raise",  # `update` with a function that raises
    "catch_up",
    "wait",  # `wait_revision`
]

Outcome: TypeAlias = Literal["ok", "not made", "unknown", "raised"]
"""`raised`: the call has raised an error of its own, such as a type mismatch, and has changed nothing."""

ABSENT = None
"""The value of a key that is missing. No call stores it."""


class Began(msgspec.Struct, tag="began", tag_field="event"):
    """A call begins. `digit` is the exponent of the power of 4 that an `incr` adds; `wanted` the revision of a `wait`."""

    call: str
    kind: Kind
    keys: list[str]
    at: int
    digit: int = -1
    wanted: int = 0


class Ended(msgspec.Struct, tag="ended", tag_field="event"):
    """A call ends.

    Attributes:
        revision: The revision of its answer; `None` if the process did not get one.
        seen: The revision of the copy of the process at this moment.
        error: The error, for messages.
    """

    call: str
    at: int
    outcome: Outcome
    seen: int
    result: Any = None
    revision: int | None = None
    error: str = ""


class Saw(msgspec.Struct, tag="saw", tag_field="event"):
    """A process reads all keys in one step. Keys that expire are apart, because time alone changes them."""

    at: int
    revision: int
    values: dict[str, Any]
    passing: dict[str, Any] = {}


class Durable(msgspec.Struct, tag="durable", tag_field="event"):
    """The process, which owns the state, knows that a revision is durable. Nothing of it was shown before."""

    at: int
    revision: int


class Note(msgspec.Struct, tag="note", tag_field="event"):
    """Something that is only for people who read the history."""

    at: int
    text: str


class Gone(msgspec.Struct, tag="gone", tag_field="event"):
    """The process has ended. `how` is `"killed"`, `"stopped"`, or the error that ended it."""

    at: int
    how: str


Event: TypeAlias = Began | Ended | Saw | Durable | Note | Gone

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Began | Ended | Saw | Durable | Note | Gone).decode


class History:
    """The history of this process, as lines in a file."""

    def __init__(self, path: str) -> None:
        """Create the file, or open it."""
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, event: Event) -> None:
        """Append an event, with one write."""
        os.write(self._fd, encode(event) + b"\n")

    def say(self, text: str) -> None:
        """Append a note."""
        self.add(Note(time.monotonic_ns(), text))


class Process(msgspec.Struct):
    """The events of one process, in order."""

    name: str
    events: list[Event]


def read(path: Path) -> Process:
    """Read the events of a process. A last line that the kill has cut is left out."""
    lines = path.read_bytes().split(b"\n")
    return Process(path.stem, [decode(line) for line in lines[:-1]])
