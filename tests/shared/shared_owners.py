"""The steps of an owner in the model of the protocol: calls, commits, checkpoints, its end, and a takeover. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared_clients import ClientSteps, name_of, with_client
from shared_world import (
    COUNTS,
    NEVER,
    Client,
    Conn,
    Entry,
    Open,
    Owner,
    Pending,
    Record,
    Table,
    Violation,
    Waiting,
    World,
    applied,
    check_history,
    counter,
    entry_of,
    files,
    joined,
    last_change,
    taken,
)


def with_owner(w: World, **changes: Any) -> World:
    assert w.owner is not None
    return w._replace(owner=w.owner._replace(**changes))


def acknowledged(owner: Owner, client: str) -> int:
    return dict(owner.known).get(client, 0)


class Model(ClientSteps):
    """The steps of the protocol, or of a wrong reading of it."""

    def steps(self, world: World) -> Iterator[tuple[str, World]]:
        """Yield the name of each possible step, and the world after it."""
        progress = False
        for name, after in self.normal(world):
            progress = True
            yield name, self.checked(world, after)
        if not progress and any(op.status == "open" for op in world.ops):
            raise Violation("a call hangs")
        for name, after in self.faulty(world):
            yield name, self.checked(world, after)

    def checked(self, before: World, world: World) -> World:
        if (world.snapshot, world.journal, world.synced) != (before.snapshot, before.journal, before.synced):
            check_history(files(world)[0])
            old, new = files(before, synced=True)[0], files(world, synced=True)[0]
            if new[: len(old)] != old:
                raise Violation("a durable change is lost")
        if world.ops != before.ops or world.journal != before.journal:
            refused = {number for number, op in enumerate(world.ops) if op.status == "refused"}
            if refused and any(entry.op in refused for entry in files(world)[0]):
                raise Violation("a call was refused, and applied")
        return world

    def normal(self, w: World) -> Iterator[tuple[str, World]]:
        """Yield the steps that are no fault."""
        owner = w.owner
        for number, client in enumerate(w.clients):
            if client.alive:
                yield from self.of_client(w, number)
        if owner is None:
            return
        if not owner.serving:
            yield "owner settles", self.settle(w)
        elif owner.under is not None:
            yield "owner syncs", self.sync(w)
        elif len(owner.layer) > owner.durable:
            yield "owner writes", self.write(w)
        if owner.stopping and (ended := self.release(w)) is not None:
            yield "owner ends", ended

    def of_client(self, w: World, number: int) -> Iterator[tuple[str, World]]:
        """Yield the steps of one client, and of the owner with the messages of that client."""
        who, client, owner = "AB"[number], w.clients[number], w.owner
        if (made := self.make(w, number)) is not None:
            yield f"{who} calls", made
        if client.conn is not None:
            if client.conn.down:
                yield f"{who} receives {client.conn.down[0][0]}", self.receive(w, number)
            if not client.conn.open:
                yield f"{who} sees the end", self.end(w, number)
            if client.conn.up and client.conn.open:
                yield f"owner serves {who}", self.serve(w, number)
            if client.load == "wanted" and client.conn.ready:
                yield f"{who} loads", self.loaded(w, number)
            if client.again:
                yield f"{who} repeats", self.repeat(w, number, *client.again[0])
        elif owner is None:
            yield f"{who} takes the lock", self.lock(w, number)
        elif owner.who != number and owner.serving and not owner.stopping:
            yield f"{who} connects", self.connect(w, number)

    def faulty(self, w: World) -> Iterator[tuple[str, World]]:
        """Yield the faults and the rare steps that may still come."""
        owner, faults = w.owner, w.faults
        if owner is None and faults.joins:
            yield "a new process takes the lock", self.lock(spend(w, "joins"), -1)
        if owner is not None and faults.deaths:
            yield "owner dies", self.die(spend(w, "deaths"))
        if owner is not None and owner.serving:
            yield from self.of_owner(w, owner)
        if faults.minutes:
            yield "a minute passes", spend(w, "minutes")._replace(minute=w.minute + 1)
        for number, client in enumerate(w.clients):
            if client.alive and client.conn is not None and client.conn.open and faults.cuts:
                yield f"{'AB'[number]} is cut", self.cut(spend(w, "cuts"), number)
            if client.alive and client.book and faults.given_up and (owner is None or owner.who != number):
                yield f"{'AB'[number]} gives up", self.give_up(spend(w, "given_up"), number, client.book[0])

    def of_owner(self, w: World, owner: Owner) -> Iterator[tuple[str, World]]:
        if w.faults.failures and owner.under is not None:
            yield "commit fails", self.fail(spend(w, "failures"))
            yield "sync fails", self.fail(spend(w, "failures"), full=True)
        if w.faults.stops and not owner.stopping:
            yield "owner stops", with_owner(spend(w, "stops"), stopping=True)
        if w.faults.checkpoints and owner.view is None:
            yield "checkpoint begins", self.view(spend(w, "checkpoints"))
        if owner.view is not None and owner.under is None and not owner.full:
            yield "checkpoint ends", self.publish(w)
        for name, at in owner.gone:
            if w.minute > at:
                yield f"owner forgets {name}", self.forget(w, name)

    # Connections

    def connect(self, w: World, number: int) -> World:
        """Connect a client: the owner reads its hello, and answers with the welcome and the records that it lacks."""
        owner, client = w.owner, w.clients[number]
        assert owner is not None
        name = name_of(number, client.generation)
        fresh = client.stamp is None or w.minute == client.stamp
        known = name in dict(owner.known) or fresh or self.wrong == "admits a forgotten client"
        if not known:  # the owner tells it so, and closes the connection
            return with_client(w, number, conn=Conn(down=(("welcome", False, owner.durable, False, w.minute),)))
        w = with_owner(
            w,
            known=tuple(sorted({name: 0, **dict(owner.known)}.items())),
            gone=tuple(pair for pair in owner.gone if pair[0] != name),
        )
        have = -1 if client.copy is None else len(client.copy)
        tail = tuple(record for record in owner.records if record.end > have)
        load = have < 0 or (tail[0].start > have if tail else have < owner.durable)
        if not load and w.faults.loads:  # the records were dropped: both happen
            w = spend(w, "loads")
            load = True
        down: tuple[tuple[Any, ...], ...] = (("welcome", True, owner.durable, load, w.minute),)
        if not load:
            down += tuple(("record", record, w.minute) for record in tail)
        return with_client(w, number, conn=Conn(down=down))

    def cut(self, w: World, number: int) -> World:
        """End a connection. The calls in it that were not served are lost."""
        owner, client = w.owner, w.clients[number]
        assert client.conn is not None
        up = client.conn.up if self.wrong == "serves a connection that ended" else ()
        w = with_client(w, number, conn=client.conn._replace(open=False, up=up))
        if owner is not None and owner.serving:
            name = name_of(number, client.generation)
            if self.wrong != "answers go to a later connection":
                w = with_owner(
                    w, waiting=tuple(one for one in owner.waiting if one.client != number or one.number == 0)
                )
            w = with_owner(w, gone=tuple(sorted({**dict(owner.gone), name: w.minute}.items())))
        return w

    def tell(self, w: World, number: int, *message: Any) -> World:
        """Put a message into the queue of a client."""
        client = w.clients[number]
        if client.conn is None or not client.conn.open:
            return w
        down = (*client.conn.down, (*message, w.minute))
        return with_client(w, number, conn=client.conn._replace(down=down))

    # Calls

    def serve(self, w: World, number: int) -> World:
        """Read one call, and apply it or look its result up."""
        owner, client = w.owner, w.clients[number]
        assert owner is not None
        assert client.conn is not None
        _, n, ack, op, since, seen = client.conn.up[0]
        w = with_client(w, number, conn=client.conn._replace(up=client.conn.up[1:]))
        name = name_of(number, client.generation)
        known = {**dict(owner.known), name: max(ack, acknowledged(owner, name))}
        w = with_owner(w, known=tuple(sorted(known.items())))
        for pending in (*owner.pending, *owner.writing):
            if (pending.client, pending.number) == (name, n) and self.wrong != "a repeat misses what is not durable":
                return self.wait(w, Waiting(number, n, op, pending.result, pending.at, changed=True))
        for at, result, revision in (entry_of(owner.table, name) or (0, ()))[1]:
            if at == n:
                return self.tell(w, number, "answer", n, result, revision, True)
        if owner.stopping:
            return self.tell(w, number, "moved", n)
        done, result, revision = self.execute(w, op, since, seen)
        if done is None:
            return self.tell(w, number, "no", n, len(owner.layer), result)
        changed = done != w
        w = done
        if changed and self.wrong != "a record has no results":
            assert w.owner is not None
            w = with_owner(w, pending=(*w.owner.pending, Pending(name, n, result, revision)))
        return self.wait(w, Waiting(number, n, op, result, revision, changed))

    def execute(self, w: World, op: int, since: int, seen: int) -> tuple[World | None, int, int]:
        """Apply a call to the layer. Return the world, the result and the revision; no world if it is refused."""
        owner, kind = w.owner, w.ops[op].kind
        assert owner is not None
        layer = owner.layer
        if kind in ("update", "claim"):
            last = layer[: owner.durable] if self.wrong == "a check misses what is not durable" else layer
            at = last_change(last, kind, owner.base)
            if self.wrong == "a check misses what was not there" and not seen:
                at = 0
            if since < owner.floor or at > since:
                return None, counter(layer), len(layer)
        if kind in COUNTS:
            result = (seen if kind == "update" else counter(layer)) + 1
        elif kind == "claim":
            result = 1 - seen
        else:
            result = int(not taken(layer))
        if result:
            w = with_owner(w, layer=(*layer, Entry(op, kind, result)))
            return w, result, len(layer) + 1
        return w, result, owner.durable if self.wrong == "an unchanged call has the durable revision" else len(layer)

    def own(self, w: World, number: int, op: int) -> World:
        """Make a call of the owner's own, on the layer. Its result is in no record."""
        owner = w.owner
        assert owner is not None
        kind, layer = w.ops[op].kind, owner.layer
        seen = counter(layer) if kind in COUNTS else int(taken(layer))
        done, result, revision = self.execute(w, op, len(layer), seen)
        assert done is not None
        return self.wait(done, Waiting(number, 0, op, result, revision, done != w))

    def wait(self, w: World, waiting: Waiting) -> World:
        """Let an answer wait for its revision to be durable. It may be so already."""
        assert w.owner is not None
        if self.wrong == "an unchanged call is answered at once" and not waiting.changed:
            return self.answer(w, waiting, waiting.at)
        return self.answers(with_owner(w, waiting=(*w.owner.waiting, waiting)), w.owner.durable)

    def answers(self, w: World, revision: int) -> World:
        """Answer the calls that are durable. A changed one gets `revision`: the end of its record."""
        owner = w.owner
        assert owner is not None
        ready = [one for one in owner.waiting if one.at <= owner.durable]
        w = with_owner(w, waiting=tuple(one for one in owner.waiting if one.at > owner.durable))
        for one in ready:
            w = self.answer(w, one, revision if one.changed else one.at)
        return w

    def answer(self, w: World, one: Waiting, revision: int) -> World:
        if one.number == 0:
            return self.finish_ok(w, one.client, one.op, one.result, revision, one.changed)
        return self.tell(w, one.client, "answer", one.number, one.result, revision, one.changed)

    # Commits

    def write(self, w: World) -> World:
        """Write a record with all changes of the layer, and with the results of the calls."""
        owner = w.owner
        assert owner is not None
        calls: dict[str, tuple[int, dict[int, int] | None]] = {}
        for one in owner.pending:
            ack, results = acknowledged(owner, one.client), calls.get(one.client, (0, {}))[1]
            if one.number == 0 or results is None:
                calls[one.client] = 0, None
            else:
                calls[one.client] = ack, {**results, one.number: one.result}
        member = tuple(
            (name, ack, None if results is None else tuple(sorted((n, r) for n, r in results.items() if n > ack)))
            for name, (ack, results) in sorted(calls.items())
        )
        record = Record(owner.durable, owner.layer[owner.durable :], member)
        w = with_owner(w, under=record, writing=owner.pending, pending=())
        if not owner.full:
            w = w._replace(journal=(*w.journal, record))
        if self.wrong == "feeds before the sync":
            w = self.feed(w, record)
        if self.wrong == "answers before the sync":
            w = self.answers(with_owner(w, durable=record.end), record.end)
        return w

    def sync(self, w: World) -> World:
        """Note that a record is durable: feed it, apply it to the own copy, and answer, all in one step."""
        owner = w.owner
        assert owner is not None
        assert owner.under is not None
        record = owner.under
        table = applied(owner.table, record.calls, record.end)
        if owner.full:  # a new journal with the whole state takes the place of the old one
            history = owner.layer[: None if self.wrong == "a full frame has newer changes" else record.end]
            results = owner.table if self.wrong == "a full frame lacks its own results" else table
            w = with_owner(w._replace(snapshot=(history, results), journal=()), full=False, view=None)
        w = w._replace(synced=len(w.journal))
        w = with_owner(w, under=None, writing=(), durable=record.end, table=table, records=(*owner.records, record))
        if owner.who >= 0:
            w = self.take(w, owner.who, record)
        if self.wrong == "answers before the record":
            return self.feed(self.answers(w, record.end), record)
        if self.wrong != "feeds before the sync":
            w = self.feed(w, record)
        w = self.answers(w, record.end)
        if self.wrong == "the owner reads its layer" and owner.who >= 0:
            w = self.show(w, owner.who, owner.layer)
        return w

    def feed(self, w: World, record: Record) -> World:
        for number in range(len(w.clients)):
            w = self.tell(w, number, "record", record)
        return w

    def fail(self, w: World, *, full: bool = False) -> World:
        """Let a commit fail. The changes stay in the layer, and the results with them.

        A write that fails is undone. After a sync that fails (`full`), what was written stays in the journal, which is
        not written again.
        """
        owner = w.owner
        assert owner is not None
        pending = owner.pending if self.wrong == "a failed commit drops its results" else owner.writing + owner.pending
        if not owner.full and not full:
            w = w._replace(journal=w.journal[:-1])
        return with_owner(w, under=None, writing=(), pending=pending, full=full or owner.full)

    # Checkpoints

    def view(self, w: World) -> World:
        """Take the durable state for a snapshot, with the table of its revision."""
        owner = w.owner
        assert owner is not None
        return with_owner(w, view=(owner.layer[: owner.durable], owner.table))

    def publish(self, w: World) -> World:
        """Put the snapshot in place, and a journal with the records after it."""
        owner = w.owner
        assert owner is not None
        assert owner.view is not None
        history, table = owner.view
        if self.wrong == "a snapshot has no results":
            table = ()
        if self.wrong == "a snapshot has results that are not durable":
            for one in owner.pending:
                if one.number:
                    ack = acknowledged(owner, one.client)
                    table = applied(table, ((one.client, ack, ((one.number, one.result),)),), one.at)
        left = tuple(record for record in w.journal if record.end > len(history))
        return with_owner(w._replace(snapshot=(history, table), journal=left, synced=len(left)), view=None)

    def forget(self, w: World, name: str) -> World:
        """Forget a client that had no connection for a minute."""
        owner = w.owner
        assert owner is not None
        left = tuple(one for one in owner.pending if one.client != name)
        has_results = entry_of(owner.table, name) is not None or any(one.client == name for one in owner.writing)
        if has_results:
            left = (*left, Pending(name, 0, 0, 0))
        return with_owner(
            w,
            known=tuple(pair for pair in owner.known if pair[0] != name),
            gone=tuple(pair for pair in owner.gone if pair[0] != name),
            pending=left,
        )

    # The end

    def die(self, w: World) -> World:
        """Kill the owner. What was written stays in the files, also where it was not synced."""
        owner = w.owner
        assert owner is not None
        w = w._replace(owner=None)
        for number, client in enumerate(w.clients):
            if client.conn is not None and client.conn.open:
                w = self.cut(w, number)
                w = with_client(w, number, conn=w.clients[number].conn._replace(up=()))  # type: ignore[union-attr]
        if owner.who >= 0:
            w = with_client(w, owner.who, alive=False, book=(), again=())
            for op, one in enumerate(w.ops):
                if one.client == owner.who and one.status in ("open", "later"):
                    w = self.finish(w, owner.who, op, "died")
        return w

    def release(self, w: World) -> World | None:
        """End the owner as planned, once all that it applied is durable."""
        owner = w.owner
        assert owner is not None
        if self.wrong == "moves a call that it applied" and owner.under is None and owner.waiting:
            for one in owner.waiting:
                if one.number:
                    w = self.tell(w, one.client, "moved", one.number)
            return with_owner(w, waiting=tuple(one for one in owner.waiting if not one.number), pending=())
        mine = any(op.client == owner.who and op.status == "open" for op in w.ops)
        if owner.under is not None or owner.waiting or mine or len(owner.layer) > owner.durable:
            return None
        return self.die(w)

    # Takeover

    def lock(self, w: World, number: int) -> World:
        """Take the lock of an owner that ended, and replay what follows the own copy."""
        client = w.clients[number] if number >= 0 else Client()
        history, table = files(w)
        if client.copy is not None and history[: len(client.copy)] != client.copy:
            raise Violation("the files have less than a copy")
        records = w.journal
        if client.copy is not None and (records[0].start if records else len(history)) <= len(client.copy):
            table = client.table
            for record in records:
                if record.end > len(client.copy) and self.wrong != "a new owner skips the results of the tail":
                    table = applied(table, record.calls, record.end)
        floor = 0 if self.wrong == "a new owner checks from 0" else len(history)
        if self.wrong == "a new owner keeps to its copy" and client.copy is not None:
            history, table, records = client.copy, client.table, tuple(r for r in records if r.end <= len(client.copy))
            w = w._replace(journal=records, synced=min(w.synced, len(records)))
        known = tuple(sorted((name, ack) for name, ack, _ in table))
        gone = tuple((name, w.minute) for name, _ in known if name != name_of(number, client.generation))
        owner = Owner(
            number, history, len(history), table, floor, len(history), known=known, gone=gone, records=records
        )
        w = w._replace(owner=owner)
        return self.admit(w) if self.wrong == "admits before it has settled" else w

    def settle(self, w: World) -> World:
        """Make what was found durable, then show it and let others in."""
        return self.admit(w._replace(synced=len(w.journal)))

    def admit(self, w: World) -> World:
        owner = w.owner
        assert owner is not None
        number = owner.who
        w = with_owner(w, serving=True)
        if number < 0:
            return w
        client = w.clients[number]
        w = self.show(w, number, joined(client.copy or (), Record(0, owner.layer, ())))
        w = with_client(w, number, table=owner.table, load=None, kept=(), held=(), book=(), again=())
        name = name_of(number, client.generation)
        lost = name not in dict(owner.known) and client.stamp is not None and w.minute > client.stamp
        for call in client.book:
            w = self.settle_own(w, number, call, owner.table, name, lost=lost)
        for op, since, seen in client.again:
            w = self.settle_own(w, number, Open(0, op, since, seen), owner.table, name, lost=lost)
        return w

    def settle_own(self, w: World, number: int, call: Open, table: Table, name: str, *, lost: bool) -> World:
        """Look up one of the new owner's own open calls, and apply it if it was not applied."""
        if w.ops[call.op].status != "open":
            return w
        if lost and call.sent and self.wrong != "a new owner was not forgotten":
            return self.finish(w, number, call.op, "unknown")
        found = {n: (result, revision) for n, result, revision in (entry_of(table, name) or (0, ()))[1]}
        if call.number in found and self.wrong != "a new owner does not look up its own calls":
            return self.finish_ok(w, number, call.op, *found[call.number], True)
        if w.ops[call.op].kind != "claim":
            return self.own(w, number, call.op)
        since = call.since if self.wrong == "sends a check again" or not call.sent else NEVER
        done, result, revision = self.execute(w, call.op, since, call.seen)
        if done is None:
            return self.finish(w, number, call.op, "refused")
        return self.wait(done, Waiting(number, 0, call.op, result, revision, done != w))


def spend(w: World, fault: str) -> World:
    return w._replace(faults=w.faults._replace(**{fault: getattr(w.faults, fault) - 1}))
