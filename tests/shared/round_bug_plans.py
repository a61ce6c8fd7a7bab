"""The plans of rounds that are made for seeded bugs. Pure. Each function returns a round for a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
from round_life import Bounds, Disk, Network, Trap
from round_plan import Fault, Round

LISTS: dict[str, int] = {"append": 6, "append_both": 2, "incr": 2}
KEYS: dict[str, int] = {"claim": 4, "get_or_set": 3, "add": 4, "delete": 4, "pop": 3, "delete_all": 1, "set": 2}


def quiet(rng: random.Random, seed: str) -> Round:
    """Return a round without faults, in which commits are slow."""
    return Round(seed=seed, seconds=0.3, pause=0.001, tasks=4, disk=Disk(delay=0.003))


def hurried(rng: random.Random, seed: str) -> Round:
    """Return a round without faults and with short lists, in which many calls change the same keys."""
    return Round(seed=seed, seconds=0.3, pause=0.001, tasks=4, calls=KEYS, disk=Disk(delay=0.003))


def late(rng: random.Random, seed: str) -> Round:
    """Return a round in which records come late."""
    calls = {**LISTS, "catch_up": 6}
    return Round(seed=seed, seconds=0.4, pause=0.002, calls=calls, network=Network(share=1.0, delay=0.02))


def relayed(rng: random.Random, seed: str) -> Round:
    """Return a round in which an owner dies, the next one dies when it has settled the state, and a third one goes on."""
    settled = (Trap("own calls"),)
    traps = ((Trap("after the sync", rng.randint(25, 50)),), settled, settled, ())
    return Round(
        seed=seed,
        seconds=0.9,
        pause=0.003,
        tasks=4,
        calls=LISTS,
        traps=traps,
        leads=True,
        again=-1.0,
        disk=Disk(delay=0.002),
    )


def relayed_whole(rng: random.Random, seed: str) -> Round:
    """Return a round as `relayed` does. The journal is often so long that the next owner writes the whole state, and no copies of records."""
    return msgspec.structs.replace(relayed(rng, seed), disk=Disk(delay=0.002, checkpoint_at=400))


def all_stop(rng: random.Random, seed: str) -> Round:
    """Return a round in which all processes stop at once, and the owner is frozen before it hands the state over."""
    traps = ((Trap("handing over", 1, "freeze", 0.1),), (), (), ())
    return Round(seed=seed, seconds=0.1, traps=traps, leads=True, disk=Disk(delay=0.01))


def killed(*points: str, least: int = 3, most: int = 14, **more: Any) -> Callable[[random.Random, str], Round]:
    """Return rounds in which each owner dies at one of these points."""

    def plan(rng: random.Random, seed: str) -> Round:
        traps = tuple((Trap(rng.choice(points), rng.randint(least, most)),) for _ in range(16))
        one = Round(seed=seed, seconds=0.5, pause=0.0, tasks=4, traps=traps, calls=LISTS, again=0.005)
        return msgspec.structs.replace(one, **more)

    return plan


def cut(**more: Any) -> Callable[[random.Random, str], Round]:
    """Return rounds in which each connection is cut soon, while commits are slow."""

    def plan(rng: random.Random, seed: str) -> Round:
        one = Round(
            seed=seed,
            seconds=0.4,
            pause=0.0,
            tasks=4,
            calls=LISTS,
            network=Network(share=1.0, cut_after=0.03),
            disk=Disk(delay=0.01),
        )
        return msgspec.structs.replace(one, **more)

    return plan


def fails(*, every: int, **more: Any) -> Callable[[random.Random, str], Round]:
    """Return rounds in which many syncs fail."""
    return cut(disk=Disk(delay=0.005, failing=tuple(range(2, 200, every))), **more)


def ended(rng: random.Random, seed: str) -> Round:
    """Return a round in which each owner stops as planned, one after the other."""
    faults = tuple(Fault(0.05 + 0.08 * number, "end", "owner") for number in range(6))
    return Round(
        seed=seed, seconds=0.6, pause=0.0, tasks=4, calls=LISTS, faults=faults, disk=Disk(delay=0.01), again=0.0
    )


def away(rng: random.Random, seed: str) -> Round:
    """Return a round in which a follower is frozen after a cut, for longer than an owner remembers it."""
    return Round(
        seed=seed,
        seconds=0.9,
        pause=0.0,
        tasks=4,
        calls=LISTS,
        traps=((), *(((Trap("connection lost", 1, "freeze", 0.45),),) * 3)),
        network=Network(share=1.0, cut_after=0.1, is_steady=True),
        disk=Disk(delay=0.01),
        bounds=Bounds(forgotten_after=0.12),
        leads=True,
    )


def takes_over_after_all(rng: random.Random, seed: str) -> Round:
    """Return a round in which a follower is frozen after a cut, is forgotten, and takes over from an owner that dies."""
    return Round(
        seed=seed,
        seconds=1.0,
        pause=0.0,
        tasks=4,
        calls=LISTS,
        traps=((), (Trap("connection lost", 1, "freeze", 0.45),)),
        faults=(Fault(0.3, "kill", "owner", after_freeze=True),),
        network=Network(share=1.0, cut_after=0.1, is_steady=True),
        disk=Disk(delay=0.01),
        bounds=Bounds(forgotten_after=0.12),
        leads=True,
        again=-1.0,
        processes=2,
    )


def forgotten_meanwhile(rng: random.Random, seed: str) -> Round:
    """Return a round in which a client is forgotten while a slow commit has its calls, and goes on under another id."""
    return Round(
        seed=seed,
        seconds=0.9,
        pause=0.0,
        tasks=8,
        calls=LISTS,
        traps=((), *(((Trap("connection lost", 1, "freeze", 0.12),),) * 3)),
        network=Network(share=1.0, cut_after=0.1, is_steady=True),
        disk=Disk(delay=0.35),
        bounds=Bounds(forgotten_after=0.06),
        leads=True,
    )
