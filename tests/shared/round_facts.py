"""The six facts about a history of a shared state, and the checker that verifies them. Pure, and without a search.

1. Revisions agree with real time: a call that returned before another one began has the lower revision. Both may
   have the same one if the later call changed nothing.
2. Each read of a process is exactly the state at its revision, and this revision is durable. The revisions of one
   process never go down, and include its own completed calls.
3. Each number is the sum of the calls that added to it. The returned values differ, and have no gap. Likewise,
   each list has each call once.
4. The state after the last restart has each call that returned, none that raised "not made" or a conflict, and
   each call with an unknown outcome at most once.
5. Each result is that of the one application of its call.
6. No call hangs, and no process ends by itself.

The states that processes showed are the steps of the history. A call with a revision belongs to the step that
ends at or above this revision. Within a step, the calls of one key must have an order that explains their
results, and the value at the end. A call without an answer may be in any step after it began, or in none.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from round_calls import JOINED, Call, digits, effect_of, explains, possible_effect, useful
from round_history import ABSENT, Began, Durable, Ended, Gone, Process, Saw

LONGEST = 30 * 1_000_000_000
"""The longest time that a call may take, in nanoseconds."""

GROWS = frozenset({"incr", "append", "append_both"})


class Broken(NamedTuple):
    """A fact that does not hold, and how."""

    fact: int
    what: str


class Step(NamedTuple):
    """Two states that processes showed, and no process showed one between them."""

    start: int
    end: int
    before: dict[str, Any]
    after: dict[str, Any]
    shown: int  # when a process first showed the end


class Checker:
    """The checks of one history."""

    def __init__(self, processes: Sequence[Process]) -> None:
        """Collect the calls and the states of a history."""
        self.broken: list[Broken] = []
        self._processes = processes
        self._calls: list[Call] = []
        self._reads: list[tuple[Call, int, int]] = []  # with the revisions of the copy at the begin and the end
        self._states: dict[int, dict[str, Any]] = {0: {}}
        self._first: dict[int, int] = {0: 0}
        for process in processes:
            self._collect(process)
        self._revisions = sorted(self._states)
        self._by_id = {call.id: call for call in self._calls}
        self._maybe = [call for call in self._calls if call.may_be_made]
        self._adding: dict[str, dict[int, str]] = defaultdict(dict)
        for call in self._calls:
            if call.began.kind == "incr":
                self._adding[call.began.keys[0]][call.began.digit] = call.id
        self._steps = [
            Step(start, end, self._states[start], self._states[end], self._shown_by(end))
            for start, end in zip(self._revisions, self._revisions[1:], strict=False)
        ]

    def _fail(self, fact: int, what: str) -> None:
        self.broken.append(Broken(fact, what))

    def _shown_by(self, revision: int) -> int:
        """Return when a process first showed a revision or a later one."""
        at = bisect_left(self._revisions, revision)
        return min(self._first[later] for later in self._revisions[at:])

    def check(self) -> list[Broken]:
        """Verify all facts, and return those that do not hold."""
        self._check_durable()
        self._check_times()
        self._check_catching_up()
        self._check_results_known()
        self._check_reads()
        self._check_growing()
        self._check_keys()
        self._check_listings()
        self._check_passing()
        self._check_end()
        return self.broken

    # Facts 2 and 6, process by process

    def _collect(self, process: Process) -> None:
        open_calls: dict[str, tuple[Began, int]] = {}  # with the revision that was shown when it began
        shown, own, how = 0, 0, ""
        for event in process.events:
            if isinstance(event, Began):
                open_calls[event.call] = event, shown
            elif isinstance(event, Saw):
                self._check_shown(process.name, event, shown, own)
                shown = event.revision
            elif isinstance(event, Ended):
                began, before = open_calls.pop(event.call)
                own = max(own, self._collect_call(Call(process.name, began, event), event, before))
                if event.seen < own:
                    self._fail(2, f"{event.call} returned when {process.name} showed {event.seen}, not {own}")
            elif isinstance(event, Gone):
                how = event.how
        self._calls += [Call(process.name, began, None) for began, _ in open_calls.values()]
        if how not in {"killed", "stopped"}:
            self._fail(6, f"{process.name} ended by itself: {how or 'without a word'}")
        if how != "killed" and open_calls:
            self._fail(6, f"{process.name} never ended {sorted(open_calls)}")

    def _check_shown(self, process: str, saw: Saw, before: int, own: int) -> None:
        if saw.revision < before:
            self._fail(2, f"{process} went back from revision {before} to {saw.revision}")
        if saw.revision < own:
            self._fail(2, f"{process} shows revision {saw.revision}, and has completed a call at {own}")
        self._note_state(process, saw)

    def _collect_call(self, call: Call, end: Ended, before: int) -> int:
        """Note a call that has ended. Return the revision that its process must show from now on."""
        self._calls.append(call)
        if end.at - call.began.at > LONGEST:
            self._fail(6, f"{call} took {(end.at - call.began.at) / 1e9:.1f} s")
        if call.is_read:
            self._reads.append((call, before, end.seen))
        elif call.is_ok and end.revision is None and call.began.kind not in {"catch_up", "wait"}:
            self._fail(1, f"{call} has no revision")
        return (end.revision or 0) if call.is_ok else 0

    def _note_state(self, process: str, saw: Saw) -> None:
        known = self._states.setdefault(saw.revision, saw.values)
        if known != saw.values:
            differ = sorted(
                key for key in known.keys() | saw.values.keys() if known.get(key, ABSENT) != saw.values.get(key, ABSENT)
            )
            self._fail(2, f"{process} shows another state than others at revision {saw.revision}: {differ}")
        self._first[saw.revision] = min(self._first.get(saw.revision, saw.at), saw.at)

    def _check_durable(self) -> None:
        """Check that no process has shown a revision before an owner knew that it is durable."""
        known = sorted(
            (event.revision, event.at)
            for process in self._processes
            for event in process.events
            if isinstance(event, Durable)
        )
        earliest: dict[int, float] = {}
        soonest = math.inf
        for revision, at in reversed(known):
            soonest = earliest[revision] = min(soonest, at)
        revisions = sorted(earliest)
        for process in self._processes:
            for event in process.events:
                if isinstance(event, Saw) and event.revision:
                    at = bisect_left(revisions, event.revision)
                    if at == len(revisions) or earliest[revisions[at]] > event.at:
                        self._fail(2, f"{process.name} showed revision {event.revision} before it was durable")
                        break

    # Fact 1

    def _check_times(self) -> None:
        """Compare each call with the highest revision of all calls that had returned when it began."""
        ends = sorted((call.end.at, call) for call in self._calls if call.end is not None and call.revision is not None)
        starts = sorted((call.began.at, call) for _, call in ends)
        highest: Call | None = None
        at = 0
        for began, call in starts:
            while at < len(ends) and ends[at][0] < began:
                one = ends[at][1]
                if highest is None or (one.revision or 0) > (highest.revision or 0):
                    highest = one
                at += 1
            if highest is None or not call.is_ok or highest is call:
                continue
            mine, before = call.revision or 0, highest.revision or 0
            if mine < before or (call.changed and mine == before):
                self._fail(1, f"{call} began after {highest} had returned")

    def _check_catching_up(self) -> None:
        """Check the revisions that `catch_up` and `wait_revision` promise of the copy."""
        done = sorted((call.end.at, call.revision or 0) for call in self._calls if call.end is not None and call.is_ok)
        for call in self._calls:
            if call.end is None or not call.is_ok:
                continue
            if call.began.kind == "wait" and call.end.seen < call.began.wanted:
                self._fail(1, f"{call} returned at revision {call.end.seen}, not {call.began.wanted}")
            if call.began.kind == "catch_up":
                before = max((revision for at, revision in done if at < call.began.at), default=0)
                if call.end.seen < before:
                    self._fail(
                        1, f"{call} returned at revision {call.end.seen}, and {before} was durable before it began"
                    )

    # Facts 3, 4 and 5

    def _step_of(self, revision: int) -> Step | None:
        """Return the step that leads to a revision, or over it."""
        at = bisect_left(self._revisions, revision)
        return self._steps[at - 1] if 0 < at < len(self._revisions) else None

    def _end_of_step(self, revision: int) -> int:
        """Return the revision at which the step ends that leads to a revision, or over it; 0 if there is none."""
        step = self._step_of(revision)
        return 0 if step is None else step.end

    def _may(self, step: Step, key: str) -> list[Call]:
        """Return the calls of a key without a certain outcome that may be in a step."""
        return [call for call in self._maybe if call.began.at < step.shown and _touches(call, key)]

    def _check_results_known(self) -> None:
        """Check that the last state reaches each revision of an answer."""
        for call in self._calls:
            if call.is_ok and call.revision is not None and call.revision > self._revisions[-1]:
                self._fail(4, f"{call} returned, and no process has shown its revision")

    def _check_reads(self) -> None:
        """Check that each read of a copy has the value of a state that the process showed during the call."""
        for call, low, high in self._reads:
            at, upto = bisect_left(self._revisions, low), bisect_left(self._revisions, high + 1)
            values = [self._states[revision].get(call.began.keys[0]) for revision in self._revisions[at:upto]]
            if call.result not in values:
                self._fail(2, f"{call} found a value that {call.process} did not show between {low} and {high}")

    def _grown(self, key: str, value: Any) -> list[str]:
        """Return the ids in a number or a list. In a number the order is not known."""
        if key.startswith("l/"):
            return list(value or ())
        names = self._adding[key]
        found: list[str] = []
        for digit, count in digits(value or 0).items():
            found += [names.get(digit, f"digit {digit}")] * count
        return found

    def _check_growing(self) -> None:
        """Check that each number and list grows by the calls of each step, each once, with the right results."""
        keys = {key for state in self._states.values() for key in state if key[:2] in {"n/", "l/"}}
        keys |= {key for call in self._calls if call.began.kind in GROWS for key in call.began.keys}
        for key in sorted(keys):
            here = [call for call in self._calls if call.began.kind in GROWS and key in call.began.keys]
            by_step: dict[int, list[Call]] = defaultdict(list)
            for call in here:
                if call.is_ok and call.revision is not None:
                    by_step[self._end_of_step(call.revision)].append(call)
            for step in self._steps:
                made = by_step.get(step.end, [])
                if made or step.before.get(key) != step.after.get(key):
                    self._check_growth(key, step, made)

    def _check_growth(self, key: str, step: Step, made: list[Call]) -> None:
        """Check one number or list in one step."""
        before, after = self._grown(key, step.before.get(key)), self._grown(key, step.after.get(key))
        twice = sorted({one for one in after if after.count(one) > 1})
        if twice:
            self._fail(5, f"{twice} were applied more than once to {key} up to revision {step.end}")
            return
        if key.startswith("l/") and after[: len(before)] != before:
            self._fail(
                2, f"{key} lost something between the revisions {step.start} and {step.end}: {before} to {after}"
            )
            return
        new = [one for one in after if one not in set(before)]
        if len(new) + len(before) != len(after):
            self._fail(2, f"{key} lost something between the revisions {step.start} and {step.end}")
        for call in made:
            wanted = int if key.startswith("n/") else list
            if not isinstance(call.result, wanted):
                self._fail(5, f"{call} has the result of another call")
                return
            if call.id not in new:
                self._fail(4, f"{call} is not in {key} at revision {step.end}")
        for one in new:
            maker = self._by_id.get(one)
            if maker is None:
                self._fail(3, f"{key} has {one}, which no call has made")
            elif maker not in made and not (maker.may_be_made and maker.began.at < step.shown):
                self._fail(4, f"{maker} was applied to {key} between the revisions {step.start} and {step.end}")
        self._check_grown_results(key, before, after, made)

    def _check_grown_results(self, key: str, before: list[str], after: list[str], made: list[Call]) -> None:
        if key.startswith("n/"):
            self._check_sums(key, before, after, made)
            return
        for call in made:
            if call.id not in after:
                continue
            upto = after[: after.index(call.id)]
            told = call.result if call.began.kind == "append" else call.result[call.began.keys.index(key)]
            expected = [*upto, call.id] if call.began.kind == "append" else upto
            if list(told or ()) != expected:
                self._fail(5, f"{call} was applied to {key} after {upto[-3:]}")

    def _check_sums(self, key: str, before: list[str], after: list[str], made: list[Call]) -> None:
        """Check the numbers that were returned: each has the one before it, and its own call."""
        known, last = set(before), set(after)
        certain = {call.id for call in made}
        for call in sorted(made, key=lambda one: one.result):
            told = set(self._grown(key, call.result))
            if call.id not in told or not known <= told <= last or (told - known - {call.id}) & certain:
                self._fail(3, f"{call} returned {sorted(told - set(before))} of {sorted(last - set(before))} for {key}")
                return
            known = told

    # Keys of the kind s/

    def _check_keys(self) -> None:
        names = {key for state in self._states.values() for key in state if key.startswith("s/")}
        names |= {
            key for call in self._calls for key in call.began.keys if key.startswith("s/") and len(key) > len("s/")
        }
        for key in sorted(names):
            self._check_writers(key)
            self._check_key(key)

    def _check_writers(self, key: str) -> None:
        """Check that each value was stored by a call that may be there, and came once."""
        past: set[Any] = set()
        for step in self._steps:
            old, new = step.before.get(key), step.after.get(key)
            if old == new:
                continue
            past.add(old)
            if new is ABSENT:
                continue
            call = self._by_id.get(new)
            if call is None or not (call.changed or call.may_be_made) or key not in call.began.keys:
                self._fail(4, f"{key} has {new!r} at revision {step.end}: {call}")
            elif new in past:
                self._fail(5, f"{call} was applied again to {key}, between the revisions {step.start} and {step.end}")
        popped: dict[Any, Call] = {}
        for call in self._calls:
            if call.began.kind == "pop" and call.changed and key in call.began.keys:
                if call.result in popped:
                    self._fail(5, f"{call} and {popped[call.result]} got the same value")
                popped[call.result] = call

    def _check_key(self, key: str) -> None:
        """Check that the calls of each step have an order that explains them."""
        inside: dict[int, list[Call]] = defaultdict(list)
        for call in self._calls:
            if not call.is_ok or call.revision is None or not _touches(call, key):
                continue
            if call.began.kind != "look" and not self._is_seen(call, key):
                inside[self._end_of_step(call.revision)].append(call)
        for step in self._steps:
            must, old, new = inside.get(step.end, []), step.before.get(key), step.after.get(key)
            if not must and old == new:
                continue
            needed = [effect_of(call) for call in must]
            may = [effect for call in self._may(step, key) if (effect := possible_effect(call)) is not None]
            if not explains(old, new, needed, useful(may, needed, new)):
                told = "; ".join(map(str, must)) or "no call"
                self._fail(
                    5, f"{key} went from {old!r} to {new!r} between the revisions {step.start} and {step.end}: {told}"
                )

    def _is_seen(self, call: Call, key: str) -> bool:
        """Check a call that changed nothing at a revision that a process has shown. Return False for any other call."""
        assert call.revision is not None
        state = self._states.get(call.revision)
        if call.changed or state is None:
            return False
        fits = effect_of(call).fits(state.get(key))
        if not fits and call.began.kind in JOINED:
            return False  # it may have come before another call of its process, in the same message
        if not fits:
            self._fail(5, f"{call} saw {key} at revision {call.revision}, where it is {state.get(key)!r}")
        return True

    def _check_listings(self) -> None:
        """Check the counts of `delete_all` that was alone in its step, and what transactions have read."""
        changes: dict[int, list[Call]] = defaultdict(list)
        for call in self._calls:
            if call.changed and call.revision is not None:
                changes[self._end_of_step(call.revision)].append(call)
        for call in self._calls:
            if not call.is_ok or call.revision is None:
                continue
            step = self._step_of(call.revision)
            if call.began.kind == "delete_all" and step is not None and changes[step.end] == [call]:
                prefix = call.began.keys[0]
                held = [key for key in step.before if key.startswith(prefix)]
                if call.result != len(held) and not any(call.began.at < step.shown for call in self._maybe):
                    self._fail(5, f"{call} deleted {held}")
            if call.began.kind == "look":
                self._check_look(call, step)

    def _check_look(self, call: Call, step: Step | None) -> None:
        """Check that a transaction which only reads has seen one state, and that nothing of it had changed."""
        states = [{}] if step is None else [step.after if step.end == call.revision else step.before]
        for state in states:
            expected = {key: state.get(key) for key in call.began.keys}
            if call.result != expected:
                differ = {
                    key: (call.result.get(key), expected[key])
                    for key in expected
                    if call.result.get(key) != expected[key]
                }
                self._fail(
                    2, f"{call.began.kind} {call.id} of {call.process} at revision {call.revision} read {differ}"
                )

    # Keys that expire

    def _check_passing(self) -> None:
        """Check that no value comes back in a process after it has expired or was replaced."""
        for process in self._processes:
            present: set[Any] = set()
            past: set[Any] = set()
            for event in process.events:
                if isinstance(event, Saw):
                    here = set(event.passing.values())
                    past |= present - here
                    if back := here & past:
                        self._fail(2, f"{sorted(back)} came back in {process.name} after they had expired")
                    present = here

    # The end

    def _check_end(self) -> None:
        """Check what the last state must not have, and that it is the last one."""
        last = max((call.revision or 0 for call in self._calls if call.is_ok), default=0)
        final = max(
            (event for process in self._processes for event in process.events if isinstance(event, Saw)),
            key=lambda saw: saw.at,
            default=None,
        )
        if final is None or final.revision < max(last, self._revisions[-1]):
            self._fail(4, f"the last state has revision {final and final.revision}, and {last} was answered")
        held: set[Any] = {
            one
            for state in self._states.values()
            for key, value in state.items()
            for one in (self._grown(key, value) if key[:2] in {"n/", "l/"} else [value])
        }
        for call in self._calls:
            if call.end is not None and call.end.outcome in {"not made", "raised"} and call.id in held:
                self._fail(4, f"{call} was made")


def _touches(call: Call, key: str) -> bool:
    """Return whether a call can change or see a key."""
    if call.began.kind == "delete_all":
        return key.startswith(call.began.keys[0])
    return key in call.began.keys


def check(processes: Collection[Process]) -> list[Broken]:
    """Verify the six facts for a history, and return those that do not hold."""
    return Checker(list(processes)).check()
