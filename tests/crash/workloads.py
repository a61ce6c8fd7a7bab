"""What an application does while its disk is recorded: the same, for the same seed, each time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

import pytest
from recorder import DIRECTORY, NAME
from world import World

from lab_state.storage import _file_writer

Workload = Callable[[World], Awaitable[None]]


async def one_writer(world: World) -> None:
    """Make each kind of change, each flushed on its own; then some in one flush."""
    await world.start()
    for number in range(4):
        await world.set(f"key-{number}")
        await world.flush()
    await world.set_many("key-1", "key-2", "more")
    await world.flush()
    await world.delete("key-3")
    await world.flush()
    await world.delete_all()
    await world.set("again")
    await world.flush()
    await world.set("again")
    await world.delete("again")
    await world.set("never-flushed")
    await world.crash()


async def hundred_writers(world: World) -> None:
    """Let each writer wait until its change is durable; they share the writes."""
    await world.start(write_through=True)
    for turn in range(3):
        await asyncio.gather(*(world.set(f"{number}", f"{turn} {number}") for number in range(100)))
    await asyncio.gather(*(world.delete(f"{number}") for number in range(0, 100, 7)))
    await world.crash()


async def transactions(world: World) -> None:
    """Make several changes as one, whole or not at all."""
    await world.start()
    await world.transaction({f"key-{number}": world.value() for number in range(6)})
    await world.flush()
    await world.transaction({"key-0": world.value(), "key-9": world.value()}, gone=("key-1", "key-2"))
    await world.transaction({"key-0": "never"}, give_up=True)
    await world.set_many("key-3", "key-4", "key-5")
    await world.flush()
    await world.transaction({}, gone=("key-3", "key-4"))
    await world.flush()
    await world.transaction({f"key-{number}": world.value() for number in range(12)}, gone=("key-9",))
    await world.crash()


async def expiring(world: World) -> None:
    """Set keys that expire, sweep them, and restart while more of them are due."""
    await world.start()
    for number in range(6):
        await world.set(f"key-{number}", ttl=1 + number)
    await world.flush()
    world.pass_time(3)
    await world.set("key-0", ttl=100)
    await world.flush()
    await world.set("key-5")
    world.pass_time(2)
    await world.flush()
    await world.checkpoint()
    await world.set("key-6", ttl=2)
    await world.flush()
    await world.crash()
    world.clock.advance(5)
    await world.start()
    await world.set("key-7", ttl=2)
    await world.flush()
    world.pass_time(4)
    await world.stop()


async def checkpoints_beside_commits(world: World) -> None:
    """Hold a checkpoint at each of its steps while commits go on."""
    await world.start()
    for number, step in enumerate([("open", ".json."), ("write", ".json."), ("sync", ".json."), ("rename", ".json.")]):
        await world.set("before")
        await world.flush()
        await world.set("unflushed")
        async with world.held_up(world.checkpoint(), *step):
            if step[0] == "rename":  # the commits wait for it
                await world.set(f"beside-{number}")
                continue
            await world.set(f"beside-{number}")
            await world.flush()
            await world.set_many("beside", "unflushed")
            await world.flush()
        await world.flush()
    await world.checkpoint()
    await world.set("behind")
    await world.flush()
    await world.crash()


async def journals_written_beside_commits(world: World) -> None:
    """Write the next journal of a checkpoint while commits go on, some of them meanwhile, some at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_file_writer, "_LEFT_TO_PUBLISH", 0)
        await world.start()
        await world.set("before")
        await world.flush()
        for number, step in enumerate([("sync", ".json."), ("sync", ".journal."), ("rename", ".json.")]):
            async with world.held_up(world.checkpoint(), *step):
                await world.set(f"beside-{number}")
                if step[0] == "sync":  # else the commits wait for it
                    await world.flush()
                    await world.set_many("beside", "before")
                    await world.flush()
            await world.flush()
        await world.crash()


