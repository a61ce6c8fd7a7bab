"""`Draft`: what a transaction changes, over a state that stands still; and `State.apply`, which makes it one change."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lab_state._draft import Draft
from lab_state._entries import DELETED, EXPIRED, Absent, Expiring, Stored, StoredOrGone, Value
from lab_state._state import WATCHED_CLEAR, State


class Ticks:
    """A monotonic clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Mirror:
    """Who watches a state: a copy of it, kept by nothing but what is told of each change."""

    def __init__(self, state: State) -> None:
        self.entries: dict[str, Stored] = dict(state.entries.items())
        self.told: list[tuple[str | None, int]] = []
        state.on_change = self

    def __call__(self, key: str | None, changed: StoredOrGone, revision: int) -> None:
        self.told.append((key, revision))
        if key is None:
            self.entries.clear()
        elif isinstance(changed, Absent):
            del self.entries[key]
        else:
            self.entries[key] = changed


def state_of(**entries: Stored) -> State:
    """Return a state at revision 10, without a change."""
    values = {key: to.value if isinstance(to, Expiring) else to for key, to in entries.items()}
    state = State(Ticks())
    state.load({**values}, 10, {key: to.at for key, to in entries.items() if isinstance(to, Expiring)})
    return state


def entries_of(state: State) -> dict[str, Stored]:
    return dict(state.entries.items())


# What a merge makes


def expired(state: State) -> set[str]:
    """Return the entries whose time has come."""
    names = state.names("")
    assert state.count() == len(names)
    return set(state.entries) - set(names)


def test_a_draft_shows_its_own_changes_and_the_state_beneath_stays() -> None:
    """Until the merge, what is set and deleted is the draft's alone."""
    base = state_of(a=1, b=2)
    draft = Draft(base)
    draft.set("a", 9)
    draft.set("c", 3)
    draft.delete_many(["b"])
    assert entries_of(draft) == {"a": 9, "c": 3}
    assert entries_of(base) == {"a": 1, "b": 2}
    assert (base.revision, base.changes) == (10, {})


def test_a_merge_makes_one_revision_of_all_changes() -> None:
    """Any number of changes are one revision, which every one of them was told before."""
    base = state_of(a=1, b=2)
    draft = Draft(base)
    told = {draft.set("a", 9), draft.set_many({"c": 3, "d": 4})}
    draft.delete_many(["b"])
    assert draft.merge() == 11
    assert told == {11}
    assert base.revision == 11
    assert entries_of(base) == {"a": 9, "c": 3, "d": 4}
    assert base.changes == {"a": 9, "c": 3, "d": 4, "b": DELETED}


def test_values_alone_are_merged_as_set_many_stores_them() -> None:
    """What only stored values, as a transaction's own `set` does, is one revision too."""
    base = state_of(a=1)
    draft = Draft(base)
    draft.changes["a"] = 2
    draft.changes["b"] = 3
    assert draft.merge() == 11
    assert entries_of(base) == base.changes == {"a": 2, "b": 3}


@pytest.mark.parametrize("keys", [(), ("never there",), ("new",), ("new", "newer")])
def test_nothing_changed_makes_no_revision(keys: tuple[str, ...]) -> None:
    """An untouched draft, deletes of what is not there, and keys that were only ever in the draft change nothing."""
    base = state_of(a=1)
    draft = Draft(base)
    for key in keys:
        draft.delete_many([key])
        if key.startswith("new"):
            draft.set(key, 1)
            assert draft.delete_many([key]) == 1
    assert draft.merge() is None
    assert (base.revision, base.changes, entries_of(base)) == (10, {}, {"a": 1})


def test_what_was_only_ever_in_the_draft_is_not_deleted_from_the_state() -> None:
    """A key that was set and deleted in the draft is in no record."""
    base = state_of(a=1)
    draft = Draft(base)
    draft.set("new", 1)
    draft.delete_many(["new"])
    draft.set("a", 2)
    assert draft.merge() == 11
    assert base.changes == {"a": 2}


