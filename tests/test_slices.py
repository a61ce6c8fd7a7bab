"""Large JSON in slices: decoded slice by slice, it has the same contents as when it is decoded at once."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from lab_state import _slices
from lab_state._codec import encode_record
from lab_state._entries import DELETED, ChangeSet, Expiring, Json, StoredOrGone
from lab_state._slices import TAB, members, names, times, unsliced
from lab_state.shared._frames import BadMessageError
from lab_state.shared._records import ParsedRecord, parse_in_steps, parse_record

R = TypeVar("R")

values = st.none() | st.integers(-9, 9) | st.sampled_from(["", "tab\t", "é", '"', "x" * 300])
stored = values | st.sampled_from(["[1,2]", "{}", '{\t"a":\t1,\t"b":[\t]}', "[\t1\t]"]).map(
    lambda text: Json(text.encode())
)
changed = stored | st.just(DELETED) | st.builds(Expiring, stored, st.integers(0, 2**40))
records = st.dictionaries(st.text("abcé", min_size=1, max_size=4), changed, max_size=12)


def steps_of(steps: Generator[None, None, R]) -> tuple[R, int]:
    """Run all steps. Return the result, and the number of pauses between them."""
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value, count
        count += 1


def slice_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a slice have at most two keys, so that small records have several slices."""
    monkeypatch.setattr(_slices, "MOST_AT_ONCE", 2)
    monkeypatch.setattr("lab_state._codec.MOST_AT_ONCE", 2)
    monkeypatch.setattr(_slices, "_KEY_BYTES", 128)
    monkeypatch.setattr(_slices, "SLICE_BYTES", 256)


def record(changes: dict[str, StoredOrGone], calls: Any = None) -> bytes:
    taken = ChangeSet(1, 2, cleared=False, changes=changes, since=0.0, time=5, wall=6)
    return b"".join(encode_record(taken, calls))


def result(data: bytes, *, in_steps: bool) -> ParsedRecord | str:
    """Return the contents of a record, or the text of the error."""
    try:
        found = steps_of(parse_in_steps(data))[0] if in_steps else parse_record(data)
    except BadMessageError as error:
        return str(error)
    if found.calls is None:
        return found
    # Two `Raw` of the same text are not equal.
    return found._replace(calls=msgspec.json.decode(msgspec.json.encode(found.calls)))


@given(changes=records)
def test_a_record_in_slices_has_the_same_contents(changes: dict[str, StoredOrGone]) -> None:
    """Slices with and without tabs in their values are decoded as the whole record is."""
    with pytest.MonkeyPatch.context() as patch:
        slice_small(patch)
        data = record(changes, {"a" * 32: (3, {4: Raw(b'{"set":{\t},"delete":[\t],"expires":{\t}}')})})
    assert len(changes) <= 2 or data.count(TAB) >= 6
    assert result(data, in_steps=True) == result(data, in_steps=False)
    assert isinstance(result(data, in_steps=True), ParsedRecord)


@given(changes=records, seed=st.data())
def test_a_damaged_record_is_refused_in_both_ways(changes: dict[str, StoredOrGone], seed: st.DataObject) -> None:
    """Whatever the bytes are, both ways find the same contents, or refuse the record."""
    with pytest.MonkeyPatch.context() as patch:
        slice_small(patch)
        data = record(changes)
    at, until = sorted(seed.draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    new = seed.draw(
        st.sampled_from([b"", b"\t", b",", b"}", b"]\t", b"{\t", b'"', b"\xff", b"null", data[at:until] * 2])
    )
    damaged = data[:at] + new + data[until:]
    found, expected = result(damaged, in_steps=True), result(damaged, in_steps=False)
    assert found == expected or (isinstance(found, str) and isinstance(expected, str))


def test_each_slice_is_a_step() -> None:
    """The decoder pauses after each slice."""
    changes: dict[str, StoredOrGone] = {f"key {number}": number for number in range(2_000)}
    found, pauses = steps_of(unsliced(record(changes)))
    assert found is not None
    assert (len(found.contents[0]), found.contents[1:], len(found.frame), pauses) == (2_000, [[], {}], 4, 5)


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b'\t{"set":{}}',
        b'{"set":\t{}}',
        b'{"set":{\t"a":1}}',
        b'{"set":{\t"a":1\t"b":2\t}}',
        b'{"set":{\t"a":1\t,\t}}',
        b'{"set":{\t\t}}',
        b'{"delete":[\t"a"\t1\t]}',
        b'{"set":{\t"a":1\t}\t}',
        b'{"x":"' + b"x" * 65536 + b'","set":{\t"a":1\t}}',
    ],
)
def test_a_text_that_was_not_written_in_slices(text: bytes) -> None:
    """Tabs at other places say nothing. The caller decodes the text at once."""
    assert steps_of(unsliced(text))[0] is None


def test_the_times_of_a_record_are_numbers() -> None:
    """A slice of `expires` with anything else is not decoded."""
    parts = [b'{"set":{', *members([{"a": 1}], TAB), b'\t},"expires":{', *times({"a": 5}, TAB), b'\t},"delete":[']
    data = b"".join([*parts, *names(["b", "c"], TAB), b"\t]}"])
    found = steps_of(unsliced(data))[0]
    assert found is not None
    assert found.contents[1:] == [{"a": 5}, ["b", "c"]]
    assert steps_of(unsliced(data.replace(b"5", b"5.5")))[0] is None
