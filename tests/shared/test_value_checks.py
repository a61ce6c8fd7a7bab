"""The values of clients without a schema, which the owner checks."""

from __future__ import annotations

import pytest
from msgspec import Raw

from lab_state import InvalidValueError, Schema
from lab_state.shared._messages import Call, Changes, Delete, MakeChanges, Set, SetIfAbsent, SetMany
from lab_state.shared._value_checks import ValueChecks

BAD, GOOD = Raw(b'"x"'), Raw(b"1")


def calls(value: Raw) -> list[Call]:
    """Return one call of each kind that stores a value."""
    return [
        Set(1, 0, "a", value, None),
        SetIfAbsent(1, 0, "a", value, None),
        SetMany(1, 0, {"b": GOOD, "a": value}, None),
        MakeChanges(1, 0, 0, [], [], Changes(set={"a": value})),
    ]


def test_each_call_is_checked() -> None:
    """Only the values of the added clients are checked, at once or in steps, until they are forgotten. Other calls have no values."""
    types = Schema(1, types={"a": int}).checks
    assert types is not None
    checks = ValueChecks(types.check)
    checks.add("it")
    for call in calls(BAD):
        with pytest.raises(InvalidValueError, match="the value of 'a' does not fit the schema"):
            checks.run("it", call)
        steps = checks.run_in_steps("it", call)
        with pytest.raises(StopIteration) as stop:
            while True:
                next(steps)
        assert isinstance(stop.value.value, InvalidValueError)
        checks.run("other", call)
        checks.run(None, call)
        assert list(checks.run_in_steps("other", call)) == []
        ValueChecks(None).run("it", call)
    for call in [*calls(GOOD), Delete(1, 0, "a")]:
        checks.run("it", call)
        list(checks.run_in_steps("it", call))
    checks.forget("it")
    checks.forget("it")
    checks.run("it", calls(BAD)[0])
