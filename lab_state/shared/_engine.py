"""The owner's part of the protocol: it executes calls, keeps their results, and answers them. This module does no I/O.

Each call is executed on the layer: the changes that are not durable yet, over the durable copy. A call with many keys is
executed in steps, and no other call is executed meanwhile. Any other call is executed in one step. A call that changed
something is answered when its record is durable. The answer has the last revision of that record. A call that changed
nothing is answered when the revision that it read is durable. A refused check is answered at once.

`OwnerFlusher` tells the engine of each commit: `begin`, then `landed` or `put_back`. The first section of
`docs/design/shared.md` explains the words of this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Coroutine, Generator, Hashable, Iterator
from enum import Enum
from typing import Any, Generic, Literal, TypeVar, cast

from msgspec import Raw

from lab_state._calls import Calls, at_once
from lab_state._core import CallCore
from lab_state._entries import DELETED, ChangeSet, Expiring, Stored, StoredOrGone, Value, size_of
from lab_state._following import stored_of
from lab_state._metrics import Counters
from lab_state._periods import Seconds
from lab_state._state import State
from lab_state._values import encode
from lab_state.exceptions import InvalidValueError, TypeMismatchError
from lab_state.shared._attempts import Attempts
from lab_state.shared._checks import RecentChanges
from lab_state.shared._clients import Clients
from lab_state.shared._executed import Executed, Waiting
from lab_state.shared._large_calls import is_large, parts_of
from lab_state.shared._layer import OwnerLayer
from lab_state.shared._messages import (
    Answer,
    Call,
    Changes,
    Delete,
    DeleteAll,
    DeleteMany,
    Failed,
    Incr,
    MakeChanges,
    Moved,
    Ok,
    Refused,
    Set,
    SetIfAbsent,
    SetMany,
    Touch,
)
from lab_state.shared._results import PendingResults, RecordCalls, Result, ResultTable, needs_forgetting
from lab_state.shared._value_checks import ValueChecks

C = TypeVar("C", bound=Hashable)
R = TypeVar("R")

MOST_VALUES = 16
"""The largest number of keys whose values a refusal has."""

MOST_BYTES = 1024 * 1024
"""The largest total size of the values in a refusal, in bytes."""

_KINDS: dict[str, Any] = {"any": Any, "int": int, "float": float}


class _Found(Enum):
    """The outcome of the search for an earlier execution of a call."""

    NEW = "new"


_NEW: Literal[_Found.NEW] = _Found.NEW


class _LayerCore(CallCore):
    """The core of the calls on a layer. None of them waits."""

    __slots__ = ()

    def __init__(self, layer: State) -> None:
        super().__init__("", layer, Counters())
        self.blocked = True  # otherwise `set` would write into the entries without `apply`; see `Writing.set`

    def check_open(self) -> None:
        """Do nothing: a layer is always open."""

    @property
    def must_wait(self) -> bool:
        """Always True, so that each write calls `turn`."""
        return True

    async def turn(self) -> None:
        """Return at once."""


class _LayerCalls(Calls):
    """The calls on a layer."""

    __slots__ = ()

    def _check_loop(self) -> None:
        """Do nothing: the caller of the engine is on the right event loop."""


class _MessageCalls(_LayerCalls):
    """The calls on a layer. Each time to live is a number of whole milliseconds, as in the messages."""

    __slots__ = ()

    def _lifetime(self, ttl: Seconds | None) -> int | None:
        return cast("int | None", ttl)


class Engine(Generic[C]):
    """The calls of all clients of one owner, from its start to its end. `C` is the type of a connection.

    Attributes:
        clients: The clients that the owner knows.
        attempts: The keys for which a client is about to make another attempt.
        is_ending: Whether calls that were not executed before are answered with "moved".
    """

    def __init__(
        self,
        layer: OwnerLayer,
        monotonic_ns: Callable[[], int],
        value_check: Callable[[str, Value], object] | None = None,
    ) -> None:
        """Begin with the loaded state. A client in the table of results is forgotten if it does not connect within a minute.

        Args:
            layer: The layer. It has no changes yet. Its copy has the loaded state and the table of results.
                The engine sets `on_applied` of the layer.
            monotonic_ns: A function that returns the time of `CLOCK_MONOTONIC`, in nanoseconds.
            value_check: See `CallCore`. Another process checks its values itself, unless it has no schema.
        """
        self.is_ending: bool = False
        self._layer = layer
        self._copy = layer.copy
        self._now = monotonic_ns
        self.clients: Clients = Clients(self._table.acknowledged, monotonic_ns())
        self._recent = RecentChanges(layer.copy.revision)
        self.attempts: Attempts = Attempts(monotonic_ns)
        self._pending = PendingResults()
        self._waiting: dict[C, list[Waiting]] = {}
        self._own: list[Executed[Any]] = []
        self._end: float = math.inf  # the revision at which the record under way ends
        self._core = _LayerCore(layer)
        self._core.value_check = value_check
        self._value_checks = ValueChecks(value_check)
        self._calls = _MessageCalls(self._core, "")
        layer.on_applied = self._note

    @property
    def _table(self) -> ResultTable:
        """The results that are durable."""
        return self._copy.results or ResultTable()

    def _note(self, keys: Collection[str] | None, revision: int) -> None:
        """Note a change of the layer, for the checks of later calls. The keys are `None` after a clear."""
        if keys is None:
            self._recent.note_clear(revision)
        else:
            self._recent.note(keys, revision)

    # Clients

    def admit(self, client: str, heard: int | None, *, checks: bool = True) -> bool:
        """Note a new connection of a client. Return False if the client is not known, and may have been forgotten.

        `checks` says whether the client checks its values itself.
        """
        is_known = self.clients.admit(client, heard, self._now())
        if is_known and not checks:
            self._value_checks.add(client)
        return is_known

    def disconnect(self, client: str) -> None:
        """Note the end of the last connection of a client."""
        self.clients.disconnect(client, self._now())

    def drop(self, connection: C) -> None:
        """Drop the answers that wait for a connection, because it has ended. The calls stay executed."""
        self._waiting.pop(connection, None)

    def farewell(self, client: str) -> None:
        """Forget a client that has said farewell."""
        self.clients.forget(client)
        self._forget(client)

    def forget_gone(self) -> None:
        """Forget the clients that have had no connection for a minute. Call this every second."""
        for client in self.clients.forget_gone(self._now()):
            self._forget(client)

    def _forget(self, client: str) -> None:
        self._value_checks.forget(client)
        if needs_forgetting(client, self._table, self._pending):
            self._pending.forget(client)

    # Calls

    def call(self, connection: C, client: str, call: Call) -> Answer | None:
        """Execute a call of a client, or find the result of its first execution.

        Return the answer if it can be sent now. Otherwise return `None`. Then `landed` or `failed` returns the
        answer later, unless the connection ends before that.

        Args:
            connection: The connection on which the call came. Its answer goes there.
            client: The id of the client, which must be known.
            call: The call.
        """
        if (known := self._known(connection, client, call)) is not _NEW:
            return known
        return self._keep(connection, client, call.n, self.execute(call, client))

    def call_in_steps(self, connection: C, client: str, call: Call) -> Generator[None, None, Answer | None]:
        """Execute a call of a client as `call` does, and yield between two steps.

        Run all steps. Until then, nothing else may be executed, and no commit may begin. See `OwnerLayer.apply_in_steps`.
        """
        if (known := self._known(connection, client, call)) is not _NEW:
            return known
        return self._keep(connection, client, call.n, (yield from self.execute_in_steps(call, client)))

    def _known(self, connection: C, client: str, call: Call) -> Answer | Literal[_Found.NEW] | None:
        """Return the answer to a call that was executed before; `None` if the answer comes later.

        If the call was not executed, return `_NEW`, or the answer `Moved` at the end of the owner.
        """
        self.clients.acknowledge(client, call.ack)
        if (applied := self._pending.find(client, call.n)) is not None:
            return self._wait(connection, call.n, Executed(applied.at, applied.value, changed=True))
        if (found := self.find(client, call.n)) is not None:
            return Ok(call.n, found.revision, Raw(found.value))
        return Moved(call.n) if self.is_ending else _NEW

    def _keep(self, connection: C, client: str, number: int, executed: Executed[bytes] | Refused) -> Answer | None:
        """Keep the result of a call that was executed. Return the answer if it can be sent now."""
        if isinstance(executed, Refused):
            return executed
        if executed.changed:
            self._pending.add(client, number, executed.result, executed.at)
        return self._wait(connection, number, executed)

    def _wait(self, connection: C, number: int, executed: Executed[bytes]) -> Answer | None:
        waiting = Waiting(number, executed)
        if not executed.changed and executed.at <= self._copy.revision:
            return waiting.answer(executed.at)
        self._waiting.setdefault(connection, []).append(waiting)
        return None

    def find(self, client: str, number: int) -> Result | None:
        """Return the durable result of a call; `None` if there is none. A new owner uses this for the calls of its own tasks."""
        return self._table.find(client, number)

    def execute(self, call: Call, client: str | None = None) -> Executed[bytes] | Refused:
        """Execute a call on the layer, without a search for an earlier execution. The result of the call is JSON.

        If the check of the call does not hold, return a refusal. A `TypeMismatchError` or an `InvalidValueError`
        that a value causes is not raised, but returned in the `Executed`. Then nothing was changed. `client` is `None` for
        a call of a task of the owner.
        """
        before = self._layer.revision
        if isinstance(call, MakeChanges) and not self._holds(call):
            return Refused(call.n, before, self._values(call.keys))
        try:
            self._value_checks.run(client, call)
            result = encode(self._apply(call))
        except (TypeMismatchError, InvalidValueError) as error:
            return Executed(before, None, error, changed=False)
        return self._executed(before, result)

    def _holds(self, call: MakeChanges) -> bool:
        """Return whether the check of a call holds. If the check has one key and no prefix, as in an `update`, note the attempt."""
        holds = self._recent.hold(call.since, call.keys, call.prefixes)
        if len(call.keys) == 1 and not call.prefixes:
            (self.attempts.make if holds else self.attempts.refuse)(call.keys[0])
        return holds

    # Calls with many keys

    def is_large(self, call: Call) -> bool:
        """Return whether a call has so many keys that it is executed in steps."""
        return is_large(call, self._layer)

    def execute_in_steps(
        self, call: Call, client: str | None = None
    ) -> Generator[None, None, Executed[bytes] | Refused]:
        """Execute a call as `execute` does, and yield between two steps; see `call_in_steps`."""
        if not self.is_large(call):
            return self.execute(call, client)
        layer = self._layer
        before, cleared, parts = layer.revision, False, parts_of(call, layer)
        if isinstance(call, DeleteAll):
            yield from self._copy.index_steps()
        elif isinstance(call, MakeChanges):
            if not (yield from self._recent.hold_in_steps(call.since, call.keys, call.prefixes)):
                return Refused(call.n, before, self._values(call.keys))
            cleared = call.changes.clear and (bool(call.changes.set) or len(layer.entries) > 0)
        if (error := (yield from self._value_checks.run_in_steps(client, call))) is not None:
            return self._executed(before, None, error)
        count = yield from layer.apply_in_steps(parts, cleared=cleared)
        return self._executed(before, encode(count if isinstance(call, DeleteMany | DeleteAll) else None))

    def run(self, body: Callable[[Calls], Coroutine[Any, Any, R]], prefix: str = "") -> Executed[R]:
        """Run a function that makes one call on the layer, such as an `update`. An error is returned in the `Executed`.

        Args:
            body: A function that gets calls on the layer and makes one of them. The call must not wait.
            prefix: The prefix of the keys of these calls.
        """
        before = self._layer.revision
        try:
            result = at_once(body(_LayerCalls(self._core, prefix)))
        except Exception as error:  # noqa: BLE001 -- the caller raises it when everything that the function has read is durable
            return self._executed(before, None, error)
        return self._executed(before, result)

    def _executed(self, before: int, result: R | None, error: Exception | None = None) -> Executed[R]:
        after = self._layer.revision
        return Executed(after, result, error, changed=after > before)

    def own(self, executed: Executed[Any]) -> None:
        """Note that a task of the owner waits for a call. `landed` sets the revision of its answer."""
        if executed.changed:
            self._own.append(executed)

    def _apply(self, call: Call) -> object:
        """Make the changes of a call, and return its result."""
        if isinstance(call, Set):  # the most frequent call
            self._layer.set(call.key, self._stored(call.value, call.ttl))
            return None
        if isinstance(call, SetMany | SetIfAbsent):
            return self._store(call)
        if isinstance(call, MakeChanges):
            self._make(call.changes)
            return None
        return at_once(self._coroutine(call))

    def _coroutine(self, call: Incr | Touch | Delete | DeleteMany | DeleteAll) -> Coroutine[Any, Any, object]:
        """Return the call of the same name on the layer."""
        calls = self._calls
        if isinstance(call, Incr):
            kind, ttl = _KINDS[call.kind], cast("Seconds | None", call.ttl)
            return calls.incr(call.key, call.delta, type=kind, default=call.default, ttl=ttl)
        if isinstance(call, Touch):
            return calls.touch(call.key, cast("Seconds | None", call.ttl))
        if isinstance(call, Delete):
            return calls.delete(call.key)
        return calls.delete_many(call.keys) if isinstance(call, DeleteMany) else calls.delete_all(call.prefix)

    def _store(self, call: SetMany | SetIfAbsent) -> bool | None:
        """Store values. They are not checked again, because the client or `ValueChecks` has checked them."""
        layer, ttl = self._layer, call.ttl
        if isinstance(call, SetIfAbsent) and layer.has(call.key):
            return False
        values = call.values if isinstance(call, SetMany) else {call.key: call.value}
        if values:
            layer.apply({key: self._stored(raw, ttl) for key, raw in values.items()}, cleared=False)
        return True if isinstance(call, SetIfAbsent) else None

    def _stored(self, raw: Raw, ttl: int | None) -> Stored:
        value = stored_of(raw)
        return value if ttl is None else Expiring(value, self._layer.now() + ttl)

    def _make(self, made: Changes) -> None:
        """Make changes that a client has computed. Deletions of missing keys are left out."""
        layer = self._layer
        changes: dict[str, StoredOrGone] = {}
        if not made.clear:
            entries = layer.entries
            changes.update((key, DELETED) for key in made.delete if key in entries)
        for key, raw in made.set.items():
            value, at = stored_of(raw), made.expires.get(key)
            changes[key] = value if at is None else Expiring(value, at)
        if changes or (made.clear and len(layer.entries)):
            layer.apply(changes, cleared=made.clear)

    def _values(self, keys: Collection[str]) -> dict[str, tuple[Raw, int | None]] | None:
        """Return the present values of keys for a refusal; `None` if there are too many, or if they are too large."""
        if len(keys) > MOST_VALUES:
            return None
        layer, left = self._layer, MOST_BYTES
        values: dict[str, tuple[Raw, int | None]] = {}
        for key in keys:
            if layer.has(key):
                stored = layer.entries[key]
                value, at = (stored.value, stored.at) if isinstance(stored, Expiring) else (stored, None)
                left -= size_of(value)
                if left < 0:
                    return None
                values[key] = (Raw(value) if isinstance(value, bytes) else Raw(encode(value)), at)
        return values

    # Commits

    def begin(self, taken: ChangeSet) -> RecordCalls:
        """Note that a commit begins, and return the member `calls` of its record. Call this in the step that took the changes.

        A record without changes has no results, because a process that has reached the end of the record would skip it.
        """
        self._end = taken.end
        return self._pending.take(self.clients.acknowledged) if taken.end > taken.start else {}

    def landed(self) -> dict[C, list[Answer]]:
        """Note that the record of the commit is durable, and that the copy has it. Return the answers that can be sent now."""
        end, self._end = int(self._end), math.inf
        self._pending.settle()
        for executed in self._own:
            if executed.at <= end:
                executed.revision = end
        self._own = [executed for executed in self._own if not executed.revision]
        return {connection: [one.answer(end) for one in ready] for connection, ready in self._ready(end)}

    def put_back(self) -> None:
        """Note that the commit failed. Put its results back, for the next record. A second call does nothing."""
        self._pending.put_back()

    def failed(self, error: str, message: str) -> dict[C, list[Answer]]:
        """Return the answers to the calls of a failed commit. Call `put_back` first.

        Args:
            error: The name of the class of the error.
            message: The text of the error, without a value.
        """
        end, self._end = self._end, math.inf
        return {
            connection: [Failed(one.number, error, message) for one in ready] for connection, ready in self._ready(end)
        }

    def _ready(self, end: float) -> Iterator[tuple[C, list[Waiting]]]:
        """Remove the waiting calls up to a revision, and yield them by connection."""
        for connection, waiting in list(self._waiting.items()):
            ready = [one for one in waiting if one.executed.at <= end]
            if len(ready) == len(waiting):
                del self._waiting[connection]
            else:
                self._waiting[connection] = [one for one in waiting if one.executed.at > end]
            if ready:
                yield connection, ready

    def close(self) -> None:
        """Drop all answers that wait: there will be no further commit."""
        self._waiting.clear()
        self._own.clear()
