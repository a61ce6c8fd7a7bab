"""The output of the command: data to stdout, everything else to stderr."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO, cast

import msgspec

from lab_state.cli._exits import BROKEN_PIPE, UNAVAILABLE, Stop
from lab_state.cli._text import as_utf8, columns, shown, shown_json
from lab_state.storage import _fs as fs

FORMAT = 1
"""The version of the JSON of each subcommand."""

_AT_ONCE = 64 * 1024

_CLOSED = frozenset({errno.EPIPE, errno.EBADF})

_encode = msgspec.json.Encoder().encode


class Output:
    """The two streams of one run of the command.

    Attributes:
        is_terminal: Whether stdout is a terminal. On a terminal, no character is written that could control it.
    """

    def __init__(self) -> None:
        self.is_terminal: bool = sys.stdout.isatty()
        self._encoding = sys.stdout.encoding
        self._parts: list[bytes] = []
        self._size = 0

    # Data

    def text(self, text: str) -> str:
        """Return a text, such as a key, as it is shown in a line for people."""
        return shown(text, self._encoding)

    def json_text(self, data: bytes) -> str:
        """Return JSON as it is shown in a line for people."""
        return shown_json(data.decode(), self._encoding)

    def line(self, text: str) -> None:
        """Write a line for people. The caller has passed each key in it through `text`."""
        self._write(text.encode(self._encoding, "backslashreplace") + b"\n")

    def json(self, value: Any) -> None:
        """Write a value as JSON in one line. A byte of a path that is not UTF-8 is escaped."""
        try:
            data = _encode(value)
        except UnicodeEncodeError:
            data = _encode(_in_utf8(value))
        self.raw(data)

    def one(self, **members: Any) -> None:
        """Write the JSON of a subcommand whose output is one object: its first member is the format."""
        self.json({"format": FORMAT, **members})

    def raw(self, data: bytes) -> None:
        """Write JSON, and end the line. On a terminal, characters that could control it are escaped. Elsewhere the bytes are not changed."""
        self.part(data)
        self._write(b"\n")

    def part(self, data: bytes) -> None:
        """Write a part of JSON, as `raw` does, without the end of the line."""
        if self.is_terminal:
            data = self.json_text(data).encode(self._encoding)
        self._write(data)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
        """Write a table. Its cells are for people: the caller has passed each key in them through `text`."""
        if self.is_terminal:
            self._rich_table(head, rows, right)
            return
        for line in columns(head, rows, right):
            self.line(line)

    def _rich_table(self, head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
        from rich.console import Console  # noqa: PLC0415 -- 30 ms, and only a terminal needs it
        from rich.table import Table  # noqa: PLC0415 -- only a terminal needs it
        from rich.text import Text  # noqa: PLC0415 -- only a terminal needs it

        table = Table(box=None, pad_edge=False, header_style="bold")
        for place, name in enumerate(head):
            table.add_column(name, justify="right" if place in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self.flush()
        Console().print(table)

    def _write(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        if self._size >= _AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write the collected bytes.

        Raises:
            Stop: The bytes cannot be written: the reader has closed the pipe, stdout is closed, or there is no room.
        """
        parts, self._parts, self._size = self._parts, [], 0
        try:
            sys.stdout.buffer.write(b"".join(parts))
            sys.stdout.buffer.flush()
        except OSError as error:
            raise unwritten(error) from None
        except KeyboardInterrupt:
            drop(sys.stdout)
            raise

    # Everything else

    def note(self, text: str) -> None:
        """Write a line to stderr, after the data so far."""
        self.flush()
        note(text)

    def hint(self, text: str) -> None:
        """Write a line to stderr, if it is a terminal."""
        if sys.stderr.isatty():
            self.note(text)


def _in_utf8(value: object) -> object:
    """Return the value of a line of JSON, with `as_utf8` applied to each text in it."""
    if isinstance(value, dict):
        return {name: _in_utf8(member) for name, member in cast("dict[str, object]", value).items()}
    if isinstance(value, list):
        return [_in_utf8(one) for one in cast("list[object]", value)]
    return as_utf8(value) if isinstance(value, str) else value


def note(text: str) -> None:
    """Write a line to stderr. Characters that could control a terminal are escaped. If stderr cannot be written, drop the line."""
    safe = "".join(char if char == "\n" or char.isprintable() else shown(char) for char in text)
    try:
        sys.stderr.write(safe.encode(sys.stderr.encoding, "backslashreplace").decode(sys.stderr.encoding) + "\n")
        sys.stderr.flush()
    except OSError:
        drop(sys.stderr)


def drop(stream: TextIO) -> None:
    """Drop the text that a stream still holds. Otherwise the interpreter would write it at exit, which may fail again, or block."""
    null = fs.open_null(os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def unwritten(error: OSError) -> Stop:
    """Drop the rest of the output, and return the end of a run that cannot write to stdout. A closed pipe needs no message."""
    drop(sys.stdout)
    if error.errno in _CLOSED:
        return Stop(BROKEN_PIPE)
    return Stop(UNAVAILABLE, f"stdout cannot be written: {error.strerror}")


def open_closed_streams() -> None:
    """Open the standard streams that are closed. Otherwise a file of the state could get the descriptor of such a stream.

    After that, stdin is empty, writing to stdout fails, and text for stderr is dropped.
    """
    for name, flags, mode in (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fs.open_null(flags), mode))