def test_a_clear_is_merged_as_a_clear() -> None:
    """Deleting everything forgets what was changed before, beneath as well; what came after is set."""
    base = state_of(a=1, b=2)
    base.set("c", 3)
    draft = Draft(base)
    draft.set("d", 4)
    draft.delete_many(["a"])
    assert draft.clear() == 3
    assert (entries_of(draft), len(draft.entries)) == ({}, 0)
    draft.set("b", 5)
    draft.set("a", 6)
    draft.set("e", 7)
    assert draft.delete_many(["a", "e"]) == 2
    assert draft.merge() == 12
    assert (entries_of(base), base.changes, base.cleared) == ({"b": 5}, {"b": 5}, True)


def test_clearing_what_is_empty_makes_no_revision() -> None:
    """Nothing beneath and nothing left in the draft: nothing changed."""
    base = state_of()
    draft = Draft(base)
    assert draft.clear() == 0
    draft.set("a", 1)
    assert draft.clear() == 1
    assert draft.merge() is None
    assert (base.revision, base.cleared) == (10, False)


def test_a_clear_alone_makes_a_revision() -> None:
    """Deleting everything is a change, without any other."""
    base = state_of(a=1)
    draft = Draft(base)
    assert draft.clear() == 1
    assert draft.merge() == 11
    assert (entries_of(base), base.cleared) == ({}, True)


def test_a_draft_follows_a_view_that_is_taken_and_folded() -> None:
    """Whichever object holds the entries beneath, the draft shows the same, and is merged into it."""
    base = state_of(a=1, b=2)
    draft = Draft(base)
    draft.set("c", 3)
    view = base.freeze()
    draft.delete_many(["a"])
    assert entries_of(draft) == {"b": 2, "c": 3}
    assert draft.merge() == 11
    assert view == {"a": 1, "b": 2}
    later = Draft(base)
    later.set("b", 4)
    assert base.fold(view, 1)
    assert entries_of(later) == {"b": 4, "c": 3}
    assert not base.fold(view, 1)
    assert entries_of(later) == {"b": 4, "c": 3}
    assert later.merge() == 12
    assert base.entries is view
    assert view == {"b": 4, "c": 3}


def test_values_alone_are_merged_into_a_view_that_stands_still() -> None:
    """The quick way of a merge leaves a view as it is, too."""
    base = state_of(a=1)
    view = base.freeze()
    draft = Draft(base)
    draft.changes["a"] = 2
    assert draft.merge() == 11
    assert (view, entries_of(base)) == ({"a": 1}, {"a": 2})


# Values that expire


def clock_of(state: State) -> Ticks:
    assert isinstance(state.monotonic, Ticks)
    return state.monotonic


def test_a_value_beneath_that_expires_is_gone_from_the_draft() -> None:
    """Its time may come while the draft is open; deleting it then is no change."""
    base = state_of(a=Expiring(1, 1_500), b=2)
    draft = Draft(base)
    assert (draft.has("a"), expired(draft)) == (True, set())
    clock_of(base).now += 1.5
    assert (draft.has("a"), expired(draft)) == (False, {"a"})
    assert draft.has("b")
    assert draft.delete_many(["a"]) == 0
    assert draft.merge() is None


def test_a_value_in_the_draft_expires() -> None:
    """It is gone at its time from the draft, and from the state that it was merged into."""
    base = state_of(a=1)
    draft = Draft(base)
    draft.set("a", Expiring(2, 1_500))
    draft.set("b", Expiring(3, 2_500))
    clock_of(base).now += 1.5
    assert expired(draft) == {"a"}
    assert draft.delete_many(["a"]) == 0
    assert draft.merge() == 11
    assert expired(base) == {"a"}
    clock_of(base).now += 1.0
    assert expired(base) == {"a", "b"}
    clock_of(base).now += 1.0
    base.sweep(9)
    assert entries_of(base) == {}
    assert base.changes == {"a": EXPIRED, "b": EXPIRED}


