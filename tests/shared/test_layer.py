"""`OwnerLayer`: the changes of an owner that are not durable, over the copy that only records change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lab_state import _sweeper
from lab_state._codec import encode_record
from lab_state._core import CallCore
from lab_state._entries import DELETED, EXPIRED, ChangeSet, Expiring, Stored, StoredOrGone, Value
from lab_state._order import bounds
from lab_state._reads import Reads
from lab_state._state import State
from lab_state._sweeper import Sweeper
from lab_state.shared._layer import OwnerLayer
from lab_state.shared._records import Outcome, RecordApplier, parse_record, record_of
from lab_state.testing import ManualClock


class Ticks:
    """A monotonic clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def copy_of(**entries: Stored) -> State:
    """Return a copy at revision 10, whose time is 0 when the clock is at 100 seconds."""
    values = {key: to.value if isinstance(to, Expiring) else to for key, to in entries.items()}
    copy = State(Ticks())
    copy.load({**values}, 10, {key: to.at for key, to in entries.items() if isinstance(to, Expiring)})
    return copy


def layer_of(**entries: Stored) -> OwnerLayer:
    return OwnerLayer(copy_of(**entries))


def entries_of(state: State) -> dict[str, Stored]:
    return dict(state.entries.items())


def wait(layer: OwnerLayer, seconds: float) -> None:
    assert isinstance(layer.copy.monotonic, Ticks)
    layer.copy.monotonic.now += seconds


def land(layer: OwnerLayer, taken: ChangeSet) -> None:
    """Do what the owner does when a commit is durable."""
    RecordApplier(layer.copy).apply(record_of(taken))
    layer.landed(taken)


# Changes


def test_the_copy_stays_as_it_is() -> None:
    """Changes are in the layer alone, and each of them has a revision."""
    layer = layer_of(a=1, b=2)
    assert (layer.revision, layer.taken) == (10, 10)
    assert (layer.set("a", 9), layer.set_many({"c": 3, "d": 4})) == (11, 12)
    assert layer.delete_many(["b", "none"]) == 1
    assert entries_of(layer) == {"a": 9, "c": 3, "d": 4}
    assert (layer.names(""), layer.count(), layer.count_in(*bounds("c"))) == (["a", "c", "d"], 3, 1)
    assert (entries_of(layer.copy), layer.copy.revision, layer.copy.changes) == ({"a": 1, "b": 2}, 10, {})
    assert layer.changes == {"a": 9, "c": 3, "d": 4, "b": DELETED}
    assert not layer.is_index_behind
    assert not layer.has_steps


def test_changes_under_way_are_still_shown() -> None:
    """Between `take` and `landed` the layer shows the taken changes below the newer ones."""
    layer = layer_of(a=1, b=2)
    layer.set("a", 3)
    layer.delete_many(["b"])
    taken = layer.take()
    assert taken[:4] == (10, 12, False, {"a": 3, "b": DELETED})
    layer.set("c", 4)
    assert layer.set("b", 5) == 14
    assert entries_of(layer) == {"a": 3, "b": 5, "c": 4}
    assert layer.changes == {"b": 5, "c": 4}
    land(layer, taken)
    assert entries_of(layer.copy) == {"a": 3}
    assert entries_of(layer) == {"a": 3, "b": 5, "c": 4}
    assert (layer.copy.revision, layer.taken, layer.revision) == (12, 12, 14)


def test_changes_land_after_they_were_applied() -> None:
    """Dropping changes that the copy lacks would lose them, so it is refused."""
    layer = layer_of(a=1)
    layer.set("a", 2)
    taken = layer.take(layer.untaken())
    with pytest.raises(AssertionError):
        layer.landed(taken)
    assert entries_of(layer) == {"a": 2}


@pytest.mark.parametrize("newer", [{"a": 3}, {"a": 3, "c": 4, "d": 5, "e": 6}])
def test_a_failed_commit_is_put_back_below_newer_changes(newer: dict[str, Value]) -> None:
    """Newer changes stay, whichever are more, and the next commit begins where the failed one did."""
    layer = layer_of(a=1)
    layer.set_many({"a": 2, "b": 2, "x": Expiring(1, 5_000)})  # type: ignore[dict-item]  # `set_many` of a layer is `apply`
    taken = layer.take()
    layer.set_many(newer)
    for _ in range(2):
        layer.put_back(taken)
        assert layer.changes == {"b": 2, "x": Expiring(1, 5_000), **newer}
        assert (layer.taken, layer.revision, layer.cleared) == (10, 12, False)
        assert entries_of(layer) == layer.changes
        assert layer.expires
    again = layer.take()
    assert again[:3] == (10, 12, False)
    land(layer, again)
    assert entries_of(layer.copy) == entries_of(layer)


