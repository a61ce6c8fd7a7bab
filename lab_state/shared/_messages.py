"""The messages between the owner of a shared state and its clients. This module does no I/O.

`docs/design/shared.md` lists them all. `_wire.py` encodes and decodes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Raw

from lab_state._periods import LONGEST_TTL

PROTOCOL = 1
"""The version of the protocol."""

Number: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Since: TypeAlias = Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]
Ttl: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=LONGEST_TTL * 1000)] | None


# The first messages of a connection. Their members `lab_state` and `protocol` are the same in all versions.


class AnyVersion(msgspec.Struct, frozen=True):
    """The members that a first message has in each version."""

    lab_state: Literal["shared"]
    protocol: int


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The first message of a client.

    Attributes:
        name: The name of the state.
        client: The id of the client.
        revision: The revision of the client's copy; `None` if it has none.
        heard: The time in the last message that the client got from an owner, in nanoseconds; `None` before the first message.
        checks: Whether the client checks its values against the types of its own schema. Otherwise the owner checks them.
    """

    lab_state: Literal["shared"] = "shared"
    protocol: int = PROTOCOL
    name: str
    client: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    revision: Count | None
    heard: Count | None
    checks: bool = True


class Starting(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The answer to a hello while the owner loads the state. The client waits."""

    lab_state: Literal["shared"] = "shared"
    protocol: int = PROTOCOL
    host: str
    pid: Number


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The answer to a hello, by an owner that has loaded the state. It admits the client if `known` is True.

    Attributes:
        host: The name of the owner's machine.
        pid: The process id of the owner.
        known: Whether the client may send its open calls again. It is False if the owner may have forgotten the client.
        epoch: The time of the state, in seconds, when `CLOCK_MONOTONIC` is 0.
        revision: The durable revision.
        load: Whether the client must read the files.
        schema: The version of the schema of the state.
        readable_by: The oldest version of the schema whose code can read the state.
    """

    lab_state: Literal["shared"] = "shared"
    protocol: int = PROTOCOL
    host: str
    pid: Number
    known: bool
    epoch: float
    revision: Count
    load: bool
    schema: Number = 1
    readable_by: Number = 1


class No(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The answer to a hello if the owner does not admit the client."""

    lab_state: Literal["shared"] = "shared"
    protocol: int = PROTOCOL
    reason: Literal["protocol", "name", "hello"]
    detail: str


# Calls


class _Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A call with its number, and the acknowledgement of the client."""

    n: Number
    ack: Count


class Set(_Call, frozen=True, tag="set"):
    """The call that stores a value."""

    key: str
    value: Raw
    ttl: Ttl


class SetMany(_Call, frozen=True, tag="set_many"):
    """The call that stores several values."""

    values: dict[str, Raw]
    ttl: Ttl


class Delete(_Call, frozen=True, tag="delete"):
    """The call that deletes a key."""

    key: str


class DeleteMany(_Call, frozen=True, tag="delete_many"):
    """The call that deletes several keys."""

    keys: list[str]


class DeleteAll(_Call, frozen=True, tag="delete_all"):
    """The call that deletes all keys under a prefix."""

    prefix: str


class Incr(_Call, frozen=True, tag="incr"):
    """The call that adds to a number."""

    key: str
    delta: int | float
    default: int | float
    kind: Literal["any", "int", "float"]
    ttl: Ttl


class SetIfAbsent(_Call, frozen=True, tag="set_if_absent"):
    """The call that stores a value if the key is missing."""

    key: str
    value: Raw
    ttl: Ttl


class Touch(_Call, frozen=True, tag="touch"):
    """The call that gives a key another time to live."""

    key: str
    ttl: Ttl


class Changes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Changes that a client has computed, in the form of a record. `expires` has the expiry of each key that expires, in milliseconds since 1970."""

    clear: bool = False
    set: dict[str, Raw] = {}
    delete: list[str] = []
    expires: dict[str, Count] = {}


class MakeChanges(_Call, frozen=True, tag="change"):
    """The call that makes changes if its check holds. The check consists of `since`, and of the keys and prefixes that were read."""

    since: Since
    keys: list[str]
    prefixes: list[str]
    changes: Changes


Call: TypeAlias = Set | SetMany | Delete | DeleteMany | DeleteAll | Incr | SetIfAbsent | Touch | MakeChanges


# Answers


class _Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """An answer with the number of the call."""

    n: Number


class Ok(_Answer, frozen=True, tag="ok"):
    """The answer to a call that was executed. The call may have changed nothing."""

    revision: Count
    result: Raw


class Raised(_Answer, frozen=True, tag="raised"):
    """The answer to a call that raised an error because of the stored value or the new value. The call changed nothing."""

    revision: Count
    error: Literal["TypeMismatchError", "InvalidValueError"]
    message: str
    path: str


class Refused(_Answer, frozen=True, tag="refused"):
    """The answer to a call whose check does not hold. The call changed nothing.

    `values` has the present value and expiry of each key of the check, without missing keys. It is
    `None` if the check has more than 16 keys, or if the values have more than 1 MiB.
    """

    revision: Count
    values: dict[str, tuple[Raw, Count | None]] | None


class Moved(_Answer, frozen=True, tag="moved"):
    """The answer to a call that was not executed. The client sends the call to the next owner."""


class Failed(_Answer, frozen=True, tag="failed"):
    """The answer to a call that made a change, or has read one, whose commit failed. The change may still become durable."""

    error: str
    message: str


Answer: TypeAlias = Ok | Raised | Refused | Moved | Failed


# Other messages


class Life(NamedTuple):
    """A sign of life. The number is the acknowledgement of a client, or the durable revision of the owner."""

    number: int


class Question(NamedTuple):
    """A question for the durable revision."""

    token: int


class Expiries(NamedTuple):
    """A message that says whether a client has a watch.

    If any client has a watch, the owner deletes keys when they are due, and not only once a second.
    """

    are_watched: bool


class Bye(NamedTuple):
    """The last message of a client, with its acknowledgement. The owner confirms it with a `Bye(0)`, whose number is not sent."""

    number: int


class Reply(NamedTuple):
    """The answer to a question."""

    token: int
    revision: int


class RecordMessage(NamedTuple):
    """A record, as it is in the journal."""

    record: memoryview


class Answers(NamedTuple):
    """Answers to several calls. They are sent together."""

    answers: Sequence[Answer]


FromClient: TypeAlias = Hello | Call | Life | Question | Expiries | Bye
FromOwner: TypeAlias = Starting | Welcome | No | RecordMessage | Answers | Life | Reply | Bye