def test_a_value_set_over_one_that_expires_stays() -> None:
    """In the draft, and after the merge, whether it had the time beneath or in the draft."""
    base = state_of(a=Expiring(1, 1_500))
    draft = Draft(base)
    draft.changes["a"] = 2
    draft.set("b", Expiring(3, 1_500))
    draft.changes["b"] = 4
    clock_of(base).now += 5
    assert (draft.has("a"), draft.has("b"), expired(draft)) == (True, True, set())
    assert (draft.count(), draft.count_in("", None), draft.count_in("b", "c")) == (2, 2, 1)
    draft.merge()
    assert (base.has("a"), base.has("b"), expired(base)) == (True, True, set())
    base.sweep(9)
    assert entries_of(base) == {"a": 2, "b": 4}


def test_what_was_cleared_does_not_expire() -> None:
    """After a clear nothing of before is due, neither in the draft nor beneath."""
    base = state_of(a=Expiring(1, 1_500))
    draft = Draft(base)
    draft.set("b", Expiring(2, 1_500))
    assert draft.clear() == 2
    clock_of(base).now += 5
    assert expired(draft) == set()
    assert not draft.expiries
    draft.merge()
    assert expired(base) == set()
    assert not base.expiries


def test_the_time_of_a_draft_is_that_of_the_state() -> None:
    """Not that of a clock of its own, which began with it."""
    base = state_of()
    clock_of(base).now += 5
    assert Draft(base).now() == base.now() == 5_000


# What is told of a merge


def test_a_merge_is_told_key_by_key() -> None:
    """Who watches is told each change once, with the revision of the merge; of what only the draft had, nothing."""
    base = state_of(a=1, b=2)
    mirror = Mirror(base)
    draft = Draft(base)
    draft.changes["a"] = 3
    draft.changes["c"] = 4
    assert mirror.told == []
    draft.merge()
    assert mirror.told == [("a", 11), ("c", 11)]
    draft = Draft(base)
    draft.set("a", 5)
    draft.delete_many(["b"])
    draft.set("new", 6)
    draft.delete_many(["new"])
    draft.merge()
    assert mirror.told[2:] == [("a", 12), ("b", 12)]
    assert mirror.entries == entries_of(base) == {"a": 5, "c": 4}


@pytest.mark.parametrize(("size", "at_once"), [(WATCHED_CLEAR, False), (WATCHED_CLEAR + 1, True)])
def test_a_clear_is_told_key_by_key_up_to_a_bound(size: int, at_once: bool) -> None:  # noqa: FBT001 -- a parameter
    """While there is a watch, each key of a small state is reported as deleted; a large one is reported as one."""
    base = State(Ticks())
    base.load({f"key {n}": n for n in range(size)}, 10)
    mirror = Mirror(base)
    draft = Draft(base)
    assert draft.clear() == size
    draft.set("key 1", "again")
    assert draft.merge() == 11
    assert {revision for _, revision in mirror.told} == {11}
    assert (len(mirror.told), (None, 11) in mirror.told) == ((2, True) if at_once else (size, False))
    assert mirror.entries == entries_of(base) == {"key 1": "again"}
    assert base.cleared is at_once
    assert len(base.changes) == (1 if at_once else size)


# The layered entries


def test_the_entries_of_a_draft_are_a_map() -> None:
    """They read like the dict that they stand for, and have no room for more."""
    base = state_of(a=1, b=2, c=None)
    draft = Draft(base)
    draft.set("b", 3)
    draft.set("d", 4)
    draft.delete_many(["a"])
    entries = draft.entries
    assert {key: entries[key] for key in entries} == dict(entries.items()) == {"b": 3, "c": None, "d": 4}
    assert len(entries) == 3
    assert [key in entries for key in "abcde"] == [False, True, True, True, False]
    for key in ("a", "e"):
        with pytest.raises(KeyError, match=key):
            entries[key]
        with pytest.raises(KeyError, match=key):
            del entries[key]
    assert 5 not in entries


