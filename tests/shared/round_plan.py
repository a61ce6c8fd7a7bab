"""The plan of a round, from a seed. Pure."""

from __future__ import annotations

import random
from typing import Literal

import msgspec
from round_life import Bounds, Disk, Network, Trap

PROCESSES = 4

CALLS: dict[str, int] = {
    "incr": 8,
    "append": 8,
    "append_both": 4,
    "set": 4,
    "set_many": 2,
    "delete": 3,
    "delete_all": 1,
    "pop": 3,
    "add": 4,
    "get_or_set": 3,
    "claim": 3,
    "look": 3,
    "expire": 2,
    "mismatch": 1,
    "raise": 1,
    "catch_up": 2,
    "wait": 1,
}
"""How often each kind of call is made."""

OWNER_POINTS = (
    "call comes", "call applied", "record taken", "before the write", "after the write", "after the sync",
    "before it is shown", "record queued", "answers queued", "shown",
)  # fmt: skip
TAKEOVER_POINTS = ("socket bound", "loaded", "settling", "settled", "own calls", "own calls made", "others greeted")
FOLLOWER_POINTS = (
    "hello sent", "welcome comes", "welcomed", "load begins", "load read", "call sent", "record comes", "answers come",
    "connection lost",
)  # fmt: skip
END_POINTS = (
    "checkpoint begins", "snapshot written", "snapshot in place", "stop begins", "handing over", "handed over",
    "last record sent", "connections closed", "farewell comes",
)  # fmt: skip


class Fault(msgspec.Struct, frozen=True):
    """Something that the driver does to a process.

    Attributes:
        at: When, in seconds after all processes have joined.
        action: SIGKILL, SIGSTOP with a SIGCONT later, or SIGTERM, which lets the process stop cleanly.
        who: The role of the process.
        seconds: After how long a frozen process goes on.
        after_freeze: Whether `at` counts from the first moment at which a process has frozen itself.
    """

    at: float
    action: Literal["kill", "freeze", "end"]
    who: Literal["owner", "follower", "any"] = "any"
    seconds: float = 0.0
    after_freeze: bool = False


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One round.

    Attributes:
        seed: The seed of the calls.
        seconds: How long calls are made, from the moment at which all processes have joined.
        traps: The traps of each process that is started, in the order of the starts.
        faults: What the driver does.
        again: After how many seconds a process that has ended is started again; below 0: never.
        leads: Whether the first process is the owner, because the others start when it has joined.
        tasks_of_first: How many tasks of the first process make calls; 0 for as many as in the others.
        processes: How many processes run at a time.
    """

    seed: str
    seconds: float = 0.3
    tasks: int = 3
    pause: float = 0.004
    calls: dict[str, int] = msgspec.field(default_factory=lambda: CALLS)
    lists: int = 3
    owner_timeout: float = 10.0
    traps: tuple[tuple[Trap, ...], ...] = ()
    faults: tuple[Fault, ...] = ()
    network: Network = Network()
    disk: Disk = Disk()
    bounds: Bounds = Bounds()
    again: float = 0.01
    leads: bool = False
    tasks_of_first: int = 0
    processes: int = PROCESSES


def _trap(rng: random.Random, *, is_first: bool) -> Trap:
    """Return a trap that kills a process."""
    group = rng.choice((OWNER_POINTS, OWNER_POINTS, TAKEOVER_POINTS, FOLLOWER_POINTS, END_POINTS))
    if group is TAKEOVER_POINTS:
        return Trap(rng.choice(group), 1 + is_first)
    if group is END_POINTS:
        return Trap(rng.choice(group), rng.randint(1, 2))
    return Trap(rng.choice(group), rng.choice((1, 2, rng.randint(3, 20), rng.randint(10, 60))))


def planned(seed: int) -> Round:
    """Return the round of a seed. Most rounds have some of all faults."""
    rng = random.Random(f"round {seed}")

    def often(share: float) -> bool:
        return rng.random() < share

    seconds = rng.uniform(0.1, 0.3)
    hasty = often(0.15)  # calls are given up
    share = rng.choice((0.2, 0.5, 0.8, 1.0))  # of the processes with a trap
    traps: list[tuple[Trap, ...]] = []
    for turn in range(10):
        mine: list[Trap] = []
        if often(share):
            mine.append(_trap(rng, is_first=not turn))
        if often(share / 4):
            points = OWNER_POINTS + FOLLOWER_POINTS
            mine.append(Trap(rng.choice(points), rng.randint(1, 40), "freeze", rng.uniform(0.02, 0.15)))
        traps.append(tuple(mine))
    faults = [
        Fault(
            rng.uniform(0.0, seconds),
            rng.choice(("kill", "kill", "freeze", "end", "end")),
            rng.choice(("owner", "owner", "follower", "any")),
            rng.uniform(0.02, 0.7 if hasty else 0.15),
        )
        for _ in range(rng.randint(0, 6))
    ]
    network = Network()
    if often(0.5):
        network = Network(
            share=rng.choice((0.3, 0.7, 1.0)),
            cut_after=rng.choice((0.0, 0.03, 0.1)),
            delay=rng.choice((0.0, 0.002, 0.01)),
            is_split=often(0.4),
        )
    disk = Disk(delay=rng.choice((0.0, 0.0, 0.002, 0.01)), checkpoint_at=rng.choice((0, 0, 2000, 10_000)))
    if often(0.25):
        disk = msgspec.structs.replace(disk, failing=tuple(rng.sample(range(2, 40), 2)), full=(rng.randint(2, 40),))
    bounds = Bounds(
        forgotten_after=0.1 if often(0.1) else 0.0,
        kept_records=rng.choice((0, 0, 300, 3000)),
        recent_keys=rng.choice((0, 0, 0, 4)),
        many_keys=rng.choice((0, 0, 1, 2, 3)),
    )
    return Round(
        seed=f"{seed}",
        seconds=seconds,
        tasks=rng.choice((1, 2, 3, 5)),
        pause=rng.choice((0.0, 0.002, 0.006)),
        owner_timeout=0.3 if hasty else 10.0,
        traps=tuple(traps),
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
        network=network,
        disk=disk,
        bounds=bounds,
        again=rng.choice((0.0, 0.01, 0.05)),
    )
