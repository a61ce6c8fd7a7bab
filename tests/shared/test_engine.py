"""The owner's engine: what each call does on the layer, and when it is answered."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import Raw
from owner_parts import (
    A,
    B,
    PureOwner,
    change,
    delete,
    delete_all,
    delete_many,
    incr,
    raw,
    set_,
    set_if_absent,
    set_many,
    touch,
)

from lab_state._calls import Calls
from lab_state._entries import Expiring, Json
from lab_state.exceptions import InvalidValueError, KeyNotFoundError, TypeMismatchError
from lab_state.shared._checks import MOST_KEYS
from lab_state.shared._clients import FORGOTTEN_AFTER
from lab_state.shared._executed import Executed
from lab_state.shared._messages import Call, Failed, Moved, Ok, Raised, Refused

MINUTE = FORGOTTEN_AFTER / 1_000_000_000


@pytest.fixture
def owner() -> PureOwner:
    made = PureOwner({"text": "old", "number": 5, "list": [1, 2]})
    for client in (A, B):
        assert made.engine.admit(client, None)
    return made


def done(executed: Executed[bytes] | Refused) -> tuple[bytes, bool]:
    """Return the result of a call that was executed, and whether it changed something."""
    assert isinstance(executed, Executed)
    return executed.result, executed.changed


# What each call does

CHANGING: dict[str, tuple[Call, Any, dict[str, Any]]] = {
    "set": (set_(1, "text", "new"), None, {"text": "new"}),
    "set of an object": (set_(1, "new", {"a": 1}), None, {"new": Json(b'{"a":1}')}),
    "set_many": (set_many(1, {"text": "new", "more": 1}), None, {"text": "new", "more": 1}),
    "set_if_absent": (set_if_absent(1, "more", [0]), True, {"more": Json(b"[0]")}),
    "incr": (incr(1, "number", 3), 8, {"number": 8}),
    "incr of a missing key": (incr(1, "more", 0.5, kind="float", default=1), 1.5, {"more": 1.5}),
    "delete": (delete(1, "text"), True, {"text": None}),
    "delete_many": (delete_many(1, "text", "list", "missing"), 2, {"text": None, "list": None}),
    "delete_all": (delete_all(1, "t"), 1, {"text": None}),
    "clear": (delete_all(1), 3, {"text": None, "number": None, "list": None}),
    "touch": (touch(1, "text", 500), True, {"text": Expiring("old", 1_000_500)}),
    "set with a ttl": (set_(1, "text", "new", 57), None, {"text": Expiring("new", 1_000_057)}),
    "set_many with a ttl": (set_many(1, {"more": 1}, 57), None, {"more": Expiring(1, 1_000_057)}),
    "set_if_absent with a ttl": (set_if_absent(1, "more", 1, 57), True, {"more": Expiring(1, 1_000_057)}),
    "incr with a ttl": (incr(1, "more", ttl=57), 1, {"more": Expiring(1, 1_000_057)}),
    "change": (
        change(1, 10, ["text"], {"text": "new"}, deleted=("list", "missing")),
        None,
        {"text": "new", "list": None},
    ),
    "change with an expiry": (
        change(1, 10, [], {"text": "new"}, expires={"text": 7}),
        None,
        {"text": Expiring("new", 7)},
    ),
    "change with a clear": (
        change(1, 10, [], {"more": 1}, clear=True, deleted=("text",)),
        None,
        {"text": None, "number": None, "list": None, "more": 1},
    ),
}


@pytest.mark.parametrize("case", CHANGING)
def test_a_call_changes_the_layer_alone(owner: PureOwner, case: str) -> None:
    """A call has its result at once. The layer has the change, and the copy gets it with the record."""
    call, result, changes = CHANGING[case]
    assert done(owner.engine.execute(call)) == (bytes(raw(result)), True)
    assert owner.layer.revision == 11
    assert (owner.copy.revision, owner.copy.count()) == (10, 3)
    before = dict(owner.copy.entries.items())
    expected = {key: value for key, value in {**before, **changes}.items() if value is not None}
    assert dict(owner.layer.entries.items()) == expected
    owner.commit()
    assert dict(owner.copy.entries.items()) == expected


UNCHANGING: dict[str, tuple[Call, Any]] = {
    "set_many of nothing": (set_many(1, {}), None),
    "set_if_absent": (set_if_absent(1, "text", "new"), False),
    "delete": (delete(1, "missing"), False),
    "delete_many": (delete_many(1, "missing"), 0),
    "delete_all": (delete_all(1, "missing"), 0),
    "touch": (touch(1, "missing", None), False),
    "change": (change(1, 10, ["text"]), None),
    "change that deletes nothing": (change(1, 10, [], deleted=("missing",)), None),
}


@pytest.mark.parametrize("case", UNCHANGING)
def test_a_call_may_change_nothing(owner: PureOwner, case: str) -> None:
    """A call that finds nothing to do has its result, and no revision of its own."""
    call, result = UNCHANGING[case]
    assert done(owner.engine.execute(call)) == (bytes(raw(result)), False)
    assert owner.layer.revision == 10


def test_a_clear_of_nothing_is_no_change() -> None:
    """Clearing an empty state changes nothing, as a call of its own and in a transaction."""
    owner = PureOwner()
    assert done(owner.engine.execute(delete_all(1))) == (b"0", False)
    assert done(owner.engine.execute(change(1, 10, [], clear=True))) == (b"null", False)


@pytest.mark.parametrize(
    ("call", "kind", "text", "path"),
    [
        (incr(1, "text"), TypeMismatchError, "key 'text': the value is not a number, but a str", "$"),
        (incr(1, "number", 0.5, kind="int"), TypeMismatchError, "'number'", "$"),
        (incr(1, "missing", 1.7e308, default=1.7e308), InvalidValueError, "JSON", "$"),
    ],
)
def test_the_stored_value_may_forbid_a_call(
    owner: PureOwner, call: Call, kind: type[Exception], text: str, path: str
) -> None:
    """The error is that of a state that is not shared. Nothing is changed."""
    executed = owner.engine.execute(call)
    assert isinstance(executed, Executed)
    assert (executed.changed, executed.at, executed.revision) == (False, 10, 10)
    with pytest.raises(kind, match=text) as raised:
        _ = executed.result
    assert getattr(raised.value, "path", None) == path
    answer = owner.engine.call("left", A, call)
    assert answer == Raised(1, 10, kind.__name__, str(raised.value), path)  # type: ignore[arg-type]


# Answers


def test_a_change_is_answered_with_the_end_of_its_record(owner: PureOwner) -> None:
    """Calls that share a record get the same revision, and answers are grouped by connection."""
    assert owner.engine.call("left", A, set_(1, "a", 1)) is None
    assert owner.engine.call("right", B, incr(1, "number")) is None
    assert owner.engine.call("left", A, set_if_absent(2, "b", 1)) is None
    assert owner.commit() == {
        "left": [Ok(1, 13, Raw(b"null")), Ok(2, 13, Raw(b"true"))],
        "right": [Ok(1, 13, Raw(b"6"))],
    }
    assert owner.commit() == {}


def test_a_call_waits_for_what_it_saw(owner: PureOwner) -> None:
    """A call that changed nothing is answered at once if what it saw is durable, and with that revision otherwise."""
    assert owner.engine.call("left", A, delete(1, "missing")) == Ok(1, 10, Raw(b"false"))
    owner.engine.call("left", A, set_(2, "a", 1))
    assert owner.engine.call("right", B, set_if_absent(1, "a", 2)) is None
    assert owner.engine.call("right", B, incr(2, "text")) is None
    owner.engine.call("left", A, set_(3, "b", 1))
    text = "key 'text': the value is not a number, but a str"
    assert owner.commit() == {
        "left": [Ok(2, 12, Raw(b"null")), Ok(3, 12, Raw(b"null"))],
        "right": [Ok(1, 11, Raw(b"false")), Raised(2, 11, "TypeMismatchError", text, "$")],
    }


def test_a_call_during_a_commit_waits_for_the_next(owner: PureOwner) -> None:
    """The answers of one connection may belong to two records."""
    owner.engine.call("left", A, set_(1, "a", 1))
    owner.begin()
    owner.engine.call("left", A, set_(2, "a", 2))
    owner.engine.call("right", B, set_(1, "b", 2))
    assert owner.land() == {"left": [Ok(1, 11, Raw(b"null"))]}
    assert owner.commit() == {"left": [Ok(2, 13, Raw(b"null"))], "right": [Ok(1, 13, Raw(b"null"))]}


def test_a_connection_that_ended_gets_no_answer(owner: PureOwner) -> None:
    """Its calls stay applied, and the client finds the results on its next connection."""
    owner.engine.call("left", A, incr(1, "number"))
    owner.engine.drop("left")
    owner.engine.drop("left")
    assert owner.engine.call("left again", A, incr(1, "number")) is None
    assert owner.commit() == {"left again": [Ok(1, 11, Raw(b"6"))]}
    assert owner.layer.entries["number"] == 6


# Calls that are sent again


def test_a_durable_result_is_found(owner: PureOwner) -> None:
    """A call that is sent again is answered from the table, with the revision of its record, and is not applied again."""
    owner.engine.call("left", A, incr(1, "number"))
    owner.engine.call("left", A, incr(2, "number"))
    owner.commit()
    assert owner.engine.call("left", A, incr(1, "number")) == Ok(1, 12, Raw(b"6"))
    owner.start()
    assert owner.engine.call("left", A, incr(2, "number")) == Ok(2, 12, Raw(b"7"))
    found = owner.engine.find(A, 2)
    assert found is not None
    assert (found.revision, found.value) == (12, b"7")
    assert owner.engine.find(A, 3) is None
    assert owner.layer.revision == 12


def test_a_result_under_way_is_found(owner: PureOwner) -> None:
    """A call that is sent again during the commit of its change waits for this commit."""
    owner.engine.call("left", A, incr(1, "number"))
    owner.begin()
    owner.engine.drop("left")
    assert owner.engine.call("again", A, incr(1, "number")) is None
    owner.engine.call("right", B, set_(1, "b", 1))
    assert owner.land() == {"again": [Ok(1, 11, Raw(b"6"))]}


def test_a_call_that_changed_nothing_is_executed_again(owner: PureOwner) -> None:
    """Its result is in no record."""
    assert owner.engine.call("left", A, delete(1, "a")) == Ok(1, 10, Raw(b"false"))
    owner.engine.call("right", B, set_(1, "a", 1))
    assert owner.engine.call("left", A, delete(1, "a")) is None
    assert owner.commit()["left"] == [Ok(1, 12, Raw(b"true"))]


def test_a_record_has_the_results_that_are_not_acknowledged(owner: PureOwner) -> None:
    """Each message brings an acknowledgement. Results up to it are left out of the record, and leave the table."""
    owner.engine.call("left", A, set_(1, "a", 1))
    owner.commit()
    owner.engine.call("left", A, set_(2, "a", 2))
    owner.engine.call("left", A, set_(3, "a", 3, ack=2))
    owner.begin()
    assert owner.calls == {A: (2, {3: Raw(b"null")})}
    owner.land()
    assert owner.engine.find(A, 1) is None
    assert owner.engine.find(A, 3) is not None


def test_a_record_without_changes_has_no_results(owner: PureOwner) -> None:
    """Each copy would skip such a record. So a client that is forgotten waits for the next record."""
    owner.engine.call("left", A, set_(1, "a", 1))
    owner.commit()
    owner.engine.farewell(A)
    owner.begin()
    assert owner.calls == {}
    owner.land()
    owner.engine.call("right", B, set_(1, "a", 1))
    owner.begin()
    assert owner.calls == {A: None, B: (0, {1: Raw(b"null")})}
    owner.land()
    assert owner.engine.find(A, 1) is None


# Failures


def test_a_failed_commit_answers_its_calls(owner: PureOwner) -> None:
    """Only calls of that commit are told. The results stay, so a call that is sent again is not applied twice."""
    owner.engine.call("left", A, incr(1, "number"))
    owner.engine.call("left", A, delete(2, "missing"))
    owner.begin()
    owner.engine.call("left", A, set_(3, "a", 1))
    failed = [Failed(n, "UnavailableError", "the disk is full") for n in (1, 2)]
    assert owner.fail() == {"left": failed}
    assert owner.engine.call("left", A, incr(1, "number")) is None
    assert owner.commit() == {"left": [Ok(3, 12, Raw(b"null")), Ok(1, 12, Raw(b"6"))]}
    assert owner.copy.entries["number"] == 6


def test_a_failure_outside_of_a_commit_answers_all(owner: PureOwner) -> None:
    """No commit is under way, so no call is known to belong to another one."""
    owner.engine.call("left", A, incr(1, "number"))
    assert owner.engine.failed("StorageError", "why") == {"left": [Failed(1, "StorageError", "why")]}


def test_nothing_is_answered_after_the_last_commit(owner: PureOwner) -> None:
    """`close` drops all that wait, and the calls stay open in their clients."""
    owner.engine.call("left", A, incr(1, "number"))
    own = owner.engine.run(lambda calls: calls.pop("text"))
    owner.engine.own(own)
    owner.engine.close()
    assert owner.commit() == {}
    assert own.revision == 0


def test_an_owner_that_ends_moves_new_calls(owner: PureOwner) -> None:
    """A call that was applied before is answered with its result. Any other call is left to the next owner."""
    owner.engine.call("left", A, incr(1, "number"))
    owner.engine.is_ending = True
    assert owner.engine.call("left", A, incr(2, "number")) == Moved(2)
    assert owner.engine.call("left", A, incr(1, "number")) is None
    owner.commit()
    assert owner.engine.call("left", A, incr(1, "number")) == Ok(1, 11, Raw(b"6"))
    assert owner.copy.entries["number"] == 6


# Checks


def refusal(owner: PureOwner, call: Call) -> Refused | None:
    """Return the refusal of a call; `None` if its check holds."""
    found = owner.engine.execute(call)
    return found if isinstance(found, Refused) else None


def test_a_check_sees_changes_that_are_not_durable(owner: PureOwner) -> None:
    """The refusal has the present values of the keys, with the revision of the layer, at once."""
    owner.engine.call("left", A, set_(1, "text", ["new"], 500))
    call = change(7, 10, ["text", "number", "missing"], {"text": "mine"})
    answer = owner.engine.call("right", B, call)
    assert answer == Refused(7, 11, {"text": (Raw(b'["new"]'), 1_000_500), "number": (Raw(b"5"), None)})
    assert owner.layer.revision == 11
    assert refusal(owner, change(8, 11, ["text", "number", "missing"], {"text": "mine"})) is None


@pytest.mark.parametrize(
    "call",
    [
        delete(1, "text"),
        delete_all(1, "te"),
        delete_all(1),
        change(1, 10, [], {}, clear=True),
        set_many(1, {"text": 1}),
        touch(1, "text", 1),
    ],
)
def test_each_kind_of_change_refuses_a_check(owner: PureOwner, call: Call) -> None:
    """A key and its prefix count as changed. Another key does not, unless all keys were deleted."""
    is_clear = call in (delete_all(1), change(1, 10, [], {}, clear=True))
    assert done(owner.engine.execute(call))[1]
    assert refusal(owner, change(2, 10, ["text"])) is not None
    assert refusal(owner, change(2, 10, [], prefixes=("tex",))) is not None
    assert (refusal(owner, change(2, 10, ["other"])) is not None) is is_clear
    assert (refusal(owner, change(2, 10, [], prefixes=("o",))) is not None) is is_clear
    assert refusal(owner, change(2, -1, [])) is None


def test_a_sweep_refuses_a_check(owner: PureOwner) -> None:
    """A key that was swept has changed, although its value was not there any longer before."""
    owner.engine.execute(set_(1, "text", 1, 500))
    owner.commit()
    owner.seconds += 1
    assert refusal(owner, change(2, 11, ["text"])) is None
    owner.layer.sweep(500)
    refused = refusal(owner, change(2, 11, ["text"]))
    assert refused == Refused(2, 12, {})


def test_a_new_owner_knows_no_earlier_change(owner: PureOwner) -> None:
    """It refuses a check of an older revision, because it cannot tell."""
    assert refusal(owner, change(1, 9, ["other"])) == Refused(1, 10, {})
    assert refusal(owner, change(1, 10, ["other"])) is None


def test_a_refusal_has_few_values(owner: PureOwner) -> None:
    """Values are left out for more than 16 keys, or if they have more than 1 MiB together."""
    keys = [f"key {number}" for number in range(17)]
    assert refusal(owner, change(1, 0, keys)) == Refused(1, 10, None)
    assert refusal(owner, change(1, 0, keys[:16])) == Refused(1, 10, {})
    large = Json(b"[" + b" " * (600 * 1024) + b"]")
    owner.layer.set("one", large)
    owner.layer.set("two", large)
    assert refusal(owner, change(1, 0, ["one", "two"])) == Refused(1, 12, None)
    assert refusal(owner, change(1, 0, ["one"])) == Refused(1, 12, {"one": (Raw(large), None)})


def test_a_large_change_raises_the_floor(owner: PureOwner) -> None:
    """A change of more keys than are kept counts as a change of every key."""
    values = {f"key {number}": 1 for number in range(MOST_KEYS + 1)}
    owner.engine.execute(set_many(1, values))
    assert refusal(owner, change(2, 10, ["other"])) is not None
    assert refusal(owner, change(2, 11, ["other"])) is None


# Calls of the owner's own tasks


def test_a_function_runs_on_the_layer(owner: PureOwner) -> None:
    """It sees changes that are not durable. Its result is in no record, and its revision is that of its record."""
    owner.engine.call("left", A, incr(1, "number"))
    executed = owner.engine.run(lambda calls: calls.update("number", lambda number: number * 2, type=int))
    owner.engine.own(executed)
    assert (executed.result, executed.at, executed.changed, executed.revision) == (12, 12, True, 0)
    owner.begin()
    later = owner.engine.run(lambda calls: calls.set("a", 1))
    owner.engine.own(later)
    assert owner.calls == {A: (0, {1: Raw(b"6")})}
    owner.land()
    assert (executed.revision, later.revision) == (12, 0)
    owner.commit()
    assert later.revision == 13
    assert owner.copy.entries["a"] == 1


def test_a_function_may_use_a_prefix_and_a_time_to_live(owner: PureOwner) -> None:
    """The keys of a namespace are those of a manager, and times to live are in seconds."""
    executed = owner.engine.run(lambda calls: calls.get_or_set("a", lambda: [1], ttl=0.5), "users/")
    assert executed.result == [1]
    assert owner.layer.entries["users/a"] == Expiring(Json(b"[1]"), 1_000_500)


def test_a_function_that_changes_nothing_has_the_revision_that_it_saw(owner: PureOwner) -> None:
    """It is that of the layer, and `own` need not wait for it."""
    owner.engine.call("left", A, incr(1, "number"))
    executed = owner.engine.run(lambda calls: calls.get_or_set("text", str))
    owner.engine.own(executed)
    assert (executed.result, executed.changed, executed.revision) == ("old", False, 11)


def test_a_function_may_raise(owner: PureOwner) -> None:
    """Its error is kept for the caller, who gets it when what the function saw is durable."""

    async def fails(calls: Calls) -> int:
        await calls.set("a", 1)
        raise KeyError("mine")

    missing = owner.engine.run(lambda calls: calls.pop("missing"))
    assert isinstance(missing.error, KeyNotFoundError)
    executed = owner.engine.run(fails)
    assert (executed.changed, executed.at) == (True, 11)
    with pytest.raises(KeyError, match="mine"):
        _ = executed.result


def test_the_core_of_a_layer_is_always_open(owner: PureOwner) -> None:
    """A read of a function never finds the layer closed."""

    async def reads(calls: Calls) -> tuple[int, bool, int]:
        return len(calls), "text" in calls, await calls.get("number")

    assert owner.engine.run(reads).result == (3, True, 5)


# Clients


def test_a_client_is_forgotten_after_a_minute(owner: PureOwner) -> None:
    """The next record says so if the client has results. From then on its calls are not known."""
    owner.engine.call("left", A, set_(1, "a", 1))
    owner.commit()
    owner.engine.disconnect(A)
    owner.engine.disconnect(B)
    owner.seconds += MINUTE - 1
    owner.engine.forget_gone()
    assert A in owner.engine.clients
    owner.seconds += 1
    owner.engine.forget_gone()
    assert A not in owner.engine.clients
    assert B not in owner.engine.clients
    assert not owner.engine.admit(A, 1)
    owner.engine.execute(set_(1, "b", 1))
    owner.begin()
    assert owner.calls == {A: None}
    owner.land()
    assert owner.engine.find(A, 1) is None


def test_a_client_with_a_connection_is_not_forgotten(owner: PureOwner) -> None:
    """It may be silent for longer than a minute."""
    owner.engine.disconnect(A)
    assert owner.engine.admit(A, None)
    owner.seconds += 10 * MINUTE
    owner.engine.forget_gone()
    assert A in owner.engine.clients


def test_a_new_owner_counts_from_its_takeover(owner: PureOwner) -> None:
    """It knows the clients of the table, with their acknowledgements, and forgets them after a minute."""
    owner.engine.call("left", A, set_(1, "a", 1))
    owner.engine.call("left", A, set_(3, "a", 1, ack=2))
    owner.commit()
    owner.seconds += 10 * MINUTE
    owner.start()
    assert owner.engine.clients.acknowledged == {A: 2}
    owner.seconds += MINUTE
    owner.engine.forget_gone()
    assert A not in owner.engine.clients