# All of it against a dict

KEYS = st.sampled_from(["a/x", "a/y", "b", "c", "d"])
PREFIXES = st.sampled_from(["", "a/", "b", "none"])


class Model(RuleBasedStateMachine):
    """A state, a draft over it, and the two dicts that they stand for."""

    watched = False

    def __init__(self) -> None:
        super().__init__()
        entries: dict[str, Stored] = {"a/x": 0, "b": 0, "c": Expiring(0, 1_500), "d": Expiring(0, 60_000)}
        self.base = state_of(**entries)
        self.mirror = Mirror(self.base) if self.watched else None
        self.beneath = entries_of(self.base)
        self.durable = dict(self.beneath)
        self.revision = 10
        self.numbers = count(1)
        self.views: list[dict[str, Stored]] = []
        self.begin()

    def begin(self) -> None:
        self.draft = Draft(self.base)
        self.expected = dict(self.beneath)
        self.was_set: set[str] = set()

    def lives(self, key: str) -> bool:
        stored = self.expected.get(key, DELETED)
        if isinstance(stored, Expiring):
            return stored.at > self.base.now()
        return stored is not DELETED

    def put(self, key: str, stored: Stored) -> None:
        self.expected[key] = stored
        self.was_set.add(key)

    def remove(self, keys: Iterable[str]) -> int:
        """Take away those that live; how many."""
        found = {key for key in keys if self.lives(key)}
        for key in found:
            del self.expected[key]
        return len(found)

    @rule(key=KEYS)
    def quick_set(self, key: str) -> None:
        """Do what the `set` of a transaction does."""
        value = next(self.numbers)
        self.draft.changes[key] = value
        self.put(key, value)

    @rule(key=KEYS)
    def set(self, key: str) -> None:
        value = next(self.numbers)
        assert self.draft.set(key, value) == self.revision + 1
        self.put(key, value)

    @rule(key=KEYS, lifetime=st.sampled_from([1, 700, 2_500]))
    def set_expiring(self, key: str, lifetime: int) -> None:
        stored = Expiring(next(self.numbers), self.draft.now() + lifetime)
        assert self.draft.set(key, stored) == self.revision + 1
        self.put(key, stored)

    @rule(keys=st.lists(KEYS, min_size=1))
    def set_many(self, keys: list[str]) -> None:
        values: dict[str, Value] = {key: next(self.numbers) for key in keys}
        assert self.draft.set_many(values) == self.revision + 1
        for key, value in values.items():
            self.put(key, value)

    @rule(keys=st.lists(KEYS))
    def delete_many(self, keys: list[str]) -> None:
        assert self.draft.delete_many(keys) == self.remove(keys)

    @rule(prefix=PREFIXES)
    def delete_by_prefix(self, prefix: str) -> None:
        wanted = [key for key in self.draft.entries if key.startswith(prefix)]
        assert self.draft.delete_many(wanted) == self.remove([key for key in self.expected if key.startswith(prefix)])

    @rule()
    def clear(self) -> None:
        assert self.draft.clear() == sum(self.lives(key) for key in self.expected)
        self.expected = {}

    @rule(seconds=st.sampled_from([0.3, 1.0, 2.0]))
    def wait(self, seconds: float) -> None:
        clock_of(self.base).now += seconds

    @precondition(lambda self: not self.views)
    @rule()
    def freeze(self) -> None:
        self.views = [self.base.freeze()]

    @precondition(lambda self: self.views)
    @rule(most=st.integers(1, 3))
    def fold(self, most: int) -> None:
        if not self.base.fold(self.views[0], most):
            self.views = []

    @rule()
    def merge(self) -> None:
        changed = bool(self.was_set & self.expected.keys()) or bool(self.beneath.keys() - self.expected.keys())
        self.revision += changed
        assert self.draft.merge() == (self.revision if changed else None)
        self.beneath = self.expected
        self.begin()

    @rule()
    def drop(self) -> None:
        self.begin()

    @rule()
    def commit(self) -> None:
        taken = self.base.take()
        if taken.cleared:
            self.durable = {}
        for key, to in taken.changes.items():
            if isinstance(to, Absent):
                self.durable.pop(key, None)
            else:
                self.durable[key] = to
        assert self.durable == self.beneath

    @rule()
    def sweep(self) -> None:
        """Sweep as it happens while no transaction is open."""
        self.begin()
        now = self.base.now()
        over = {key for key, to in self.beneath.items() if isinstance(to, Expiring) and to.at < now // 1000 * 1000}
        self.base.sweep(9)
        for key in over:
            del self.beneath[key]
        self.revision += bool(over)
        self.begin()

    @invariant()
    def the_draft_is_its_dict(self) -> None:
        entries, now = self.draft.entries, self.base.now()
        assert dict(entries.items()) == self.expected
        assert sorted(entries) == sorted(self.expected)
        assert len(entries) == len(self.expected)
        for key in ("a/x", "a/y", "b", "c", "d", "none"):
            assert (key in entries) == (key in self.expected)
            assert self.draft.has(key) == self.lives(key)
        assert all(entries[key] == value for key, value in self.expected.items())
        due = {key for key, to in self.expected.items() if isinstance(to, Expiring) and to.at <= now}
        assert expired(self.draft) == due

    @invariant()
    def the_state_beneath_is_its_own(self) -> None:
        assert entries_of(self.base) == self.beneath
        assert self.base.revision == self.revision
        assert self.mirror is None or self.mirror.entries == self.beneath


class WatchedModel(Model):
    """The same, while there is a watch."""

    watched = True


TestDraftMachine = Model.TestCase
TestWatchedDraftMachine = WatchedModel.TestCase
TestDraftMachine.settings = TestWatchedDraftMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)