def test_a_clear_hides_everything_before_it() -> None:
    """After a clear neither the copy nor the commit under way is seen, and a failed commit does not come back."""
    layer = layer_of(a=1, b=2)
    layer.set("c", 3)
    taken = layer.take()
    assert layer.clear() == 3
    assert (layer.count(), layer.names(""), layer.cleared) == (0, [], True)
    layer.set("d", 4)
    layer.put_back(taken)
    assert (layer.changes, layer.cleared, entries_of(layer)) == ({"d": 4}, True, {"d": 4})
    again = layer.take()
    assert (again.start, again.cleared) == (10, True)
    assert (layer.names(""), layer.pieces("", None), layer.held_in("", None)) == (["d"], [("d",)], 1)
    layer.set("e", 5)
    land(layer, again)
    assert entries_of(layer.copy) == {"d": 4}
    assert entries_of(layer) == {"d": 4, "e": 5}


def test_a_clear_under_way_is_put_back() -> None:
    """A clear whose commit failed is part of the next commit."""
    layer = layer_of(a=1)
    layer.clear()
    taken = layer.take()
    assert not layer.cleared
    assert layer.names("") == []
    layer.put_back(taken)
    assert layer.cleared
    assert layer.names("") == []
    assert layer.take()[:3] == (10, 11, True)


def test_nothing_to_clear_is_no_change() -> None:
    """A clear of an empty layer has no revision."""
    layer = layer_of()
    assert (layer.clear(), layer.revision, layer.cleared) == (0, 10, False)


def test_an_interrupted_take_loses_nothing() -> None:
    """An interrupt may come within `take`: what was noted before is put back."""
    layer = layer_of(a=1)
    layer.set("b", 2)
    taken = layer.untaken()
    layer._middle.show(taken.changes, layer.expiries, cleared=False)
    layer.put_back(taken)
    assert (layer.changes, entries_of(layer)) == ({"b": 2}, {"a": 1, "b": 2})
    assert layer.take()[:4] == (10, 11, False, {"b": 2})


def test_each_change_is_told() -> None:
    """The owner notes the keys of each change with its revision, and a clear as one."""
    layer = layer_of(a=1, due=Expiring(1, 500))
    told: list[tuple[list[str] | None, int]] = []
    layer.on_applied = lambda keys, revision: told.append((None if keys is None else sorted(keys), revision))
    layer.set("b", 1)
    layer.set_many({"c": 1, "d": 1})
    layer.delete_many(["c"])
    wait(layer, 2)
    layer.sweep(9)
    layer.clear()
    assert told == [(["b"], 11), (["c", "d"], 12), (["c"], 13), (["due"], 14), (None, 15)]


def test_the_time_is_that_of_the_copy() -> None:
    """A value expires in the layer as it does in the copy, and a record has both times while any key expires."""
    layer = layer_of(a=Expiring(1, 5_000))
    wait(layer, 3)
    assert (layer.now(), layer.wall()) == (3_000, 0)
    layer.set("b", 1)
    taken = layer.take()
    assert (taken.time, taken.wall) == (3_000, 0)
    assert OwnerLayer(copy_of()).take().time == 0


# Sweeps


def test_a_sweep_waits_for_its_record() -> None:
    """A swept key stays in the copy until its record is applied. Until then the layer sweeps nothing."""
    layer = layer_of(a=Expiring(1, 500), b=Expiring(2, 700), c=3)
    assert layer.sweep(9) == 0
    wait(layer, 2)
    assert layer.sweep(1) == 1
    assert layer.is_sweeping
    assert layer.sweep(1) == 0
    assert set(layer.changes.values()) == {EXPIRED}
    assert layer.copy.due(layer.now()) == 2
    assert (layer.count(), len(layer.entries), layer.names("")) == (1, 2, ["c"])
    taken = layer.take()
    assert layer.is_sweeping
    land(layer, taken)
    assert not layer.is_sweeping
    assert layer.sweep(1) == 1
    land(layer, layer.take())
    assert (layer.sweep(9), layer.is_sweeping) == (0, False)
    assert entries_of(layer.copy) == {"c": 3}
    assert (layer.copy.swept, layer.copy.deleted) == (2, 0)


def test_a_sweep_is_put_back_with_its_commit() -> None:
    """If the commit of a sweep fails, the next commit has it, and there is no second sweep before."""
    layer = layer_of(a=Expiring(1, 500))
    wait(layer, 2)
    layer.sweep(9)
    taken = layer.take()
    layer.put_back(taken)
    assert (layer.is_sweeping, layer.sweep(9)) == (True, 0)
    land(layer, layer.take())
    assert entries_of(layer.copy) == {}


