"""The messages between the owner of a shared state and its followers. Pure.

`docs/design/shared.md` lists them all. `_wire.py` encodes and decodes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Raw

from lab_state._arguments import LONGEST_TTL

PROTOCOL = 1

Number: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Since: TypeAlias = Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]
Ttl: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=LONGEST_TTL * 1000)] | None


# The first messages. `lab_state` and `protocol` stay as they are in all versions.


class AnyVersion(msgspec.Struct, frozen=True):
    """The members that a first message has in each version."""

    lab_state: Literal["shared"]
    protocol: int


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The first message of a client.

    Attributes:
        name: The name of the state.
        client: The id of the client.
        revision: The revision of its copy; `None` without one.
        heard: The last time that an owner told it, in nanoseconds; `None` if there is none.
    """

    lab_state: Literal["shared"] = "shared"
    protocol: int = PROTOCOL
    name: str
    client: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    revision: Count | None
    heard: Count | None


class Starting(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The answer to a hello while the owner loads: wait."""

    lab_state: Literal["shared"] = "shared"
    protocol: int = PROTOCOL
    host: str
    pid: Number


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The answer to a hello that admits the client.

    Attributes:
        host: The machine of the owner.
        pid: The process of the owner.
        known: Whether the client may send its open calls again.
        epoch: The time of the state, in seconds, when `CLOCK_MONOTONIC` is 0.
        revision: The durable revision.
        load: Whether the client must read the files.
    """

    lab_state: Literal["shared"] = "shared"
    protocol: int = PROTOCOL
    host: str
    pid: Number
    known: bool
    epoch: float
    revision: Count
    load: bool


class No(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The answer to a hello that does not admit the client."""

    lab_state: Literal["shared"] = "shared"
    protocol: int = PROTOCOL
    reason: Literal["protocol", "name", "hello"]
    detail: str


# Calls


class _Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    n: Number
    ack: Count


class Set(_Call, frozen=True, tag="set"):
    """Store a value."""

    key: str
    value: Raw
    ttl: Ttl


class SetMany(_Call, frozen=True, tag="set_many"):
    """Store several values."""

    values: dict[str, Raw]
    ttl: Ttl


class Delete(_Call, frozen=True, tag="delete"):
    """Delete a key."""

    key: str


class DeleteMany(_Call, frozen=True, tag="delete_many"):
    """Delete several keys."""

    keys: list[str]


class DeleteAll(_Call, frozen=True, tag="delete_all"):
    """Delete all keys under a prefix."""

    prefix: str


class Incr(_Call, frozen=True, tag="incr"):
    """Add to a number."""

    key: str
    delta: int | float
    default: int | float
    kind: Literal["any", "int", "float"]
    ttl: Ttl


class SetIfAbsent(_Call, frozen=True, tag="set_if_absent"):
    """Store a value if the key is missing."""

    key: str
    value: Raw
    ttl: Ttl


class Touch(_Call, frozen=True, tag="touch"):
    """Give a key another time to live."""

    key: str
    ttl: Ttl


class Changes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Changes that a client has computed, as in a record. `expires` has times of the state, in milliseconds."""

    clear: bool = False
    set: dict[str, Raw] = {}
    delete: list[str] = []
    expires: dict[str, Count] = {}


class MakeChanges(_Call, frozen=True, tag="change"):
    """Make changes if their check holds: `since`, the keys and the prefixes that were read."""

    since: Since
    keys: list[str]
    prefixes: list[str]
    changes: Changes


Call: TypeAlias = Set | SetMany | Delete | DeleteMany | DeleteAll | Incr | SetIfAbsent | Touch | MakeChanges


# Answers


class _Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    n: Number


class Ok(_Answer, frozen=True, tag="ok"):
    """The call was applied, or changed nothing."""

    revision: Count
    result: Raw


class Raised(_Answer, frozen=True, tag="raised"):
    """The call raised because of what is stored, and changed nothing."""

    revision: Count
    error: Literal["TypeMismatchError", "InvalidValueError"]
    message: str
    path: str


class Refused(_Answer, frozen=True, tag="refused"):
    """The check does not hold. `values` has the current values of its keys with their expiry; `None` if they are many."""

    revision: Count
    values: dict[str, tuple[Raw, Count | None]] | None


class Moved(_Answer, frozen=True, tag="moved"):
    """The call was not applied: it is for the next owner."""


class Failed(_Answer, frozen=True, tag="failed"):
    """The commit failed. The change may still become durable."""

    error: str
    message: str


Answer: TypeAlias = Ok | Raised | Refused | Moved | Failed


# Other messages


class Life(NamedTuple):
    """A sign of life: of a client with its acknowledgement, of an owner with the durable revision."""

    number: int


class Question(NamedTuple):
    """A question for the durable revision."""

    token: int


class Bye(NamedTuple):
    """The farewell of a client, with its acknowledgement; or its confirmation, with 0."""

    number: int


class Reply(NamedTuple):
    """The answer to a question."""

    token: int
    revision: int


class RecordMessage(NamedTuple):
    """A record, as the journal has it."""

    record: memoryview


class Answers(NamedTuple):
    """The answers to calls that were settled together."""

    answers: Sequence[Answer]


FromClient: TypeAlias = Hello | Call | Life | Question | Bye
FromOwner: TypeAlias = Starting | Welcome | No | RecordMessage | Answers | Life | Reply | Bye