@given(
    beneath=st.dictionaries(st.sampled_from("abcdef"), st.integers(99_000, 102_000) | st.none()),
    changes=st.lists(
        st.tuples(st.sampled_from("abcdefg"), st.sampled_from(["set", "ttl", "delete", "clear"]), st.integers(1, 2_000))
    ),
    passed=st.sampled_from([0.0, 0.5, 1.5, 3.0]),
)
def test_keys_are_counted_without_a_look_at_each(
    beneath: dict[str, int | None], changes: list[tuple[str, str, int]], passed: float
) -> None:
    """Whatever expires, beneath and in the draft, it has as many keys as it has names."""
    state = state_of(**{key: 1 if at is None else Expiring(1, at) for key, at in beneath.items()})
    draft = Draft(state)
    for key, what, after in changes:
        if what == "clear":
            draft.clear()
        elif what == "delete":
            draft.delete_many([key])
        else:
            draft.set(key, 2 if what == "set" else Expiring(2, state.now() + after))
    state.monotonic.now += passed  # type: ignore[attr-defined]
    assert draft.count() == len(draft.names(""))


def test_a_count_makes_no_list_of_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a transaction where anything expires, the keys are counted without going through them."""
    state = state_of(a=Expiring(1, 200_000), b=2)
    draft = Draft(state)
    monkeypatch.setattr(Draft, "names", None)
    assert draft.count() == 2


def test_the_number_of_keys_under_a_prefix_after_a_clear() -> None:
    """After a clear, a draft counts only the keys that it has stored since."""
    draft = Draft(state_of(**{"a/1": 1, "a/2": 2, "b/1": 3}))
    draft.clear()
    draft.set("a/2", 5)
    draft.set("a/3", 6)
    assert draft.count_in("a/", "a0") == 2
    assert draft.count_in("b/", "b0") == 0
