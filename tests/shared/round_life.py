"""What one process of a round does: its calls, and the faults that it makes itself. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec

Action = Literal["kill", "freeze"]


class Trap(msgspec.Struct, frozen=True):
    """A process kills itself, or freezes with SIGSTOP, when it comes to a point of the protocol.

    Attributes:
        point: A name in `round_points.POINTS`.
        nth: Which time the process comes there, from 1.
        action: What it does.
        seconds: After how long a frozen process goes on.
    """

    point: str
    nth: int = 1
    action: Action = "kill"
    seconds: float = 0.2


class Network(msgspec.Struct, frozen=True):
    """The faults of a proxy between a follower and its owner.

    Attributes:
        share: The share of the connections that go through a proxy.
        cut_after: The mean time in seconds after which the proxy cuts the connection; 0 for never.
        is_steady: Whether this time varies little. Otherwise some connections are cut at once.
        delay: The longest delay of a piece, in seconds.
        is_split: Whether the proxy sends small pieces.
    """

    share: float = 0.0
    cut_after: float = 0.0
    is_steady: bool = False
    delay: float = 0.0
    is_split: bool = False


class Disk(msgspec.Struct, frozen=True):
    """The faults of the disk, mostly in the process that owns the state.

    Attributes:
        delay: How long each sync takes longer, in seconds. The bytes are in the file already.
        before: How much later the bytes of a record are written, in seconds.
        failing: Which syncs fail, from 1.
        full: Which writes fail as on a full disk, from 1.
        load_delay: How long a follower takes longer to read the files, at most, in seconds.
        checkpoint_at: The size of the journal at which a checkpoint is due, in bytes; 0 for the usual one.
    """

    delay: float = 0.0
    before: float = 0.0
    failing: tuple[int, ...] = ()
    full: tuple[int, ...] = ()
    load_delay: float = 0.0
    checkpoint_at: int = 0


class Bounds(msgspec.Struct, frozen=True):
    """Bounds of the protocol that are made small, so that a short round reaches them; 0 for the usual one.

    Attributes:
        forgotten_after: The seconds after which a client without a connection is forgotten.
        kept_records: The bytes of records that an owner keeps for clients that come again.
        recent_keys: The keys whose last changes an owner knows.
        many_keys: From how many keys on a change is made in steps, while the event loop runs.
    """

    forgotten_after: float = 0.0
    kept_records: int = 0
    recent_keys: int = 0
    many_keys: int = 0


class Life(msgspec.Struct, frozen=True):
    """What one process does, until it gets SIGTERM.

    Attributes:
        name: The name of the process.
        slot: A number below 8 that no other process of the round has; -1 for one that adds to no number.
        seed: The seed of its calls.
        directory: The directory of the state.
        history: The path of its history.
        tasks: How many tasks make calls. Without one, the process stops at once.
        pause: The mean pause between two calls of a task, in seconds.
        calls: How often each kind of call is made.
        lists: How many lists there are.
        owner_timeout: See `Config`.
        stop_timeout: See `Config`.
        bug: The name of a seeded bug in `round_bugs.BUGS`; empty for none.
    """

    name: str
    slot: int
    seed: str
    directory: str
    history: str
    tasks: int = 3
    pause: float = 0.004
    calls: dict[str, int] = {}
    lists: int = 3
    owner_timeout: float = 10.0
    stop_timeout: float = 8.0
    traps: tuple[Trap, ...] = ()
    network: Network = Network()
    disk: Disk = Disk()
    bounds: Bounds = Bounds()
    bug: str = ""