@pytest.mark.parametrize("change", ["set", "touch", "delete", "clear"])
@pytest.mark.parametrize("under_way", [False, True])
def test_a_sweep_leaves_keys_with_newer_changes(change: str, *, under_way: bool) -> None:
    """A key that was stored again, deleted or cleared is not swept, and the layer waits for that change."""
    layer = layer_of(a=Expiring(1, 500))
    changes: dict[str, Callable[[], object]] = {
        "set": lambda: layer.set("a", 2),
        "touch": lambda: layer.set("a", Expiring(1, 60_000)),
        "delete": lambda: layer.delete_many(["a"]),
        "clear": layer.clear,
    }
    changes[change]()
    taken = layer.take() if under_way else None
    wait(layer, 2)
    before = layer.revision
    assert layer.sweep(9) == 1
    assert (layer.revision, layer.is_sweeping) == (before, True)
    land(layer, taken or layer.take())
    assert not layer.is_sweeping
    assert layer.sweep(9) == 0


def test_a_newer_value_that_has_expired_is_swept() -> None:
    """The value in the layer decides, so a key whose newer value has expired as well is swept."""
    layer = layer_of(a=Expiring(1, 500))
    layer.set("a", Expiring(2, 900))
    wait(layer, 2)
    assert layer.sweep(9) == 1
    assert layer.changes == {"a": EXPIRED}
    land(layer, layer.take())
    assert entries_of(layer.copy) == {}


class Owned:
    """An owner's layer and copy with a sweeper. A commit is durable when `commit` is called."""

    def __init__(self, *, is_watched: bool) -> None:
        self.clock = ManualClock(0.0)
        self.copy = State(self.clock.monotonic)
        self.copy.load({}, 10)
        self.layer = OwnerLayer(self.copy)
        self.applier = RecordApplier(self.copy)
        self.swept: list[int] = []
        self.sweeper = Sweeper(
            self.copy,
            self.clock,
            lambda: self.layer.is_sweeping,
            lambda: self.swept.append(self.layer.revision),
            lambda: None,
            self.layer,
        )
        self.sweeper.attend(is_watched)

    @property
    def timers(self) -> int:
        return sum(timer.callback is not None for _, _, timer in self.clock._timers)

    def commit(self) -> None:
        taken = self.layer.take()
        self.applier.apply(record_of(taken))
        self.layer.landed(taken)
        self.sweeper.resume()


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_sweeper_of_an_owner_waits_for_each_record(*, is_watched: bool) -> None:
    """The sweeper finds keys in the copy, deletes them in the layer, and soon has no timer until that is durable."""
    owned = Owned(is_watched=is_watched)
    start = owned.copy.now()
    for number in range(3):
        owned.layer.set(f"{number}", Expiring(number, start + 500))
    owned.layer.set("later", Expiring(1, start + 5_500))
    assert owned.timers == 0
    owned.commit()
    assert owned.timers == 1
    owned.clock.advance(1.1)
    assert (owned.swept, entries_of(owned.layer)) == ([15], {"later": Expiring(1, start + 5_500)})
    owned.clock.advance(3)
    assert (owned.swept, owned.timers, len(owned.copy.entries)) == ([15], 0, 4)
    owned.commit()
    assert (len(owned.copy.entries), owned.timers) == (1, 1)
    owned.clock.advance(2.5)
    owned.commit()
    owned.clock.advance(1)
    assert (owned.swept, len(owned.copy.entries), owned.timers) == ([15, 16], 0, 0)


def test_many_keys_are_swept_record_by_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """If more keys are due than one sweep deletes, the next sweep follows when the first is durable."""
    monkeypatch.setattr(_sweeper, "_KEYS_PER_STEP", 2)
    owned = Owned(is_watched=False)
    owned.layer.apply({f"{number}": Expiring(number, owned.copy.now() + 500) for number in range(5)}, cleared=False)
    owned.commit()
    owned.clock.advance(1.1)
    left: list[int] = []
    while owned.copy.expiries:
        owned.clock.advance(0)
        owned.commit()
        left.append(len(owned.copy.entries))
    assert (left, owned.swept) == ([3, 1, 0], [12, 13, 14])


# All of it against a dict

KEYS = st.sampled_from(["a/x", "a/y", "b", "c", "d"])
ALL_KEYS = ("a/x", "a/y", "b", "c", "d")
PREFIXES = st.sampled_from(["", "a/", "b", "none"])