async def checkpoints_that_are_due(world: World) -> None:
    """Let the journal outgrow the snapshot again and again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_file_writer, "_MIN_CHECKPOINT_BYTES", 400)
        await world.start()
        for number in range(10):
            await world.set(f"key-{number % 4}")
            await world.flush()
        await world.crash()


async def clean_stops(world: World) -> None:
    """Stop and start again, three times; once with nothing to do."""
    for number in range(3):
        await world.start()
        await world.set("key")
        await world.set(f"key-{number}")
        await world.flush()
        if number:
            await world.set("last")
        await world.stop()
    await world.start()
    await world.stop()


async def unclean_ends(world: World) -> None:
    """Kill and start again: after a commit, before one, and beside a snapshot."""
    await world.start()
    await world.set("key-0")
    await world.flush()
    await world.set("lost")
    await world.crash()
    await world.start()
    await world.crash()
    await world.start()
    await world.set("key-1")
    await world.flush()
    await world.checkpoint()
    await world.set("key-2")
    await world.flush()
    await world.crash()
    await world.start()
    await world.set("key-3")
    await world.stop()


async def handed_over(world: World) -> None:
    """End the journal, and continue it: at once, after an end without a change, with a checkpoint, and before a kill."""
    await world.start()
    await world.set("key-0")
    await world.flush()
    await world.hand_over()
    await world.start()
    await world.hand_over()
    await world.start()
    await world.set("key-1")
    await world.flush()
    await world.set("key-2")
    await world.hand_over()
    await world.start()
    await world.checkpoint()
    await world.set("key-0")
    await world.flush()
    await world.hand_over()
    await world.start()
    await world.set("lost")
    await world.crash()
    await world.start()
    await world.set("key-3")
    await world.flush()
    await world.crash()
    await world.start()
    await world.hand_over()
    await world.start()
    await world.delete("key-0")
    await world.flush()
    await world.stop()


async def killed_again_and_again(world: World) -> None:
    """Kill owners that have copied a journal: before their first change, after it, and beside a checkpoint."""
    await world.start()
    await world.set("key-0")
    await world.flush()
    await world.checkpoint()
    await world.set_many("key-0", "key-1")
    await world.flush()
    await world.crash()
    for number in range(3):
        await world.start()
        if number:
            await world.set(f"key-{number}")
            await world.flush()
        await world.crash()
    await world.start()
    async with world.held_up(world.checkpoint(), "sync", ".json."):
        await world.set("beside")
        await world.flush()
    await world.crash()
    await world.start()
    await world.set("key-0")
    await world.flush()
    await world.hand_over()
    await world.start()
    await world.set("key-0")
    await world.crash()


async def put_by_hand(world: World) -> None:
    """Start on a state that a user put there a moment ago, in a new directory."""
    world.put_by_hand({f"old-{number}": "x" * 50 for number in range(4)})
    await world.start()
    await world.set("new-0")
    await world.flush()
    await world.set("old-1")
    await world.flush()
    await world.stop()


async def moved(world: World) -> None:
    """Copy a state to another directory, without a sync: after a clean stop, after a kill, and after it was handed over."""
    await world.start()
    await world.set("key-0")
    await world.stop()
    world.move_to_a_new_directory(stopped=True)
    await world.start()
    await world.set("key-1")
    await world.flush()
    await world.set("key-2")
    await world.flush()
    await world.crash()
    world.move_to_a_new_directory(stopped=False)
    await world.start()
    await world.set("key-3")
    await world.flush()
    await world.hand_over()
    world.move_to_a_new_directory(stopped=True)
    await world.start()
    await world.set("key-4")
    await world.flush()
    await world.stop()


async def changed_in_place(world: World) -> None:
    """Cut off the journal, overwrite it, or close its descriptor, while the manager runs."""
    await world.start()
    await world.set("key-0")
    await world.flush()
    for number, (size, data) in enumerate([(0, b""), (50, b"x" * 50), (0, bytes(20))]):
        await world.set("before")
        await world.flush()
        world.change_the_journal(size, data)
        await world.set(f"behind-{number}")
        await world.flush()
    path = world.root / DIRECTORY / f"{NAME}.journal"
    await world.set("before")
    await world.flush()
    world.change_the_journal(path.stat().st_size, bytes(path.stat().st_size))
    await world.set("behind-3")
    await world.flush()
    fd = world.close_its_descriptor()
    await world.set("behind-4")
    await world.flush()
    os.close(fd)
    await world.set("behind-5")
    await world.flush()
    await world.crash()


async def foreign_snapshot(world: World) -> None:
    """Put another file in the place of the snapshot, while the journal has the whole state. The next checkpoint keeps that file."""
    await world.start()
    await world.set("key-0")
    await world.flush()
    await world.checkpoint()
    async with world.held_up(world.checkpoint(), "open", ".json."):
        world.change_the_journal(0, b"")
        await world.set("key-1")
        await world.flush()
        world.replace_the_snapshot(b'{"foreign":true}')
    await world.flush()
    await world.set("key-2")
    await world.flush()
    await world.checkpoint()
    await world.set("key-0")
    await world.flush()
    await world.crash()


async def large_values(world: World) -> None:
    """Set values of several 64 KiB, so that a snapshot is written in slices."""
    await world.start()
    for number in range(3):
        await world.set(f"large-{number}", f"{number}" * (65_000 + world.dice.randrange(9_000)))
        await world.flush()
    async with world.held_up(world.checkpoint(), "write", ".json."):
        await world.set("large-1", "small")
        await world.flush()
    await world.set("large-2", "z" * 70_000)
    await world.flush()
    await world.crash()


async def generations(world: World) -> None:
    """Write many checkpoints, some beside commits, with clean stops and kills in between."""
    for life in range(3):
        await world.start()
        for number in range(3):
            await world.set(f"key-{number}")
            await world.flush()
            async with world.held_up(world.checkpoint(), "sync", ".journal."):
                await world.set("beside")
                if number:
                    await world.flush()
            await world.flush()
        await world.set("behind")
        await world.flush()
        await (world.crash() if life % 2 else world.stop())


async def restores(world: World) -> None:
    """Restore a version after a clean stop and after a kill, undo that, and go on after each of them."""
    await world.start()
    for number in range(2):
        await world.set(f"key-{number}")
        await world.flush()
        await world.checkpoint()
    await world.set("early")
    await world.flush()
    early = world.latest
    await world.set("key-2")
    await world.flush()
    await world.stop()
    await world.restore(early)
    await world.start()
    await world.set("late")
    await world.flush()
    late = world.latest
    await world.crash()
    await world.restore(early)
    await world.start()
    await world.stop()
    await world.restore(late)
    await world.start()
    await world.set("last")
    await world.flush()
    await world.stop()


async def less_room(world: World) -> None:
    """Keep many generations, and then fewer."""
    for room in (1 << 30, 300):
        world.limit_the_history(most_bytes=room)
        await world.start()
        for number in range(6):
            await world.set(f"key-{number % 2}")
            await world.flush()
            await world.checkpoint()
        await world.stop()


async def by_age(world: World) -> None:
    """Keep a history of 200 s. Time passes, and the clock is set forward and back, between processes and in one of them."""
    world.limit_the_history(seconds=200)
    for life, jump in enumerate((10_000, -10_000, 0)):
        await world.start()
        for number in range(3):
            await world.set(f"key-{number % 2}")
            await world.flush()
            world.clock.advance(60)
            await world.set("more")
            await world.flush()
            await world.checkpoint()
            await world.pruned()
            world.clock.advance(60)
            if life == 2 and number < 2:
                world.clock.jump(2_000 - 4_000 * number)
        world.clock.jump(jump)
        await world.set("last")
        await world.flush()
        await (world.crash() if life else world.stop())


async def given_up(world: World) -> None:
    """Cut off a write, so that the journal is given up, behind some commits and beside a checkpoint. Then go on."""
    await world.start()
    for number in range(2):
        await world.set(f"key-{number}")
        await world.flush()
        await world.set("given-up")
        world.fail_the_next_sync()
        await world.flush()
        await world.set(f"behind-{number}")
        await world.flush()
        async with world.held_up(world.checkpoint(), "sync", ".json."):
            await world.set("beside")
            await world.flush()
            await world.set("given-up")
            world.fail_the_next_sync()
            await world.flush()
        await world.flush()
        await world.checkpoint()
    async with world.held_up(world.checkpoint(), "sync", ".journal."):  # it found no records yet
        await world.set("beside")
        await world.flush()
        await world.set("given-up")
        world.fail_the_next_sync()
        await world.flush()
    await world.crash()
    await world.start()
    await world.set("last")
    await world.stop()


async def steps(world: World) -> None:
    """Do a little of everything, short: for runs that are repeated with a fault at each call."""
    await world.start()
    await world.set("key-0")
    await world.flush()
    await world.set_many("key-1", "key-2")
    await world.flush()
    async with world.held_up(world.checkpoint(), "sync", ".json."):
        await world.set("key-3")
        await world.flush()
    await world.delete("key-1")
    await world.flush()
    await world.stop()
    await world.start()
    await world.set("key-4")
    await world.flush()
    await world.set("key-5")
    await world.flush()
    await world.crash()
    await world.start()
    await world.set("key-6")
    await world.flush()
    await world.stop()


async def next_lives(world: World) -> None:
    """Do what several processes do after each other, of which one hands over and one is killed."""
    await world.start()
    await world.set("next-0")
    await world.flush()
    await world.hand_over()
    await world.start()
    await world.set("next-1")
    await world.flush()
    await world.crash()
    await world.start()
    await world.set("next-2")
    await world.flush()
    await world.stop()


async def migrations(world: World) -> None:
    """Migrate the state at a start: after a clean end, after a kill, beside a journal that is handed over, and twice in a row."""
    await world.start()
    for number in range(5):
        await world.set(f"key-{number}", ttl=10_000 if number % 2 else None)
    await world.stop()
    await world.migrate(2)
    await world.set("key-5")
    await world.flush()
    await world.crash()
    await world.migrate(3)
    await world.crash()
    await world.migrate(5)
    await world.set("key-6")
    await world.hand_over()
    await world.migrate(6)
    await world.checkpoint()
    await world.set("key-7")
    await world.stop()
    await world.start()
    await world.stop()


async def next_life(world: World) -> None:
    """Do what a process does that finds what another one left: start, acknowledge more, and stop."""
    await world.start()
    await world.set("next-0")
    await world.flush()
    await world.set("next-1")
    await world.flush()
    await world.stop()


WORKLOADS: dict[str, Workload] = {
    workload.__name__: workload
    for workload in (
        one_writer,
        hundred_writers,
        transactions,
        expiring,
        checkpoints_beside_commits,
        journals_written_beside_commits,
        checkpoints_that_are_due,
        clean_stops,
        unclean_ends,
        handed_over,
        killed_again_and_again,
        put_by_hand,
        moved,
        changed_in_place,
        foreign_snapshot,
        large_values,
        steps,
    )
}

WITH_HISTORY: tuple[Workload, ...] = (
    expiring,
    checkpoints_beside_commits,
    journals_written_beside_commits,
    checkpoints_that_are_due,
    clean_stops,
    unclean_ends,
    handed_over,
    killed_again_and_again,
    steps,
    generations,
    less_room,
    by_age,
    given_up,
    restores,
)
"""Those that are run with a history. In each of them, the acknowledged versions are the ends of records."""

BY_AGE: tuple[Workload, ...] = (by_age,)
"""Those in which the clock of the application gives the times of the files in a history."""
