"""The real engine, results, checks and open calls under deaths, cuts and failed commits: each call is applied once."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from msgspec import Raw
from owner_parts import PureOwner, change, incr, set_if_absent

from lab_state._codec import encode_record
from lab_state.shared._messages import Answer, Call, Failed, Moved, Ok, Raised, Refused
from lab_state.shared._open_calls import OpenCall, OpenCalls
from lab_state.shared._records import RecordApplier, parse_record

CLIENTS = ("a" * 32, "b" * 32)

clients = st.sampled_from([0, 1])


class Op(NamedTuple):
    """A call of the application. An update has the value that it has read."""

    kind: str
    seen: int = 0


class Client:
    """One client and its connection. Answers wait in `queue` until it receives them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: OpenCalls[Op] = OpenCalls()
        self.token = ""
        self.unsent: list[OpenCall[Op]] = []
        self.queue: list[Answer] = []

    def connect(self) -> None:
        """Begin a new connection. What was in the queue of the old one is lost."""
        self.unsent = self.calls.reconnect()
        self.token = f"{self.name[0]} {self.calls.connection}"
        self.queue = []

    def submit(self, op: Op, since: int | None, refused_on: int | None = None) -> None:
        self.calls.submit(op, 1, since, refused_on)
        self.unsent += self.calls.number_next()


class World(PureOwner):
    """An owner with a journal."""

    def __init__(self) -> None:
        super().__init__(revision=0)
        self.journal: list[bytes] = []

    def write(self) -> None:
        """Begin a commit, and write its record."""
        self.begin()
        self.journal.append(b"".join(encode_record(self.taken, self.calls)))

    def restart(self) -> None:
        """Become a new owner of what the files have."""
        seconds = self.seconds
        fresh = PureOwner(revision=0)
        for data in self.journal:
            RecordApplier(fresh.copy).apply(parse_record(data))
        self.copy, self.seconds = fresh.copy, seconds
        self.start()


class Machine(RuleBasedStateMachine):
    """Two clients make calls of three kinds: they count, they claim a key once, and they count with a check."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.clients = [Client(name) for name in CLIENTS]
        self.results: dict[str, list[object]] = {"incr": [], "claim": [], "update": []}
        self.unknown = {"incr": 0, "claim": 0, "update": 0}
        self.under_way = False
        self.revision = 0

    @initialize()
    def connect(self) -> None:
        for client in self.clients:
            self.admit(client)

    def admit(self, client: Client) -> None:
        assert self.world.engine.admit(client.name, None)
        client.connect()

    # Steps of clients

    @rule(number=clients, kind=st.sampled_from(["incr", "claim", "update", "update"]), sent=st.booleans())
    def submit(self, number: int, kind: str, sent: bool) -> None:  # noqa: FBT001 -- hypothesis passes it by name
        copy = self.world.copy
        if kind == "update":
            seen = dict(copy.entries.items()).get("update", 0)
            assert isinstance(seen, int)
            self.clients[number].submit(Op(kind, seen), copy.revision)
        else:
            self.clients[number].submit(Op(kind), None)
        if sent:
            self.send(number)

    @rule(number=clients)
    def send(self, number: int) -> None:
        client = self.clients[number]
        for call in client.unsent:
            call.sent()
            answer = self.world.engine.call(client.token, client.name, self.message(client, call))
            if answer is not None:
                client.queue.append(answer)
        client.unsent = []

    def message(self, client: Client, call: OpenCall[Op]) -> Call:
        op, n = call.call, call.number
        if op.kind == "update":
            assert call.since is not None
            made: Call = change(n, call.since, ["update"], {"update": op.seen + 1})
        else:
            made = incr(n, "incr") if op.kind == "incr" else set_if_absent(n, "claim", n)
        return msgspec.structs.replace(made, ack=client.calls.acknowledgement)

    @rule(number=clients)
    def receive(self, number: int) -> None:
        client = self.clients[number]
        answers, client.queue = client.queue, []
        for answer in answers:
            call = client.calls.find(answer.n)
            assert call is not None
            self.receive_one(client, call, answer)

    def receive_one(self, client: Client, call: OpenCall[Op], answer: Answer) -> None:
        op = call.call
        assert not isinstance(answer, Moved | Raised)
        client.calls.end(call)
        if isinstance(answer, Ok):
            assert answer.revision <= self.world.copy.revision
            result = op.seen + 1 if op.kind == "update" else msgspec.json.decode(answer.result)
            self.results[op.kind].append(result)
        elif isinstance(answer, Refused):
            assert answer.values is not None
            raw, _ = answer.values.get("update", (Raw(b"0"), None))
            client.submit(Op("update", msgspec.json.decode(raw)), answer.revision, client.calls.connection)
        else:
            assert isinstance(answer, Failed)
            self.unknown[op.kind] += 1

    @rule(number=clients, sent=st.booleans())
    def cut(self, number: int, sent: bool) -> None:  # noqa: FBT001 -- likewise
        client, engine = self.clients[number], self.world.engine
        engine.drop(client.token)
        engine.disconnect(client.name)
        self.admit(client)
        if sent:
            self.send(number)

    # Steps of the owner

    def give(self, answers: dict[str, list[Answer]]) -> None:
        for client in self.clients:
            client.queue += answers.pop(client.token, [])
        assert not answers

    @precondition(lambda self: not self.under_way)
    @rule()
    def write(self) -> None:
        self.world.write()
        self.under_way = True

    @precondition(lambda self: self.under_way)
    @rule()
    def land(self) -> None:
        self.under_way = False
        self.give(self.world.land())
        assert self.world.copy.revision >= self.revision
        self.revision = self.world.copy.revision

    @precondition(lambda self: self.under_way)
    @rule(kept=st.booleans())
    def fail(self, kept: bool) -> None:  # noqa: FBT001 -- likewise
        self.under_way = False
        if not kept:
            self.world.journal.pop()
        self.give(self.world.fail())

    @rule(kept=st.booleans())
    def die(self, kept: bool) -> None:  # noqa: FBT001 -- likewise
        if self.under_way and not kept:
            self.world.journal.pop()
        self.under_way = False
        self.world.restart()
        assert self.world.copy.revision >= self.revision
        self.revision = self.world.copy.revision
        for client in self.clients:
            self.admit(client)

    # The facts

    def teardown(self) -> None:
        while any(len(client.calls) for client in self.clients):
            for number, _ in enumerate(self.clients):
                self.send(number)
            if not self.under_way:
                self.write()
            self.land()
            for number, _ in enumerate(self.clients):
                self.receive(number)
        value = {key: stored for key, stored in self.world.copy.entries.items() if isinstance(stored, int)}
        for kind in ("incr", "update"):
            done, unknown = self.results[kind], self.unknown[kind]
            assert len(set(done)) == len(done)
            assert len(done) <= value.get(kind, 0) <= len(done) + unknown
            assert all(isinstance(result, int) and 1 <= result <= value[kind] for result in done)
        claimed = self.results["claim"]
        assert claimed.count(True) <= 1
        assert not claimed or claimed.count(True) == 1 or self.unknown["claim"]


TestEngineMachine = Machine.TestCase
TestEngineMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