class _Core(CallCore):
    def check_open(self) -> None:
        """Do nothing: the layer is always open."""


def follow(copy: State) -> list[tuple[str | None, StoredOrGone, int]]:
    """Watch a copy, and return the list to which its changes are added."""
    told: list[tuple[str | None, StoredOrGone, int]] = []

    def one(key: str | None, to: StoredOrGone, revision: int) -> None:
        told.append((key, to, revision))

    def many(keys: Iterable[str], values: Iterable[StoredOrGone], revision: int) -> None:
        for key, to in zip(keys, values, strict=True):
            one(key, to, revision)

    copy.on_change, copy.on_changes = one, many
    return told


def _by_revision(change: tuple[str | None, StoredOrGone, int]) -> tuple[int, str]:
    return change[2], str(change[0])


class Model(RuleBasedStateMachine):
    """A layer over a copy, a follower that gets the records as bytes, and the dicts that they stand for."""

    def __init__(self) -> None:
        super().__init__()
        entries: dict[str, Stored] = {"a/x": 0, "b": 0, "c": Expiring(0, 1_500), "d": Expiring(0, 60_000)}
        self.layer = OwnerLayer(copy_of(**entries))
        self.follower = copy_of(**entries)
        self.follower.monotonic = self.layer.copy.monotonic
        self.owner_told, self.follower_told = follow(self.layer.copy), follow(self.follower)
        self.durable = dict(entries)
        self.expected = dict(entries)
        self.revision = self.durable_revision = 10
        self.at_take: dict[str, Stored] = {}
        self.numbers = count(1)
        self.under_way: ChangeSet | None = None
        self.swept_at = 0
        self.views: list[dict[str, Stored]] = []

    def lives(self, key: str) -> bool:
        stored = self.expected.get(key, DELETED)
        if isinstance(stored, Expiring):
            return stored.at > self.layer.now()
        return stored is not DELETED

    def changed(self) -> int:
        self.revision += 1
        return self.revision

    @rule(key=KEYS)
    def set(self, key: str) -> None:
        self.expected[key] = value = next(self.numbers)
        assert self.layer.set(key, value) == self.changed()

    @rule(key=KEYS, lifetime=st.sampled_from([1, 700, 2_500]))
    def set_expiring(self, key: str, lifetime: int) -> None:
        self.expected[key] = stored = Expiring(next(self.numbers), self.layer.now() + lifetime)
        assert self.layer.set(key, stored) == self.changed()

    @rule(keys=st.lists(KEYS, min_size=1))
    def set_many(self, keys: list[str]) -> None:
        values: dict[str, Value] = {key: next(self.numbers) for key in keys}
        self.expected.update(values)
        assert self.layer.set_many(values) == self.changed()

    @rule(key=KEYS)
    def quick_set(self, key: str) -> None:
        """Do what `Calls.set` does."""
        layer = self.layer
        if key not in layer.changes:
            layer.before_change()
        self.expected[key] = value = next(self.numbers)
        layer.entries[key] = layer.changes[key] = value
        layer.revision = self.changed()
        layer.expiries.discard(key)

    @rule(keys=st.lists(KEYS))
    def delete_many(self, keys: list[str]) -> None:
        found = {key for key in keys if self.lives(key)}
        assert self.layer.delete_many(keys) == len(found)
        for key in found:
            del self.expected[key]
        if found:
            self.changed()

    @rule(prefix=PREFIXES)
    def delete_by_prefix(self, prefix: str) -> None:
        self.delete_many(self.layer.names(*bounds(prefix)))

    @rule()
    def clear(self) -> None:
        assert self.layer.clear() == sum(self.lives(key) for key in self.expected)
        if self.expected:
            self.changed()
        self.expected = {}

    @rule(seconds=st.sampled_from([0.3, 1.0, 2.0]))
    def wait(self, seconds: float) -> None:
        wait(self.layer, seconds)

    @rule(attend=st.booleans())
    def attend(self, *, attend: bool) -> None:
        """Begin or end the search for keys at their exact time, as a watch does."""
        self.layer.copy.expiries.attend(wanted=attend)
        self.layer.copy.expiries.load(self.layer.now(), 9)

    @rule(most=st.integers(1, 5))
    def sweep(self, most: int) -> None:
        before = entries_of(self.layer)
        is_sweeping = self.durable_revision < self.swept_at
        found = self.layer.sweep(most)
        gone = before.keys() - entries_of(self.layer).keys()
        assert not any(self.lives(key) for key in gone)
        assert gone <= self.durable.keys()
        over = {
            key
            for key, to in self.durable.items()
            if isinstance(to, Expiring) and to.at < self.layer.now() // 1000 * 1000
        }
        if is_sweeping:
            assert (found, gone) == (0, set())
            return
        assert min(most, len(over)) <= found <= most
        for key in gone:
            del self.expected[key]
        if gone:
            self.changed()
        self.swept_at = self.revision if found else 0

    @precondition(lambda self: self.under_way is None)
    @rule(noted=st.booleans())
    def take(self, *, noted: bool) -> None:
        self.under_way = self.layer.take(self.layer.untaken() if noted else None)
        assert (self.under_way.start, self.under_way.end) == (self.durable_revision, self.revision)
        self.at_take = dict(self.expected)

    @precondition(lambda self: self.under_way is not None)
    @rule(in_steps=st.booleans())
    def commit(self, *, in_steps: bool) -> None:
        assert self.under_way is not None
        taken, owner, follower = self.under_way, RecordApplier(self.layer.copy), RecordApplier(self.follower)
        data = b"".join(encode_record(taken))
        outcome = Outcome.APPLIED if taken.end > taken.start else Outcome.SKIPPED
        if in_steps:
            for _ in follower.prepare(parse_record(data)):
                assert entries_of(self.follower) == self.durable
            assert follower.finish() is outcome
        else:
            assert follower.apply(parse_record(memoryview(data))) is outcome
        assert owner.apply(record_of(taken)) is outcome
        self.layer.landed(taken)
        self.durable, self.durable_revision, self.under_way = self.at_take, taken.end, None

    @precondition(lambda self: self.under_way is not None)
    @rule(times=st.integers(1, 2))
    def fail(self, times: int) -> None:
        assert self.under_way is not None
        for _ in range(times):
            self.layer.put_back(self.under_way)
        self.under_way = None

    @precondition(lambda self: not self.views)
    @rule()
    def freeze(self) -> None:
        self.views = [self.layer.copy.freeze()]

    @precondition(lambda self: self.views)
    @rule(most=st.integers(1, 3))
    def fold(self, most: int) -> None:
        if not self.layer.copy.fold(self.views[0], most):
            self.views = []

    @invariant()
    def the_layer_is_its_dict(self) -> None:
        layer, now = self.layer, self.layer.now()
        entries = layer.entries
        assert dict(entries.items()) == self.expected
        assert sorted(entries) == sorted(self.expected)
        assert len(entries) == len(self.expected)
        for key in (*ALL_KEYS, "none"):
            assert (key in entries) == (key in self.expected)
            assert layer.has(key) == self.lives(key)
        due = sorted(key for key, to in self.expected.items() if isinstance(to, Expiring) and to.at <= now)
        assert sorted(layer.due_keys(now)) == due
        assert layer.due(now) == len(due)
        names = [key for key in ALL_KEYS if self.lives(key)]
        assert layer.names("") == names
        assert layer.names("", None, 2, reverse=True) == names[:-3:-1]
        assert layer.count() == len(names) == layer.count_in("", None)
        assert layer.count_in(*bounds("a/")) == sum(name.startswith("a/") for name in names)
        assert layer.revision == self.revision
        assert layer.expires or not any(isinstance(to, Expiring) for to in self.expected.values())

    @invariant()
    def reads_see_the_layer(self) -> None:
        reads: Any = Reads(_Core("name", self.layer, None), "")  # type: ignore[arg-type]  # no call counts an error
        found = reads.get_all_nowait()
        assert found.keys() == {key for key in self.expected if self.lives(key)}

    @invariant()
    def copies_have_what_is_durable(self) -> None:
        copy = self.layer.copy
        assert entries_of(copy) == entries_of(self.follower) == self.durable
        assert copy.revision == copy.taken == self.follower.revision == self.durable_revision
        assert copy.changes == self.follower.changes == {}
        for state in (copy, self.follower):
            timed = {key: to.at for key, to in self.durable.items() if isinstance(to, Expiring)}
            for now in (copy.now(), copy.now() + 2_500):
                assert sorted(state.due_keys(now)) == sorted(key for key, at in timed.items() if at <= now)
            assert state.names("") == sorted(filter(state.has, self.durable))
        # A record has the deleted keys after the others, so the order within a revision differs.
        assert sorted(self.owner_told, key=_by_revision) == sorted(self.follower_told, key=_by_revision)
        counted = (copy.stored, copy.deleted, copy.swept)
        assert counted == (self.follower.stored, self.follower.deleted, self.follower.swept)


TestLayerMachine = Model.TestCase
TestLayerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
