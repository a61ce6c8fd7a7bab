"""Seeded bugs: wrong readings of the protocol, put into the functions of the package, each with rounds that show it.

A bug is patched in each process of its rounds. The name of a bug is that of the wrong reading in
`shared_wrong`, where the model has the same one. The model has no farewells.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from round_bug_plans import (
    all_stop,
    away,
    cut,
    ended,
    fails,
    forgotten_meanwhile,
    hurried,
    killed,
    late,
    quiet,
    relayed_whole,
    takes_over_after_all,
)
from round_life import Bounds, Disk, Network
from round_plan import Round
from round_points import wrap

from lab_state.shared import _clients as clients
from lab_state.shared._checks import RecentChanges
from lab_state.shared._engine import Engine
from lab_state.shared._executed import Executed
from lab_state.shared._found import Found
from lab_state.shared._messages import Moved
from lab_state.shared._open_calls import OpenCall, OpenCalls
from lab_state.shared._optimistic import OptimisticDraft
from lab_state.shared._results import PendingResults, ResultTable

SHARED = "lab_state.shared."


class Bug(NamedTuple):
    """A seeded bug.

    Attributes:
        patch: The function that puts it into a process.
        plan: A function that returns a round for a seed.
    """

    patch: Callable[[], object]
    plan: Callable[[random.Random, str], Round]


BUGS: dict[str, Bug] = {}


def bug(name: str, plan: Callable[[random.Random, str], Round]) -> Callable[[Callable[[], object]], None]:
    """Register the function below as a bug."""

    def register(patch: Callable[[], object]) -> None:
        BUGS[name] = Bug(patch, plan)

    return register


# Answers and records


def _answered_at_once(keeps: Callable[[Any], bool], change: Callable[[Any, Any], Any]) -> None:
    """Answer calls before the commit that they wait for."""

    def calling(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, connection: Any, client: str, message: Any) -> Any:
            answer = original(self, connection, client, message)
            waiting = self.engine._waiting.get(connection)
            if answer is not None or not waiting or not keeps(waiting[-1].executed):
                return answer
            one = change(self, waiting.pop())
            return one.answer(one.executed.at)

        return call

    wrap(f"{SHARED}_owner_flusher", "OwnerFlusher.call", calling)


@bug("answers before the sync", quiet)
def _answers_before_sync() -> None:
    _answered_at_once(lambda executed: True, lambda _, one: one)


@bug("an unchanged call is answered at once", hurried)
def _unchanged_at_once() -> None:
    _answered_at_once(lambda executed: not executed.changed, lambda _, one: one)


@bug("an unchanged call has the durable revision", hurried)
def _unchanged_durable() -> None:
    def change(self: Any, one: Any) -> Any:
        executed = one.executed
        return one._replace(executed=Executed(self.shown.revision, executed._result, executed.error, changed=False))

    _answered_at_once(lambda executed: not executed.changed, change)


@bug("answers before the record", quiet)
def _answers_before_record() -> None:
    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, data: asyncio.get_running_loop().call_later(0.004, original, self, data)

    wrap(f"{SHARED}_owner", "Owner.record", recording)


@bug("feeds before the sync", quiet)
def _feeds_before_sync() -> None:
    def encoding(original: Callable[..., Any]) -> Callable[..., Any]:
        def encoded(self: Any, record: bytes) -> None:
            original(self, record)
            if self._record.end > self._record.start:
                self._listener.record(record)

        return encoded

    wrap(f"{SHARED}_owner_flusher", "OwnerFlusher._encoded", encoding)


@bug("the owner reads its layer", quiet)
def _reads_layer() -> None:
    def showing(original: Callable[..., Any]) -> Callable[..., Any]:
        def show(self: Any) -> None:
            original(self)
            if self._owner is not None:
                self._core.state = self._owner.flusher.state

        return show

    wrap(f"{SHARED}_member", "Member._show", showing)


@bug("catch_up returns at once", late)
def _catches_up_at_once() -> None:
    def catching(original: Callable[..., Any]) -> Callable[..., Any]:
        async def catch_up(self: Any) -> None:
            self.check_open()

        return catch_up

    wrap(f"{SHARED}_port", "SharedPort.catch_up", catching)


# Loads


@bug("shows a load at once", cut(bounds=Bounds(kept_records=1), disk=Disk(delay=0.02)))
def _shows_load() -> None:
    def reading(original: Callable[..., Any]) -> Callable[..., Any]:
        async def read(self: Any) -> Any:
            self._named = 1 << 60
            return await original(self)

        return read

    wrap(f"{SHARED}_follower", "Follower._read", reading)


# Takeovers


@bug("admits before it has settled", killed("record taken", "after the write", "after the sync"))
def _admits_unsettled() -> None:
    def settling(original: Callable[..., Any]) -> Callable[..., Any]:
        async def settle(session: Any, base: Any, tail: Any) -> None:
            pass

        return settle

    wrap(f"{SHARED}_member", "settle", settling)


@bug("a record has no results", killed("after the sync", "before it is shown"))
def _no_results() -> None:
    def beginning(original: Callable[..., Any]) -> Callable[..., Any]:
        def begin(self: Any, taken: Any) -> None:
            original(self, taken)

        return begin

    wrap(f"{SHARED}_engine", "Engine.begin", beginning)


@bug("a new owner skips the results of the tail", killed("after the sync", "before it is shown"))
def _skips_tail_results() -> None:
    def applying(original: Callable[..., Any]) -> Callable[..., Any]:
        async def apply_all(self: Any, records: Any) -> None:
            await original(self, [record._replace(calls=None) for record in records])

        return apply_all

    wrap(f"{SHARED}_copy", "SharedCopy.apply_all", applying)


@bug("a new owner does not look up its own calls", killed("after the sync", "before it is shown"))
def _no_own_lookup() -> None:
    def owning(original: Callable[..., Any]) -> Callable[..., Any]:
        def own(self: Any, owner: Any, now: int) -> None:
            find = Engine.find
            Engine.find = lambda *_: None  # type: ignore[method-assign]
            try:
                original(self, owner, now)
            finally:
                Engine.find = find  # type: ignore[method-assign]

        return own

    wrap(f"{SHARED}_port", "SharedPort.own", owning)


@bug("a new owner keeps to its copy", killed("shown", network=Network(share=0.5, delay=0.03)))
def _keeps_to_copy() -> None:
    def finding(original: Callable[..., Any]) -> Callable[..., Any]:
        async def find(files: Any, copy: Any) -> Any:
            return await original(files, copy) if copy is None else Found(None, [])

        return find

    wrap(f"{SHARED}_member", "find", finding)


@bug(
    "a new owner checks from 0",
    killed("after the sync", "before it is shown", calls={"append": 1}, lists=1, tasks=1, pause=0.015, least=2, most=8),
)
def _checks_from_zero() -> None:
    def making(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, revision, *more: original(self, 0, *more)

    wrap(f"{SHARED}_checks", "RecentChanges.__init__", making)


# Calls that are sent again


@bug("sends again with new numbers", cut())
def _new_numbers() -> None:
    def reconnecting(original: Callable[..., Any]) -> Callable[..., Any]:
        def reconnect(self: Any) -> Any:
            calls = original(self)
            self._open.clear()
            for call in calls:
                self._last += 1
                call.number = self._last
                self._open[call.number] = call
            return calls

        return reconnect

    wrap(f"{SHARED}_open_calls", "OpenCalls.reconnect", reconnecting)


@bug("a repeat misses what is not durable", cut(disk=Disk(delay=0.03)))
def _misses_pending() -> None:
    PendingResults.find = lambda *_: None  # type: ignore[method-assign]


@bug("a failed commit drops its results", fails(every=3))
def _drops_results() -> None:
    def putting(original: Callable[..., Any]) -> Callable[..., Any]:
        def put_back(self: Any) -> None:
            self._under_way = {}

        return put_back

    wrap(f"{SHARED}_results", "PendingResults.put_back", putting)


@bug(
    "a full frame lacks its own results",
    killed("before it is shown", least=1, most=5, disk=Disk(failing=tuple(range(2, 200)))),
)
def _frame_without_results() -> None:
    def results(original: Callable[..., Any]) -> Callable[..., Any]:
        def found(self: Any) -> Any:
            held = self._copy.results
            return None if held is None else held.snapshot()

        return found

    wrap(f"{SHARED}_views", "FrameViews._results", results)


@bug("a snapshot has no results", relayed_whole)
def _snapshot_without_results() -> None:
    ResultTable.snapshot = lambda self: {}  # type: ignore[method-assign]


@bug("acknowledges what is open", killed("after the sync", "before it is shown"))
def _acknowledges_open() -> None:
    def calling(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, connection: Any, client: str, message: Any) -> Any:
            answer = original(self, connection, client, message)
            self.clients.acknowledge(client, message.n)
            return answer

        return call

    wrap(f"{SHARED}_engine", "Engine.call", calling)


@bug("a repeat gets the result of another call", killed("after the sync", "before it is shown", calls={"incr": 1}))
def _another_result() -> None:
    def finding(original: Callable[..., Any]) -> Callable[..., Any]:
        def find(self: Any, client: str, number: int) -> Any:
            found = original(self, client, number)
            entry = self._clients.get(client)
            return found if found is None or entry is None else entry.results[max(entry.results)]

        return find

    wrap(f"{SHARED}_results", "ResultTable.find", finding)


@bug("moves a call that it applied", ended)
def _moves_applied() -> None:
    def calling(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, connection: Any, client: str, message: Any) -> Any:
            answer = original(self, connection, client, message)
            if isinstance(answer, Moved):
                self.execute(message)
            return answer

        return call

    wrap(f"{SHARED}_engine", "Engine.call", calling)


# Checks


@bug("a check misses what is not durable", quiet)
def _misses_layer() -> None:
    durable = 0

    def executing(original: Callable[..., Any]) -> Callable[..., Any]:
        def execute(self: Any, call: Any) -> Any:
            nonlocal durable
            durable = self._copy.revision
            return original(self, call)

        return execute

    def hold(self: Any, since: int, keys: Any, prefixes: Any) -> bool:
        return not keys or (
            since >= self.floor and all(not since < self._changed.get(key, 0) <= durable for key in keys)
        )

    wrap(f"{SHARED}_engine", "Engine.execute", executing)
    RecentChanges.hold = hold  # type: ignore[method-assign]


@bug("a check misses what was not there", hurried)
def _misses_absent() -> None:
    def reading(original: Callable[..., Any]) -> Callable[..., Any]:
        def reads(self: Any) -> Any:
            keys, prefixes = original(self)
            return [key for key in keys if self.base.has(key)], prefixes

        return reads

    assert hasattr(OptimisticDraft, "reads")
    wrap(f"{SHARED}_optimistic", "OptimisticDraft.reads", reading)


@bug(
    "a check rests on a lost revision",
    killed(
        "before the write",
        "record taken",
        "after the write",
        calls={"append": 1},
        lists=1,
        tasks=2,
        least=2,
        disk=Disk(delay=0.008),
        seconds=0.7,
    ),
)
def _lost_revision() -> None:
    OpenCall.reconnect = lambda self: None  # type: ignore[method-assign]

    def submitting(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, call, size, since=None, refused_on=None: original(self, call, size, since, None)

    wrap(f"{SHARED}_open_calls", "OpenCalls.submit", submitting)
    assert hasattr(OpenCalls, "submit")


# Clients that were forgotten


@bug("admits a forgotten client", away)
def _admits_forgotten() -> None:
    def admitting(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, client, heard, now: original(self, client, now, now)

    assert clients.FORGOTTEN_AFTER
    wrap(f"{SHARED}_clients", "Clients.admit", admitting)


@bug("a new owner was not forgotten", takes_over_after_all)
def _owner_not_forgotten() -> None:
    OpenCalls.is_forgotten = lambda *_: False  # type: ignore[method-assign]


@bug("answers go to a later connection", forgotten_meanwhile)
def _answers_to_later() -> None:
    Engine.drop = lambda *_: None  # type: ignore[method-assign]

    def answering(original: Callable[..., Any]) -> Callable[..., Any]:
        def answers(self: Any, connection: Any, some: Any) -> None:
            if not connection.is_open:
                later = [one for one in self.server._connections if one._pid == connection._pid and one.is_admitted]
                connection = later[0] if later else connection
            original(self, connection, some)

        return answers

    wrap(f"{SHARED}_owner", "Owner.answers", answering)


# The end of an owner


@bug("hands over to followers that leave", all_stop)
def _hands_over_too_early() -> None:
    def handing_over(original: Callable[..., Any]) -> Callable[..., Any]:
        async def hand_over(self: Any) -> Any:
            return bool(self.server.followers) | await original(self)

        return hand_over

    wrap(f"{SHARED}_owner", "Owner.hand_over", handing_over)
