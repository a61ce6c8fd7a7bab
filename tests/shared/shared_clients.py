"""The steps of a client in the model of the protocol: calls, messages that it receives, loads. Pure."""

from __future__ import annotations

from typing import Any

from shared_world import (
    COUNTS,
    NEVER,
    History,
    Open,
    Record,
    Violation,
    World,
    applied,
    counter,
    files,
    joined,
    taken,
)


def name_of(client: int, generation: int) -> str:
    """Return the id of a client. It takes a new one when it was forgotten."""
    return "AB"[client] + "'" * generation


def with_client(w: World, which: int, **changes: Any) -> World:
    clients = list(w.clients)
    clients[which] = clients[which]._replace(**changes)
    return w._replace(clients=tuple(clients))


class ClientSteps:
    """What a client does."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong

    # What a caller sees

    def finish(self, w: World, number: int, op: int, status: str) -> World:
        """End a call without a result."""
        ops = list(w.ops)
        ops[op] = ops[op]._replace(status=status)
        return w._replace(ops=tuple(ops))

    def finish_ok(self, w: World, number: int, op: int, result: int, revision: int, changed: bool) -> World:  # noqa: FBT001, PLR0917
        """Return a result to the caller, and check it."""
        kind, floor = w.ops[op].kind, w.ops[op].floor
        client, durable = w.clients[number], files(w, synced=True)[0]
        if w.ops[op].status != "open":
            return w
        if client.copy is None or len(client.copy) < revision:
            raise Violation("a call returned before its revision was in the copy")
        if len(durable) < revision:
            raise Violation("a call returned before its revision was durable")
        at = next((at for at, entry in enumerate(durable, 1) if entry.op == op), 0)
        if changed:
            if not 0 < at <= revision:
                raise Violation("a call returned, and its change is lost")
            if durable[at - 1].result != result:
                raise Violation("a call has the result of another application")
        elif at or any(entry.op == op for entry in files(w)[0]):
            raise Violation("a call said that it changed nothing, and was applied")
        elif not result and kind not in COUNTS and not taken(durable[:revision]):
            raise Violation("a call that changed nothing has a wrong result")
        if revision < floor + changed:
            raise Violation("revisions do not agree with real time")
        return self.finish(w._replace(floor=max(w.floor, revision)), number, op, "done")

    def show(self, w: World, number: int, copy: History) -> World:
        """Let a process read a copy from now on."""
        before = w.clients[number].copy or ()
        if copy[: len(before)] != before:
            raise Violation("a copy went back")
        if files(w, synced=True)[0][: len(copy)] != copy:
            raise Violation("a copy shows what is not durable")
        return with_client(w, number, copy=copy)

    # Calls

    def make(self, w: World, number: int) -> World | None:
        """Make the next call of the application, if there is one."""
        client = w.clients[number]
        op = next((at for at, op in enumerate(w.ops) if op.client == number and op.status == "later"), None)
        if op is None or client.copy is None or (client.conn is None and w.owner is not None and w.owner.who != number):
            return None
        if w.owner is not None and w.owner.who == number and not w.owner.serving:
            return None
        ops = list(w.ops)
        ops[op] = ops[op]._replace(status="open", floor=w.floor)
        w = w._replace(ops=tuple(ops))
        if w.owner is not None and w.owner.who == number:
            return self.own(w, number, op)
        seen = counter(client.copy) if ops[op].kind in COUNTS else int(taken(client.copy))
        return self.send_new(w, number, op, len(client.copy), seen)

    def send_new(self, w: World, number: int, op: int, since: int, seen: int, *, refused: bool = False) -> World:
        """Give a call the next number, and send it if there is a connection."""
        client = w.clients[number]
        call = Open(client.number + 1, op, since, seen, refused)
        w = with_client(w, number, number=call.number, book=(*client.book, call))
        return self.send(w, number, call)

    def send(self, w: World, number: int, call: Open) -> World:
        client = w.clients[number]
        if client.conn is None or not client.conn.open or not client.conn.ready:
            return w
        book = tuple(one._replace(sent=True) if one.number == call.number else one for one in client.book)
        ack = client.book[0].number - 1
        if self.wrong == "acknowledges what is open":
            ack = call.number - 1
        message = ("call", call.number, ack, call.op, call.since, call.seen)
        return with_client(w, number, book=book, conn=client.conn._replace(up=(*client.conn.up, message)))

    def repeat(self, w: World, number: int, op: int, since: int, seen: int) -> World:
        """Send a refused call again, with a new number, on what the refusal brought."""
        w = with_client(w, number, again=w.clients[number].again[1:])
        return self.send_new(w, number, op, since, seen, refused=True)

    def give_up(self, w: World, number: int, call: Open) -> World:
        """Stop waiting for a call: it counts as answered, and is not sent again."""
        w = with_client(w, number, book=tuple(one for one in w.clients[number].book if one != call))
        return self.finish(w, number, call.op, "unknown")

    # Messages

    def receive(self, w: World, number: int) -> World:
        client = w.clients[number]
        assert client.conn is not None
        kind, *rest = client.conn.down[0]
        w = with_client(w, number, conn=client.conn._replace(down=client.conn.down[1:]), stamp=rest[-1])
        if kind == "welcome":
            w = self.welcomed(w, number, *rest[:-1])
        elif kind == "record":
            record: Record = rest[0]
            w = with_client(w, number, heard=record.end)
            if client.load is not None:
                w = with_client(w, number, kept=(*client.kept, record))
            else:
                w = self.take(w, number, record)
        elif client.load is not None:  # an answer comes after its record, so it waits for the load
            w = with_client(w, number, held=(*client.held, (kind, *rest)))
        else:
            w = self.answered(w, number, kind, *rest[:-1])
        return self.arrive(w, number)

    def welcomed(self, w: World, number: int, known: bool, durable: int, load: bool) -> World:  # noqa: FBT001
        client = w.clients[number]
        assert client.conn is not None
        w = with_client(w, number, conn=client.conn._replace(ready=True), heard=durable)
        if load and not (isinstance(client.load, tuple) and self.wrong == "a load outlives its connection"):
            w = with_client(w, number, load="wanted", kept=())
        if not known:
            return self.begin_anew(w, number)
        if self.wrong == "sends again with new numbers":
            book = tuple(call._replace(number=client.number + at) for at, call in enumerate(client.book, 1))
            w = with_client(w, number, book=book, number=client.number + len(book))
        if self.wrong != "a refusal counts on the next connection":
            w = with_client(w, number, again=tuple((op, NEVER, seen) for op, _, seen in client.again))
        for call in w.clients[number].book:
            lost = call.refused and self.wrong != "a refusal counts for a call that was not sent"
            if (call.sent or lost) and self.wrong != "sends a check again":
                call = call._replace(since=NEVER)
                book = tuple(call if one.number == call.number else one for one in w.clients[number].book)
                w = with_client(w, number, book=book)
            w = self.send(w, number, call)
        client = w.clients[number]
        assert client.conn is not None
        return with_client(w, number, conn=client.conn._replace(up=client.conn.up + client.late), late=())

    def begin_anew(self, w: World, number: int) -> World:
        """Take a new id. Calls that were sent end; the others were certainly not applied, and get new numbers."""
        client = w.clients[number]
        for call in client.book:
            if call.sent:
                w = self.finish(w, number, call.op, "unknown")
        kept = [call for call in client.book if not call.sent]
        kept = [call._replace(since=NEVER) if call.refused else call for call in kept]
        book = tuple(call._replace(number=at) for at, call in enumerate(kept, 1))
        again = tuple((op, NEVER, seen) for op, _, seen in client.again)
        w = with_client(
            w, number, generation=client.generation + 1, number=len(book), book=book, again=again, held=(), stamp=None
        )
        return self.end(w, number)  # it connects again under the new id

    def take(self, w: World, number: int, record: Record) -> World:
        """Apply a record to the copy."""
        client = w.clients[number]
        assert client.copy is not None
        if record.end <= len(client.copy):
            return w
        w = self.show(w, number, joined(client.copy, record))
        return with_client(w, number, table=applied(client.table, record.calls, record.end))

    def answered(self, w: World, number: int, kind: str, n: int, *rest: Any) -> World:
        call = next((call for call in w.clients[number].book if call.number == n), None)
        if call is None:
            return w
        if kind == "moved":  # it was not applied, and is kept for the next owner
            moved = tuple(one._replace(sent=False) if one == call else one for one in w.clients[number].book)
            return with_client(w, number, book=moved)
        w = with_client(w, number, book=tuple(one for one in w.clients[number].book if one != call))
        if kind == "answer":
            return self.finish_ok(w, number, call.op, *rest)
        if w.ops[call.op].kind == "claim":
            return self.finish(w, number, call.op, "refused")
        return with_client(w, number, again=(*w.clients[number].again, (call.op, *rest)))

    def end(self, w: World, number: int) -> World:
        """Notice the end of the connection. What did not arrive is lost, and so is a load under way."""
        client = w.clients[number]
        assert client.conn is not None
        w = with_client(w, number, conn=None, late=client.conn.up)
        if self.wrong != "held answers outlive their connection":
            w = with_client(w, number, held=())
        if client.load is not None and self.wrong != "a load outlives its connection":
            w = with_client(w, number, load=None, kept=())
        return w

    # Loads

    def loaded(self, w: World, number: int) -> World:
        return self.arrive(with_client(w, number, load=files(w)), number)

    def arrive(self, w: World, number: int) -> World:
        """Show what was loaded, once its revision is known to be durable."""
        client = w.clients[number]
        if not isinstance(client.load, tuple):
            return w
        history, table = client.load
        if client.heard < len(history) and self.wrong != "shows a load at once":
            return w
        if client.copy is not None and len(history) < len(client.copy):
            return with_client(w, number, load="wanted")
        w = self.show(w, number, history)
        w = with_client(w, number, table=table, load=None, kept=(), held=())
        for record in client.kept:
            w = self.take(w, number, record)
        for kind, *rest in client.held:
            w = self.answered(w, number, kind, *rest[:-1])
        return w

    # Of the owner's

    def own(self, w: World, number: int, op: int) -> World:
        """Make a call of the owner's own."""
        raise NotImplementedError
