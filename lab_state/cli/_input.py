"""Parse the input of a writing subcommand, and decide whether a key has changed. This module does no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from lab_state._arguments import check_key
from lab_state._codec import Record
from lab_state._not_json import NOT_JSON, not_an_object
from lab_state._slices import Int64
from lab_state._values import encode_value
from lab_state.exceptions import InvalidValueError
from lab_state.shared._answers import raw_of


class Item(NamedTuple):
    """A value to store, with its expiry in milliseconds since 1970, if it has one."""

    value: Any
    expires: int | None = None


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """A line of `dump --nl`."""

    key: str
    value: Any
    expires: Int64 | None = None  # a larger one would make the state unreadable


_decode_line = msgspec.json.Decoder(_Line).decode


def parse_value(text: str | bytes, what: str = "the value") -> Any:
    """Return the value of a JSON text.

    Raises:
        InvalidValueError: The text is not the JSON of a value that a state can have.
    """
    try:
        value = msgspec.json.decode(text)
    except UnicodeEncodeError:  # the shell has passed bytes that are not UTF-8
        raise InvalidValueError(f"{what} is not in UTF-8: convert it") from None
    except NOT_JSON as error:
        hint = "; a string needs double quotes, such as '\"text\"' in a shell" if isinstance(text, str) else ""
        raise InvalidValueError(f"{what} is not JSON{_place(error)}{hint}") from None
    encode_value(value)
    return value


def json_of(value: Any) -> msgspec.Raw:
    """Return the JSON of a value.

    Raises:
        InvalidValueError: JSON cannot hold the value.
    """
    return raw_of(encode_value(value))


def parse_object(data: bytes) -> dict[str, Item]:
    """Return the items of one JSON object, as `dump` prints it.

    Raises:
        ValueError: The bytes are no such object, or it has a key or a value that a state cannot have.
    """
    try:
        values = msgspec.json.decode(data, type=dict[str, Any])
    except NOT_JSON as error:
        offset, text = not_an_object(data, error)
        why = text.split(";")[0]  # the rest is about the file of a state
        raise InvalidValueError(
            f"the input is not one JSON object (byte {offset}): {why}; for lines, add --nl"
        ) from None
    return {check_key(key): Item(_checked(value, f"the value of {key!r}")) for key, value in values.items()}


def parse_lines(data: bytes) -> dict[str, Item]:
    """Return the items of lines of JSON, as `dump --nl` prints them. Blank lines are skipped.

    Raises:
        ValueError: A line is not a line of `dump --nl`, or has a key of an earlier line, or a state cannot have its key or value.
    """
    items: dict[str, Item] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            key, value, expires = msgspec.structs.astuple(_decode_line(line))
        except NOT_JSON as error:
            raise InvalidValueError(
                f'line {number} is not {{"key":…,"value":…,"expires":…}}{_place(error)}; for one object, leave out --nl'
            ) from None
        if check_key(key) in items:
            raise InvalidValueError(f"line {number} has a key of an earlier line: {key!r}")
        items[key] = Item(_checked(value, f"the value in line {number}"), expires)
    return items


def _checked(value: Any, what: str) -> Any:
    try:
        encode_value(value)
    except InvalidValueError as error:
        raise InvalidValueError(f"{what}: {error}") from None
    return value


def _place(error: Exception) -> str:
    """Return the byte offset in an error of msgspec. The rest of the message may contain a value, so it is dropped."""
    _, found, place = str(error).rpartition("(byte ")
    return f" ({found[1:]}{place}" if found else ""


def has_changed(key: str, since: int, records: Iterable[Record], revision: int) -> bool | None:
    """Return whether a key was changed after a revision. Return `None` if the records do not show it.

    Args:
        key: The key.
        since: The revision.
        records: The records of the journal, oldest first.
        revision: The revision of the state, after all of these records.
    """
    newer = [record for record in records if record.end > since]
    # A record does not say in which order its changes were made. So each of them counts.
    if any(record.clear or key in record.set or key in record.delete for record in newer):
        return True
    first = newer[0].start if newer else revision
    return None if first > since else False
