"""A model of the protocol of docs/design/shared.md: its processes, its files and each step that they can take. Pure.

A world is immutable. `steps` returns each world that can follow, so a search can visit every order of steps.
Each step checks what it does, and raises `Violation`. The promises that are checked:

* What is durable only grows. No call is in it twice. Each result in it follows from the calls before it.
* A copy is a part of what is durable, and never goes back.
* A call that returns is durable, is in the copy of its process, and has the result of its one application.
* A call that is refused is never applied.
* Revisions agree with real time.

The state of a world is its history: the tuple of all applied calls. Its revision is the length. `incr` and `update`
count up one counter, `add` and `claim` take one lock. `update` and `claim` run on the copy, and are sent with a check.

A wrong reading of the protocol is named by a text in `wrong`. Without one, the model is the protocol.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

COUNTS, TAKES = ("incr", "update"), ("add", "claim")
NEVER = -1
"""The revision of a check that is always refused."""


class Violation(Exception):  # noqa: N818 -- it is no error of the program: a promise of the protocol does not hold
    """A promise does not hold in the world that a step leads to."""


class Entry(NamedTuple):
    """One applied call in the history."""

    op: int
    kind: str
    result: int


History: TypeAlias = tuple[Entry, ...]
Results: TypeAlias = tuple[tuple[int, int], ...]
Calls: TypeAlias = tuple[tuple[str, int, Results | None], ...]
"""The member `calls` of a record: for each client its acknowledgement and results; `None` for one that is forgotten."""

Table: TypeAlias = tuple[tuple[str, int, tuple[tuple[int, int, int], ...]], ...]
"""For each client its acknowledgement, and number, result and revision of each call."""


class Record(NamedTuple):
    start: int
    entries: History
    calls: Calls

    @property
    def end(self) -> int:
        return self.start + len(self.entries)


class Op(NamedTuple):
    """One call of the application, over all its attempts."""

    client: int
    kind: str
    status: str = "later"
    floor: int = 0  # the highest revision that any caller had when the call began


class Open(NamedTuple):
    """A call of a client without an answer. `since` and `seen` are those of a check."""

    number: int
    op: int
    since: int = 0
    seen: int = 0
    refused: bool = False  # whether `since` and `seen` came with a refusal
    sent: bool = False


class Conn(NamedTuple):
    up: tuple[tuple[Any, ...], ...] = ()
    down: tuple[tuple[Any, ...], ...] = ()
    open: bool = True
    ready: bool = False


class Client(NamedTuple):
    alive: bool = True
    generation: int = 0
    number: int = 0
    book: tuple[Open, ...] = ()
    again: tuple[tuple[int, int, int], ...] = ()  # calls that were refused: op, revision and value to repeat them on
    copy: History | None = None
    table: Table = ()
    heard: int = 0
    stamp: int | None = None
    load: tuple[History, Table] | str | None = None
    kept: tuple[Record, ...] = ()
    held: tuple[tuple[Any, ...], ...] = ()
    conn: Conn | None = None
    late: tuple[tuple[Any, ...], ...] = ()  # for a wrong reading: messages of a connection that ended


class Pending(NamedTuple):
    """A result that is not durable yet; `number` 0 says that the client is forgotten."""

    client: str
    number: int
    result: int
    at: int


class Waiting(NamedTuple):
    """An answer that waits for the sync. `number` 0 is a call of the owner's own."""

    client: int
    number: int
    op: int
    result: int
    at: int
    changed: bool


class Owner(NamedTuple):
    who: int  # the number of a client, or -1 for a process without calls of its own
    layer: History
    durable: int
    table: Table
    floor: int
    base: int = 0  # changes up to this revision are not in the window of recent changes
    serving: bool = False
    stopping: bool = False
    pending: tuple[Pending, ...] = ()
    under: Record | None = None
    writing: tuple[Pending, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    known: tuple[tuple[str, int], ...] = ()  # each client that is known, and its acknowledgement
    gone: tuple[tuple[str, int], ...] = ()  # each client without a connection, and the minute when it ended
    records: tuple[Record, ...] = ()
    view: tuple[History, Table] | None = None
    full: bool = False  # whether the next commit writes the whole state, because a sync has failed


class Faults(NamedTuple):
    """How many of each fault, and of each rare step, may still come."""

    deaths: int = 0
    failures: int = 0
    cuts: int = 0
    checkpoints: int = 0
    minutes: int = 0
    given_up: int = 0
    stops: int = 0
    loads: int = 0
    joins: int = 0


class World(NamedTuple):
    ops: tuple[Op, ...]
    faults: Faults
    clients: tuple[Client, ...]
    owner: Owner | None
    snapshot: tuple[History, Table] = ((), ())
    journal: tuple[Record, ...] = ()
    synced: int = 0
    minute: int = 0
    floor: int = 0


def start(programs: tuple[tuple[str, ...], ...], faults: Faults) -> World:
    """Return a world with one owner, and a client for each program: the kinds of its calls, in order."""
    ops = tuple(Op(client, kind) for client, program in enumerate(programs) for kind in program)
    return World(ops, faults, tuple(Client() for _ in programs), Owner(-1, (), 0, (), 0, serving=True))


# Histories and tables


def counter(history: History) -> int:
    return sum(entry.kind in COUNTS for entry in history)


def taken(history: History) -> bool:
    return any(entry.kind in TAKES for entry in history)


def last_change(history: History, kind: str, base: int) -> int:
    """Return the revision of the last change after `base` of the key that a kind of call is about; 0 if there is none."""
    kinds = COUNTS if kind in COUNTS else TAKES
    return max((at for at, entry in enumerate(history, 1) if at > base and entry.kind in kinds), default=0)


def check_history(history: History) -> None:
    """Check that each call is there once, with the result that follows from those before it."""
    if len({entry.op for entry in history}) < len(history):
        raise Violation("a call was applied twice")
    count, is_taken = 0, False
    for entry in history:
        if entry.kind in COUNTS:
            count += 1
            if entry.result != count:
                raise Violation(f"{entry.kind} was not atomic")
        elif is_taken:
            raise Violation(f"{entry.kind} took what was taken")
        else:
            is_taken = True


def joined(history: History, record: Record) -> History:
    """Return a history with a record, which may begin before its end."""
    if record.start > len(history):
        raise Violation("records are missing")
    both = history[: record.start] + record.entries
    return history if len(both) <= len(history) else both


def entry_of(table: Table, client: str) -> tuple[int, tuple[tuple[int, int, int], ...]] | None:
    return next(((ack, results) for name, ack, results in table if name == client), None)


def applied(table: Table, calls: Calls, revision: int) -> Table:
    """Return a table of results after the member `calls` of a record."""
    for client, ack, results in calls:
        before = entry_of(table, client) or (0, ())
        table = tuple(entry for entry in table if entry[0] != client)
        if results is not None:
            ack = max(ack, before[0])
            merged = {number: (number, result, at) for number, result, at in before[1]}
            merged |= {number: (number, result, revision) for number, result in results}
            kept = tuple(merged[number] for number in sorted(merged) if number > ack)
            table = tuple(sorted((*table, (client, ack, kept))))
    return table


def files(world: World, *, synced: bool = False) -> tuple[History, Table]:
    """Return what the files hold; with `synced`, what of it survives a power cut."""
    history, table = world.snapshot
    for record in world.journal[: world.synced if synced else None]:
        if record.end > len(history):
            history = joined(history, record)
            table = applied(table, record.calls, record.end)
    return history, table
