"""Calls as messages, and an owner without sockets and without a storage: a copy, its layer and its engine."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from lab_state._state import State
from lab_state.shared._engine import Engine
from lab_state.shared._layer import OwnerLayer
from lab_state.shared._messages import (
    Answer,
    Changes,
    Delete,
    DeleteAll,
    DeleteMany,
    Incr,
    MakeChanges,
    Set,
    SetIfAbsent,
    SetMany,
    Touch,
)
from lab_state.shared._records import RecordApplier, record_of
from lab_state.shared._results import RecordCalls

A, B = "a" * 32, "b" * 32


def raw(value: object) -> Raw:
    return Raw(msgspec.json.encode(value))


def set_(n: int, key: str, value: object, ttl: int | None = None, *, ack: int = 0) -> Set:
    return Set(n, ack, key, raw(value), ttl)


def set_many(n: int, values: dict[str, Any], ttl: int | None = None) -> SetMany:
    return SetMany(n, 0, {key: raw(value) for key, value in values.items()}, ttl)


def incr(n: int, key: str, delta: float = 1, *, kind: Any = "any", default: float = 0, ttl: int | None = None) -> Incr:
    return Incr(n, 0, key, delta, default, kind, ttl)


def set_if_absent(n: int, key: str, value: object, ttl: int | None = None) -> SetIfAbsent:
    return SetIfAbsent(n, 0, key, raw(value), ttl)


def touch(n: int, key: str, ttl: int | None) -> Touch:
    return Touch(n, 0, key, ttl)


def delete(n: int, key: str) -> Delete:
    return Delete(n, 0, key)


def delete_many(n: int, *keys: str) -> DeleteMany:
    return DeleteMany(n, 0, list(keys))


def delete_all(n: int, prefix: str = "") -> DeleteAll:
    return DeleteAll(n, 0, prefix)


def change(
    n: int,
    since: int,
    keys: list[str],
    values: dict[str, Any] | None = None,
    *,
    prefixes: tuple[str, ...] = (),
    deleted: tuple[str, ...] = (),
    expires: dict[str, int] | None = None,
    clear: bool = False,
) -> MakeChanges:
    made = Changes(clear, {key: raw(value) for key, value in (values or {}).items()}, list(deleted), expires or {})
    return MakeChanges(n, 0, since, keys, list(prefixes), made)


class PureOwner:
    """An owner whose commits are steps of the test."""

    def __init__(self, values: dict[str, Any] | None = None, revision: int = 10) -> None:
        self.seconds = 1000.0
        self.copy = State(lambda: self.seconds, start=1000.0)
        self.copy.load({key: msgspec.json.decode(raw(value)) for key, value in (values or {}).items()}, revision)
        self.start()

    def start(self) -> None:
        """Become a new owner of what is durable."""
        self.layer = OwnerLayer(self.copy)
        self.engine: Engine[str] = Engine(self.layer, lambda: int(self.seconds * 1_000_000_000))
        self.calls: RecordCalls | None = None

    def begin(self) -> None:
        """Begin a commit."""
        self.taken = self.layer.untaken()
        self.layer.take(self.taken)
        self.calls = self.engine.begin(self.taken)

    def land(self) -> dict[str, list[Answer]]:
        """End the commit that was begun, and return the answers."""
        RecordApplier(self.copy).apply(record_of(self.taken, self.calls))
        self.layer.landed(self.taken)
        return self.engine.landed()

    def fail(self) -> dict[str, list[Answer]]:
        """Let the commit that was begun fail, and return the answers."""
        self.engine.put_back()
        self.layer.put_back(self.taken)
        return self.engine.failed("UnavailableError", "the disk is full")

    def commit(self) -> dict[str, list[Answer]]:
        """Make a whole commit, and return the answers."""
        self.begin()
        return self.land()
