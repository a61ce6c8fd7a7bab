"""When what becomes durable: group commit, retries, the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest
from running import flusher_of, idle, running, until

from lab_state import (
    ClosedError,
    Config,
    FencedError,
    Manager,
    MemoryStorage,
    Reading,
    Recovery,
    StorageSession,
    UnavailableError,
    UnsupportedError,
    WaitTimeoutError,
    _flusher,
)
from lab_state._entries import Overlay
from lab_state._order import Index
from lab_state._snapshots import SnapshotViews
from lab_state.storage import SnapshotSource
from lab_state.testing import FaultyStorage, ManualClock


def commits(storage: FaultyStorage) -> int:
    return storage.calls.count("commit")


async def checkpoint_that_hangs(manager: Manager, storage: FaultyStorage) -> None:
    """Begin one in the background; it goes on when the storage is told to."""
    storage.hang("checkpoint")
    await manager.set("large", "x" * 100_000)
    await manager.flush()
    await until(lambda: "checkpoint" in storage.calls)


class TestFlush:
    async def test_nothing_changed_nothing_written(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """flush() without a change does not touch the storage."""
        async with running(storage, clock, None) as state:
            await state.flush()
            await state.set("a", 1)
            await state.flush()
            await state.flush()
            assert commits(storage) == 1

    async def test_callers_at_the_same_time_share_one_write(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """A hundred flushes that wait together are one commit."""
        async with running(storage, clock, None) as state:
            await state.set("a", 1)
            await asyncio.gather(*(state.flush() for _ in range(100)))
            assert commits(storage) == 1

    async def test_a_flush_during_a_commit_waits_for_the_next(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """A change made while a commit is under way is not in it."""
        async with running(storage, clock, None) as state:
            storage.hang("commit")
            await state.set("a", 1)
            first = asyncio.create_task(state.flush())
            await until(lambda: commits(storage) == 1)
            same = asyncio.create_task(state.flush())
            await asyncio.sleep(0)
            await state.set("b", 2)
            second = asyncio.create_task(state.flush())
            await idle()
            assert not first.done()
            assert not same.done()
            assert (state.status().unflushed_keys, state.durable_revision) == (2, 0)
            storage.resume()
            await asyncio.gather(first, same)
            await second
            assert commits(storage) == 2
            assert state.durable_revision == state.revision == 2

    async def test_a_cancelled_flush_does_not_cancel_the_write(
        self, storage: FaultyStorage, clock: ManualClock
    ) -> None:
        """The write goes on for the others, and for itself."""
        async with running(storage, clock, None) as state:
            storage.hang("commit")
            await state.set("a", 1)
            cancelled, other = asyncio.create_task(state.flush()), asyncio.create_task(state.flush())
            await until(lambda: commits(storage) == 1)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            storage.resume()
            await other
            assert state.durable_revision == 1

    @pytest.mark.parametrize("moment", ["before", "after"])
    async def test_a_failed_flush_raises_and_keeps_the_changes(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage, moment: str
    ) -> None:
        """All who waited for it are told, each with an error of its own; the next one writes everything."""
        async with running(storage, clock, None) as state:
            storage.fail("commit", moment)  # type: ignore[arg-type]
            await state.set_many({"a": 1, "b": 2})
            errors = await asyncio.gather(*(state.flush() for _ in range(3)), return_exceptions=True)
            assert [type(error) for error in errors] == [UnavailableError] * 3
            assert len({id(error) for error in errors}) == 3
            assert "not durable yet" in str(errors[0])
            status = state.status()
            assert (status.flush_failures, status.unflushed_keys, status.durable_revision) == (1, 2, 0)
            assert status.last_error is not None
            await state.delete("a")
            await state.flush()
            assert (state.durable_revision, state.status().last_error) == (2, None)
        async with Manager("test", memory) as state:
            assert await state.get_all() == {"b": 2}

    async def test_changes_during_a_failed_commit_come_on_top(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
    ) -> None:
        """What a failed commit puts back never covers what came since."""
        async with running(storage, clock, None) as state:
            storage.hang("commit")
            storage.fail("commit")
            await state.set_many({"a": "old", "b": "old"})
            flushing = asyncio.create_task(state.flush())
            await until(lambda: commits(storage) == 1)
            await state.set("a", "new")
            await state.delete("b")
            storage.resume()
            await flushing
            with pytest.raises(UnavailableError):
                await state.flush()
            await state.flush()
        async with Manager("test", memory) as state:
            assert await state.get_all() == {"a": "new"}


class TestInterval:
    async def test_changes_are_flushed_once_an_interval(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """One commit an interval for any number of changes; none without a change."""
        async with running(storage, clock, 2.0) as state:
            await state.set("a", 1)
            clock.advance(1.5)
            await state.set("b", 2)
            await idle()
            assert (commits(storage), state.status().unflushed_age) == (0, 1.5)
            clock.advance(0.5)
            await until(lambda: state.durable_revision == 2)
            clock.advance(20)
            await idle()
            assert (commits(storage), state.status().unflushed_age) == (1, 0)
            assert state.status().last_flush_at == 1_700_000_002.0
            assert state.status().last_flush_seconds == 0.0

    async def test_without_an_interval_only_flush_and_stop_write(
        self, storage: FaultyStorage, clock: ManualClock
    ) -> None:
        """None means no background flush, not even after a failed one."""
        async with running(storage, clock, None) as state:
            await state.set("a", 1)
            clock.advance(1000)
            storage.fail("commit")
            with pytest.raises(UnavailableError):
                await state.flush()
            clock.advance(1000)
            await idle()
            assert commits(storage) == 1
        assert commits(storage) == 2

    async def test_a_failed_background_flush_is_retried_with_growing_pauses(
        self, storage: FaultyStorage, clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The pauses double up to the longer of the interval and 5 s; the log tells of each failure, and of the end."""
        caplog.set_level(logging.DEBUG, "lab_state")
        async with running(storage, clock, 1.0) as state:
            storage.fail("commit", times=8)
            await state.set("a", 1)
            clock.advance(1.0)
            for failures, pause in enumerate((0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0), 1):
                await until(lambda failures=failures: state.status().flush_failures == failures)  # type: ignore[misc]
                await idle()
                clock.advance(pause - 0.01)
                await idle()
                assert commits(storage) == failures
                clock.advance(0.02)
            await until(lambda: state.durable_revision == 1)
            assert (state.status().last_error, state.status().flush_failures) == (None, 8)
        assert caplog.text.count("a flush failed") == 8
        assert "flushed again (failures before: 8)" in caplog.text

    async def test_an_explicit_flush_does_not_wait_for_the_pause(
        self, storage: FaultyStorage, clock: ManualClock
    ) -> None:
        """Who asks is served now."""
        async with running(storage, clock, 1.0) as state:
            storage.fail("commit", times=5)
            await state.set("a", 1)
            for _ in range(5):
                with pytest.raises(UnavailableError):
                    await state.flush()
            await state.flush()
            assert commits(storage) == 6

    async def test_zero_means_durable_when_it_returns(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """Every kind of write waits; concurrent ones share commits."""
        async with running(storage, clock, 0) as state:
            await state.set("a", 1)
            await state.set_many({"b": 2, "c": [3]})
            await state.incr("a")
            await state.update("c", lambda value: [*value, 4])
            await state.set_if_absent("d", 1)
            await state.get_or_set("e", lambda: 1)
            await state.pop("d")
            await state.delete("e")
            await state.delete_all("b")
            assert commits(storage) == state.durable_revision == state.revision == 9
            assert await state.delete("nope") is False
            assert await state.delete_all() == 2
            assert commits(storage) == 10
            await asyncio.gather(*(state.set(f"key {number}", 1) for number in range(100)))
            assert commits(storage) == 11

    async def test_zero_and_a_failed_write_leave_the_change(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """The error says not durable yet; the change is there, and the background makes it durable."""
        async with running(storage, clock, 0) as state:
            storage.fail("commit")
            with pytest.raises(UnavailableError, match="not durable yet"):
                await state.set("a", 1)
            assert (await state.get("a"), state.durable_revision) == (1, 0)
            clock.advance(0.1)
            await until(lambda: state.durable_revision == 1)

    async def test_zero_and_a_cancelled_caller_leave_the_change(
        self, storage: FaultyStorage, clock: ManualClock
    ) -> None:
        """Also when no other caller waits for it."""
        async with running(storage, clock, 0) as state:
            writing = asyncio.create_task(state.set("a", 1))
            await asyncio.sleep(0)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
            await until(lambda: state.durable_revision == 1)


class TestWaitDurable:
    async def test_it_waits_for_the_background_and_starts_nothing(
        self, storage: FaultyStorage, clock: ManualClock
    ) -> None:
        """It returns when the interval's own flush succeeded, also after a failure."""
        async with running(storage, clock, 1.0) as state:
            storage.fail("commit")
            revision = await state.set("a", 1)
            waiting = asyncio.create_task(state.wait_durable(revision))
            await idle()
            assert commits(storage) == 0
            clock.advance(1.0)
            await until(lambda: state.status().flush_failures == 1)
            await state.set("b", 1)
            await idle()
            assert not waiting.done()
            clock.advance(0.1)
            await waiting
            await state.wait_durable(revision)
            await state.wait_durable()
            with pytest.raises(ValueError, match="no revision 9 yet"):
                await state.wait_durable(9)

    async def test_it_waits_no_longer_than_its_timeout(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """After `timeout` seconds it raises an error that is an UnavailableError and a TimeoutError; it can be called again."""
        async with running(storage, clock, 10.0) as state:
            revision = await state.set("a", 1)
            for seconds in (0, 2.5):
                waiting = asyncio.create_task(state.wait_durable(revision, timeout=seconds))
                await idle()
                assert waiting.done() == (seconds == 0)
                clock.advance(seconds)
                with pytest.raises(
                    WaitTimeoutError, match=rf"^revision 1 of '\w+' is not durable after {seconds} s: "
                ) as caught:
                    await waiting
                assert isinstance(caught.value, UnavailableError)
                assert isinstance(caught.value, TimeoutError)
                assert caught.value.__cause__ is None
            assert (commits(storage), state.status().flush_failures) == (0, 0)
            waiting = asyncio.create_task(state.wait_durable(timeout=60))
            await idle()
            clock.advance(7.5)
            await waiting
            await state.wait_durable(revision, timeout=0)  # it is durable, so there is no wait
            clock.advance(60)  # and no timer is left that could cancel anything

    async def test_it_may_become_durable_as_the_time_is_up(self, storage: FaultyStorage) -> None:
        """A revision that becomes durable at the moment of the timeout is no error."""

        class Jumping(ManualClock):
            """Is asked for the time by a commit that has just succeeded, and lets the timeout pass then."""

            armed = False

            def time(self) -> float:
                if self.armed:
                    self.armed = False
                    self.advance(1.0)
                return super().time()

        clock = Jumping()
        async with running(storage, clock, None) as state:
            waiting = asyncio.create_task(state.wait_durable(await state.set("a", 1), timeout=1.0))
            await idle()
            clock.armed = True
            await state.flush()
            await waiting
            assert not clock.armed

    async def test_a_cancelled_wait_with_a_timeout_is_cancelled(
        self, storage: FaultyStorage, clock: ManualClock
    ) -> None:
        """A cancellation from outside is no timeout."""
        async with running(storage, clock, None) as state:
            waiting = asyncio.create_task(state.wait_durable(await state.set("a", 1), timeout=1.0))
            await idle()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    async def test_a_fence_ends_a_wait_with_a_timeout(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """What will never be durable is told at once, and is no timeout."""
        with pytest.raises(FencedError):
            async with running(storage, clock, None) as state:
                storage.fail("commit", error=FencedError("a newer writer owns it"))
                waiting = asyncio.create_task(state.wait_durable(await state.set("a", 1), timeout=1.0))
                await idle()
                with pytest.raises(FencedError):
                    await state.flush()
                with pytest.raises(FencedError):
                    await waiting

    async def test_it_ends_with_the_manager(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """The last flush of stop() satisfies it; a last flush that fails is what it raises."""
        for fails in (False, True):
            with contextlib.suppress(UnsupportedError):
                async with running(storage, clock, None) as state:
                    await state.set("a", 1)
                    waiting = asyncio.create_task(state.wait_durable())
                    await asyncio.sleep(0)
                    if fails:
                        storage.fail("commit", error=UnsupportedError("read-only"))
            if fails:
                with pytest.raises(UnsupportedError, match="read-only"):
                    await waiting
            else:
                await waiting


class TestFenced:
    async def test_a_deposed_writer_stops_trying(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """Who waits is told, the background goes quiet, and stop raises it."""
        with pytest.raises(FencedError):
            async with running(storage, clock, 1.0) as state:
                storage.fail("commit", times=9, error=FencedError("a newer writer owns it"))
                await state.set("a", 1)
                waiting = asyncio.create_task(state.wait_durable())
                await asyncio.sleep(0)
                clock.advance(1.0)
                with pytest.raises(FencedError):
                    await waiting
                clock.advance(100)
                await idle()
                assert commits(storage) == 1
                for call in (state.flush, state.wait_durable):
                    with pytest.raises(FencedError):
                        await call()


class TestCheckpoint:
    async def test_it_runs_beside_commits_when_one_is_due(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
    ) -> None:
        """A commit does not wait for the checkpoint; what changes meanwhile is kept apart from its view."""
        async with running(storage, clock, None) as state:
            storage.hang("checkpoint")
            await state.set_many({f"key {number}": "x" * 100 for number in range(2000)})
            await state.flush()
            await until(lambda: "checkpoint" in storage.calls)
            await state.set("during", 1)
            await state.flush()
            await state.delete("key 7")
            storage.resume()
            await until(lambda: state.status().snapshot_bytes > 200_000)
            assert len(state) == 2000
            await state.set("after", 1)
            assert memory.places["test"].snapshot is not None
            await until(lambda: state._core.state.entries.__class__ is dict)
        async with Manager("test", memory) as state:
            assert len(state) == 2001
            assert await state.get_many(["during", "after", "key 7"]) == {"during": 1, "after": 1}

    async def test_a_failed_checkpoint_is_tried_again_later(
        self, storage: FaultyStorage, clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Commits go on, nothing is lost, and the pauses grow."""
        async with running(storage, clock, None) as state:
            storage.fail("checkpoint", times=2)
            await state.set("large", "x" * 100_000)
            await state.flush()
            await until(lambda: state.status().flush_failures == 1)
            await idle()
            await state.set("a", 1)
            await state.flush()
            await idle()
            assert storage.calls.count("checkpoint") == 1
            clock.advance(0.1)
            await until(lambda: state.status().flush_failures == 2)
            await idle()
            clock.advance(0.2)
            await until(lambda: state.status().snapshot_bytes > 0)
        assert caplog.text.count("a checkpoint failed") == 2

    async def test_one_that_succeeds_again_is_no_error_any_more(
        self, storage: FaultyStorage, clock: ManualClock
    ) -> None:
        """status() tells of it until then, and no longer, though nothing more is committed."""
        async with running(storage, clock, None) as state:
            storage.fail("checkpoint", times=2)
            await state.set("large", "x" * 100_000)
            await state.flush()
            await until(lambda: state.status().flush_failures == 1)
            assert state.status().last_error == "checkpoint failed on demand"
            clock.advance(0.1)
            await until(lambda: state.status().flush_failures == 2)
            await idle()
            assert state.status().last_error == "checkpoint failed on demand"
            clock.advance(0.2)
            await until(lambda: state.status().snapshot_bytes > 0)
            await idle()
            assert state.status().last_error is None

    async def test_the_error_of_a_commit_outlives_a_checkpoint(
        self, storage: FaultyStorage, clock: ManualClock
    ) -> None:
        """A checkpoint that succeeds meanwhile does not hide that changes are not durable."""
        async with running(storage, clock, None) as state:
            await state.set_many({f"key {number}": "x" * 100 for number in range(20_000)})
            await state.flush()
            await until(lambda: state._core.state.frozen)
            storage.fail("commit")
            await state.set("a", 1)
            with pytest.raises(UnavailableError, match="commit failed on demand"):
                await state.flush()
            assert state.status().snapshot_bytes == 0
            await until(lambda: state.status().snapshot_bytes > 0)
            await idle()
            assert state.status().last_error == "commit failed on demand"
            await state.flush()
            assert state.status().last_error is None

    async def test_its_view_waits_until_it_is_committed(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """No snapshot is published with a change that no commit holds yet."""
        async with running(storage, clock, None) as state:
            storage.hang("checkpoint")
            await state.set("large", "x" * 100_000)
            await state.flush()
            await until(lambda: "checkpoint" in storage.calls)
            await state.set("not committed", 1)
            storage.fail("commit")
            storage.resume()
            await until(lambda: state.status().flush_failures == 2)
            assert state.status().snapshot_bytes == 0
            await idle()
            clock.advance(0.1)
            await until(lambda: state.status().snapshot_bytes > 0)
            assert state.durable_revision == 2

    async def test_a_fence_found_by_a_checkpoint_ends_all(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """Who waits is told, whichever storage call found out first; no snapshot is written again and again."""
        with pytest.raises(FencedError):
            async with running(storage, clock, 1.0) as state:
                storage.fail("checkpoint", error=FencedError("a newer writer owns it"))
                await state.set("large", "x" * 100_000)
                await state.flush()
                await until(lambda: state.status().flush_failures == 1)
                await state.wait_durable()
                await state.set("a", 1)
                with pytest.raises(FencedError):
                    await state.wait_durable()
                clock.advance(1000)
                await idle()
                assert storage.calls.count("checkpoint") == 1
                storage.fail("commit", error=FencedError("a newer writer owns it"))

    async def test_what_was_written_beside_a_checkpoint_comes_home(
        self, storage: FaultyStorage, clock: ManualClock
    ) -> None:
        """Thousands of changes during a checkpoint, folded in steps, even if its task is cancelled on the way."""
        async with running(storage, clock, None) as state:
            for cancel in (False, True):
                storage.hang("checkpoint")
                await state.set("large", "x" * 200_000)
                await state.flush()
                await until(lambda: flusher_of(state).checkpoints.task is not None)
                task = flusher_of(state).checkpoints.task
                assert task is not None
                await idle()
                views = SnapshotViews(state._core.state)
                views.take()
                overlay = state._core.state.entries
                assert isinstance(overlay, Overlay)
                view = overlay.base
                for number in range(5000):  # one by one: `set_many` would put them into a layer of its own
                    await state.set(f"key {number}", number)
                folding = asyncio.create_task(views.fold())
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                if cancel:
                    folding.cancel()
                await asyncio.gather(folding, return_exceptions=True)
                assert state._core.state.entries is view
                assert len(view) == 5001
                storage.resume()
                await task


class TestFreeing:
    """A map that is no longer needed is freed in steps: a million values at once would hold up the event loop."""

    KEYS = 3500

    async def filled(self, state: Manager) -> dict[str, Any]:
        await state.set_many({f"key {number}": number for number in range(self.KEYS)})
        entries = state._core.state.entries
        assert isinstance(entries, dict)
        return entries

    async def freed(self, large: dict[Any, Any]) -> list[int]:
        """Return how much is left after each turn of the loop."""
        left = [len(large)]
        while left[-1]:
            await asyncio.sleep(0)
            left.append(len(large))
        return left

    async def test_what_was_deleted(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """After delete_all(), a thousand keys go in each turn of the loop."""
        async with running(storage, clock, None) as state:
            entries = await self.filled(state)
            await state.delete_all()
            assert await self.freed(entries) == [2500, 1500, 500, 0]
            assert await state.get_all() == {}

    async def test_the_index(self, storage: FaultyStorage, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
        """After delete_all() and after stop(), the keys of the index go, some thousand in each turn of the loop."""
        released: list[dict[int, Any]] = []
        original = Index.release

        def release(index: Index) -> dict[int, Any]:
            released.append(original(index))
            return released[-1]

        monkeypatch.setattr(Index, "release", release)
        values = {f"key {number}": number for number in range(3 * self.KEYS)}
        async with running(storage, clock, None) as state:
            await state.set_many(values)
            assert await state.keys() == sorted(values)
            await state.delete_all()
            assert len(await self.freed(released.pop())) > 2
            await state.set_many(values)
            assert await state.keys() == sorted(values)
        assert (await self.freed(released.pop()))[-1] == 0

    async def test_what_was_committed(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """After a commit, the map of its changes goes, and the values stay."""
        async with running(storage, clock, None) as state:
            await self.filled(state)
            changes = state._core.state.changes
            await state.flush()
            assert (await self.freed(changes))[-1] == 0
            assert len(await state.get_all()) == self.KEYS

    async def test_what_is_still_to_be_told(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """The changes of a commit are whole as long as a reader of `watch(durable=True)` was not told all of them."""
        async with running(storage, clock, None) as state, state.watch(durable=True) as changes:
            await self.filled(state)
            await state.flush()
            assert {(await anext(changes)).key for _ in range(self.KEYS)} == (await state.get_all()).keys()

    async def test_what_lay_beneath_a_checkpoint(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """A view whose keys were deleted meanwhile goes when the checkpoint has ended."""
        async with running(storage, clock, None) as state:
            await self.filled(state)
            await state.flush()
            await state.set("unflushed", 1)  # the checkpoint waits for its commit
            storage.hang("commit")
            checkpoint = asyncio.create_task(flusher_of(state).checkpoints.write(wait=True))
            await until(lambda: isinstance(state._core.state.entries, Overlay))
            overlay = state._core.state.entries
            assert isinstance(overlay, Overlay)
            await state.delete_all()
            await idle()
            assert isinstance(overlay.view, dict)
            assert len(overlay.view) == self.KEYS + 1
            storage.resume()
            await checkpoint
            assert (await self.freed(overlay.view))[-1] == 0

    async def test_what_a_stop_leaves(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """The entries go after stop(); but not while a storage call that hangs may still ask for them."""
        async with running(storage, clock, None) as state:
            entries = await self.filled(state)
        assert (await self.freed(entries))[-1] == 0
        state = Manager(Config(name="hangs", flush_interval=None), storage, clock=clock)
        await state.start()
        entries = await self.filled(state)
        storage.hang("commit")
        stopping = asyncio.create_task(state.stop())
        await until(lambda: commits(storage) > 1)
        clock.advance(10)
        with pytest.raises(UnavailableError, match="no progress"):
            await stopping
        await idle()
        assert len(entries) == self.KEYS
        storage.resume()
        await idle()


async def test_a_durable_write_in_another_thread_is_refused(storage: FaultyStorage, clock: ManualClock) -> None:
    """Also of a key that is about to be flushed, where there is no check before the change: no caller waits there for ever."""
    async with running(storage, clock, 0) as state:
        storage.hang("commit")
        writing = [asyncio.create_task(state.set("a", 1))]
        await until(lambda: commits(storage) == 1)
        writing.append(asyncio.create_task(state.set("b", 2)))
        await idle()
        with pytest.raises(RuntimeError, match="belongs to the event loop that start"):
            await asyncio.to_thread(lambda: asyncio.run(state.set("b", 3)))
        storage.resume()
        assert await asyncio.gather(*writing) == [1, 2]


async def test_views_are_folded_once(storage: FaultyStorage, clock: ManualClock) -> None:
    """A second fold does not fold a view of the same map that was taken since for another use."""
    async with running(storage, clock, None) as state:
        await state.set("a", 1)
        first, second = SnapshotViews(state._core.state), SnapshotViews(state._core.state)
        first.freeze()
        await first.fold()
        view = second.freeze()
        await state.set("a", 2)
        await first.fold()
        assert (view, state._core.state.frozen) == ({"a": 1}, True)
        await second.fold()
        assert await state.get("a") == 2


class _UncleanSession:
    """As a storage whose last writer was killed: what it recovered may not be durable."""

    def __init__(self, inner: StorageSession) -> None:
        self._inner = inner
        self.recovery: Recovery = inner.recovery._replace(unsettled=True)
        self.path = inner.path
        self.snapshot_bytes = self.journal_bytes = self.progress = 0
        self.warning = None

    async def commit(self, record: bytes, snapshot: SnapshotSource) -> bool:
        await self._inner.commit(record, snapshot)
        return True

    async def checkpoint(self, snapshot: SnapshotSource) -> None:
        await self._inner.checkpoint(snapshot)

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Unclean:
    def __init__(self, inner: MemoryStorage) -> None:
        self._inner = inner

    async def open(self, name: str) -> StorageSession:
        return _UncleanSession(await self._inner.open(name))

    async def read(self, name: str) -> Reading:
        return await self._inner.read(name)


class TestUnclean:
    @pytest.fixture
    async def storage(self, memory: MemoryStorage) -> FaultyStorage:
        async with Manager("test", memory) as state:
            await state.set("old", 1)
        return FaultyStorage(_Unclean(memory))

    async def test_the_first_act_is_a_commit(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """Nothing is durable before it, though nothing changed; reads work at once."""
        storage.hang("commit")
        async with running(storage, clock, None) as state:
            assert (await state.get("old"), state.revision, state.durable_revision) == (1, 1, 0)
            await until(lambda: commits(storage) == 1)
            flushing, waiting = asyncio.create_task(state.flush()), asyncio.create_task(state.wait_durable())
            await idle()
            assert not flushing.done()
            storage.resume()
            await asyncio.gather(flushing, waiting)
            assert state.durable_revision == 1
            assert commits(storage) == 1

    async def test_when_it_fails_flush_says_so_and_it_is_tried_again(
        self, storage: FaultyStorage, clock: ManualClock
    ) -> None:
        """start() succeeds, reads work, flush() raises until the storage is well."""
        storage.fail("commit", times=3)
        async with running(storage, clock, 1.0) as state:
            await until(lambda: state.status().flush_failures == 1)
            with pytest.raises(UnavailableError):
                await state.flush()
            assert (await state.get("old"), state.durable_revision) == (1, 0)
            await idle()
            clock.advance(0.2)
            await until(lambda: state.status().flush_failures == 3)
            await idle()
            clock.advance(0.4)
            await until(lambda: state.durable_revision == 1)
            await state.flush()

    async def test_stop_makes_it_durable_at_the_latest(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
    ) -> None:
        """The last flush includes what was recovered, changed or not."""
        storage.fail("commit")
        async with running(storage, clock, None) as state:
            await until(lambda: state.status().flush_failures == 1)
        assert commits(storage) == 2
        assert memory.places["test"].snapshot is not None


class TestStop:
    async def test_the_last_flush_is_tried_again_until_the_deadline(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
    ) -> None:
        """A storage that is well again in time loses nothing."""
        manager = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        await manager.start()
        await manager.set("a", 1)
        storage.fail("commit", times=3)
        stopping = asyncio.create_task(manager.stop())
        for pause in (0.1, 0.2, 0.4):
            await idle()
            clock.advance(pause)
        await stopping
        async with Manager("test", memory) as state:
            assert await state.get("a") == 1

    async def test_what_takes_long_between_two_attempts_ends_none(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
    ) -> None:
        """Where a handler of the log takes longer than the pause, the next attempt comes at once."""

        class Slow(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                clock.advance(1.0)

        logger = logging.Logger("slow")  # noqa: LOG001 -- used here only
        logger.addHandler(Slow())
        manager = Manager(Config(name="test", flush_interval=None), storage, clock=clock, logger=logger)
        await manager.start()
        await manager.set("a", 1)
        storage.fail("commit", times=3)
        stopping = asyncio.create_task(manager.stop())
        while not stopping.done():
            await idle()
            clock.advance(0.0)
        await stopping
        assert (commits(storage), manager.durable_revision) == (4, 1)

    async def test_the_last_attempt_is_just_before_the_deadline(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
    ) -> None:
        """The pauses grow beyond it; half a second before it there is one more attempt, and a disk may be well again."""
        manager = Manager(Config(name="test", flush_interval=None, stop_timeout=3.0), storage, clock=clock)
        await manager.start()
        await manager.set("a", 1)
        storage.fail("commit", times=5)
        begin = clock.monotonic()
        stopping = asyncio.create_task(manager.stop())
        for pause in (0.1, 0.2, 0.4, 0.8):
            await idle()
            clock.advance(pause)
        await idle()
        assert commits(storage) == 5
        clock.advance(2.49 - (clock.monotonic() - begin))
        await idle()
        assert commits(storage) == 5
        clock.advance(0.02)
        await stopping
        async with Manager("test", memory) as state:
            assert await state.get("a") == 1

    async def test_what_a_stop_that_failed_has_lost(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """The error says that the changes are lost, and that there is no retry."""
        manager = Manager(Config(name="test", flush_interval=None, stop_timeout=1.0), storage, clock=clock)
        await manager.start()
        await manager.set_many({"a": 1, "b": 2})
        storage.fail("commit", times=100)
        stopping = asyncio.create_task(manager.stop())
        while not stopping.done():
            await idle()
            clock.advance(0.1)
        with pytest.raises(
            UnavailableError, match=r"\(stop\(\) gave up: changes are not durable and are lost \(keys: 2\)\)$"
        ):
            await stopping

    async def test_what_cannot_be_retried_is_not(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """A read-only storage ends the stop at once, with its error; the lock is given back."""
        with pytest.raises(UnsupportedError, match="read-only"):
            async with running(storage, clock, None) as state:
                storage.fail("commit", error=UnsupportedError("read-only"))
                await state.set("a", 1)
        async with running(storage, clock, None):
            pass

    async def test_a_storage_that_hangs_does_not_hold_up_stop(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
    ) -> None:
        """stop() returns within its timeout and says what is not durable; the state stays locked until the call ends."""
        manager = Manager(Config(name="test", flush_interval=0, stop_timeout=3.0), storage, clock=clock)
        await manager.start()
        storage.hang("commit")
        writing = asyncio.create_task(manager.set("a", 1))
        await until(lambda: commits(storage) == 1)
        stopping = asyncio.create_task(manager.stop())
        await idle()
        clock.advance(3.0)
        with pytest.raises(UnavailableError, match=r"no progress for 3.0 s: changes of"):
            await stopping
        with pytest.raises(UnavailableError, match="no progress"):
            await writing
        assert memory.places["test"].session is not None
        storage.resume()
        await until(lambda: memory.places["test"].session is None)
        async with manager:
            assert await manager.get("a") == 1

    async def test_a_checkpoint_that_hangs_loses_nothing(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Everything is durable before it, so stop() only warns; what still runs keeps its view of the state."""
        manager = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        await manager.start()
        await manager.set("a", 1)
        storage.hang("checkpoint")
        stopping = asyncio.create_task(manager.stop())
        await until(lambda: "checkpoint" in storage.calls)
        clock.advance(9.0)
        await stopping
        assert "everything is durable" in caplog.text
        storage.resume()
        await until(lambda: memory.places["test"].session is None)
        async with manager:
            assert await manager.get("a") == 1

    async def test_a_checkpoint_under_way_ends_before_the_session(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
    ) -> None:
        """Stop during a flush during a checkpoint: all three get to their end."""
        manager = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        await manager.start()
        await checkpoint_that_hangs(manager, storage)
        await manager.set("a", 1)
        flushing, stopping = asyncio.create_task(manager.flush()), asyncio.create_task(manager.stop())
        await idle()
        storage.resume()
        await asyncio.gather(flushing, stopping)
        place = memory.places["test"]
        assert place.session is None
        assert place.journal is not None
        assert place.journal.count(b"\n") == 1

    async def test_stopping_twice_is_stopping_once(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """A second stop waits for the first; cancelling either does not cancel the stop."""
        manager = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        await manager.start()
        await manager.set("a", 1)
        storage.hang("commit")
        first, second = asyncio.create_task(manager.stop()), asyncio.create_task(manager.stop())
        await until(lambda: commits(storage) == 1)
        with pytest.raises(ClosedError):
            await manager.set("b", 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert manager.status().phase == "stopping"
        storage.resume()
        await second
        await manager.stop()
        assert (manager.status().phase, manager.durable_revision) == ("stopped", 1)

    async def test_letting_go_that_fails_is_logged(
        self, storage: FaultyStorage, clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Everything is durable by then, so stop() does not raise."""
        async with running(storage, clock, None) as state:
            await state.set("a", 1)
            storage.fail("aclose", "after")
        assert "the storage could not be closed" in caplog.text


class TestBrokenPromises:
    async def test_a_storage_that_raises_anything_else(self, memory: MemoryStorage, clock: ManualClock) -> None:
        """An exception that no storage should raise is an UnavailableError, and the task lives on."""
        storage = FaultyStorage(memory)
        async with running(storage, clock, None) as state:
            storage.fail("commit", error=OSError("disk"))  # type: ignore[arg-type]
            await state.set("a", 1)
            with pytest.raises(UnavailableError, match="ended with OSError") as error:
                await state.flush()
            assert isinstance(error.value.__cause__, OSError)
            await state.flush()

    async def test_all_tasks_of_the_loop_are_cancelled(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Who waits is told, nothing is forgotten, and stop() still flushes."""
        manager = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        await manager.start()
        storage.hang("commit")
        await manager.set("a", 1)
        flushing = asyncio.create_task(manager.flush())
        await until(lambda: commits(storage) == 1)
        flusher_of(manager)._task.cancel()
        with pytest.raises(UnavailableError, match="was cancelled"):
            await flushing
        assert "was cancelled: changes are not durable (keys: 1). Was stop() forgotten?" in caplog.text
        with pytest.raises(UnavailableError, match=r"was cancelled: call stop\(\), which flushes what is left"):
            await manager.flush()
        storage.resume()
        await manager.stop()
        async with Manager("test", memory) as state:
            assert await state.get("a") == 1

    async def test_an_error_with_a_constructor_of_its_own(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
    ) -> None:
        """A storage's own StorageError reaches each waiter, whatever its constructor takes."""

        class OwnError(UnavailableError):
            def __init__(self, *, code: int) -> None:
                super().__init__(f"code {code}")
                self.code = code

        async with running(storage, clock, None) as state:
            storage.fail("commit", error=OwnError(code=7))
            await state.set("a", 1)
            errors = await asyncio.gather(state.flush(), state.flush(), return_exceptions=True)
            assert [error.code for error in errors if isinstance(error, OwnError)] == [7, 7]
            await state.flush()

    async def test_the_task_is_cancelled_in_the_last_flush(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
    ) -> None:
        """stop() never returns as if all were well when its last flush did not happen."""
        manager = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        await manager.start()
        await manager.set("a", 1)
        waiting = asyncio.create_task(manager.wait_durable())
        storage.hang("commit")
        stopping = asyncio.create_task(manager.stop())
        await until(lambda: commits(storage) == 1)
        task = manager._flusher._task if manager._flusher is not None else stopping
        task.cancel()
        for each in (stopping, waiting):
            with pytest.raises(
                UnavailableError,
                match="last flush of 'test' was cancelled at the end of the event loop: changes may not be durable",
            ):
                await each
        assert memory.places["test"].session is None

    async def test_all_tasks_are_cancelled_during_a_stop(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As at a second Ctrl-C: what was not durable is lost, and said to be; but the state does not stay locked."""
        manager = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        await manager.start()
        await manager.set("a", 1)
        await manager.flush()
        await manager.set("b", 2)
        storage.hang("commit")
        flushing = asyncio.create_task(manager.flush())
        await until(lambda: commits(storage) == 2)
        stopping = asyncio.create_task(manager.stop())
        await idle()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.wait({flushing, stopping})
        assert manager.status().phase == "stopped"
        await until(lambda: memory.places["test"].session is None)
        assert "cancelled at the end of the event loop: changes may not be durable (keys: 1)" in caplog.text
        storage.resume()
        async with manager:
            assert await manager.get_all() == {"a": 1}

    async def test_the_stop_is_cancelled_without_the_flush(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
    ) -> None:
        """What is still being written is not freed under it: the last flush and the checkpoint have everything."""
        manager = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        await manager.start()
        values = {f"key-{number}": number for number in range(3000)}
        await manager.set_many(values)
        await manager.flush()
        await manager.set("last", 1)
        storage.hang("commit")
        stopping = asyncio.create_task(manager.stop())
        await until(lambda: commits(storage) == 2)
        (stop,) = (task for task in asyncio.all_tasks() if task.get_name() == "lab_state test stop")
        stop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        await idle()
        storage.resume()
        await until(lambda: memory.places["test"].session is None)
        async with Manager("test", memory) as state:
            assert await state.get_all() == {**values, "last": 1}

    async def test_the_task_is_cancelled_twice(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
    ) -> None:
        """Even while it waits for a checkpoint, the session is let go of."""
        manager = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        await manager.start()
        await checkpoint_that_hangs(manager, storage)
        task = flusher_of(manager)._task
        stopping = asyncio.create_task(manager.stop())
        await idle()
        for _ in range(2):
            task.cancel()
            await idle()
        assert memory.places["test"].session is None
        storage.resume()
        await stopping

    @pytest.mark.parametrize("hanging", ["nothing", "aclose", "checkpoint"])
    async def test_the_loop_ends_after_a_stop_that_gave_up(
        self,
        storage: FaultyStorage,
        clock: ManualClock,
        memory: MemoryStorage,
        monkeypatch: pytest.MonkeyPatch,
        hanging: Any,
    ) -> None:
        """The session is told to close; if that hangs too, the manager does not wait for it."""
        monkeypatch.setattr(_flusher, "_LAST_CHANCE", 0.01)
        manager = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        await manager.start()
        if hanging == "checkpoint":
            await checkpoint_that_hangs(manager, storage)
        await manager.set("a", 1)
        storage.hang("commit")
        task, before = flusher_of(manager)._task, commits(storage)
        stopping = asyncio.create_task(manager.stop())
        await until(lambda: commits(storage) > before)
        clock.advance(9)
        with pytest.raises(UnavailableError, match="no progress"):
            await stopping
        if hanging == "aclose":
            storage.hang("aclose")
        task.cancel()
        await asyncio.wait({task})
        assert "aclose" in storage.calls
        assert (memory.places["test"].session is None) == (hanging != "aclose")
        storage.resume()

    def test_a_commit_left_in_a_closed_loop_is_put_back_once(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
    ) -> None:
        """What is left of the task may be collected at any time, in any thread, and does nothing then."""
        manager = Manager(Config(name="test", flush_interval=None), storage, clock=clock)

        async def begin() -> asyncio.Task[None]:
            await manager.start()
            await manager.set("a", 1)
            storage.hang("commit")
            waiting = asyncio.create_task(manager.flush())
            await until(lambda: commits(storage) == 1)
            return waiting

        first = asyncio.new_event_loop()
        waiting = first.run_until_complete(begin())
        first.close()
        flusher = flusher_of(manager)
        left = flusher._task
        asyncio.run(manager.stop())
        for task in (left, waiting):
            coroutine = task.get_coro()
            assert coroutine is not None
            coroutine.close()
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        assert flusher.state.taken == flusher.state.revision == 1
        assert (commits(storage), memory.places["test"].session) == (2, None)

    def test_stop_on_another_loop(self, memory: MemoryStorage) -> None:
        """Where the loop of start() is open, it is refused and nothing happens; where it is closed, stop() still flushes."""
        manager = Manager(Config(name="test", flush_interval=None), memory)

        async def begin() -> None:
            await manager.start()
            await manager.set("a", 1)

        first = asyncio.new_event_loop()
        first.run_until_complete(begin())
        for call in (manager.stop, manager.flush, manager.wait_durable, lambda: manager.set("b", 2)):
            with pytest.raises(RuntimeError, match="belongs to the event loop"):
                asyncio.run(call())
        assert manager.status().phase == "running"
        first.run_until_complete(asyncio.sleep(0))
        flusher_of(manager)._task.cancel()
        first.run_until_complete(asyncio.sleep(0))
        first.close()
        asyncio.run(manager.stop())
        assert memory.places["test"].session is None

        async def read() -> object:
            async with manager:
                return await manager.get_all()

        assert asyncio.run(read()) == {"a": 1}

    def test_stop_after_a_loop_that_was_closed_over_a_commit(
        self, storage: FaultyStorage, memory: MemoryStorage, clock: ManualClock
    ) -> None:
        """A commit that never came back, and was never cancelled, is made again."""
        manager = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        first = asyncio.new_event_loop()
        first.run_until_complete(manager.start())
        storage.hang("commit")
        first.run_until_complete(manager.set("a", 1))
        flushing = first.create_task(manager.flush())
        first.run_until_complete(until(lambda: commits(storage) == 1))
        first.close()
        asyncio.run(manager.stop())
        assert (manager.durable_revision, commits(storage)) == (1, 2)
        assert memory.places["test"].session is None
        assert not flushing.done()


class TestConfirm:
    """Whether this is still the writer: only a commit that began after the question tells."""

    async def test_a_commit_is_made_even_without_a_change(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """It commits an empty record, which a restart reads over."""
        async with running(storage, clock, None) as state:
            await state.set("a", 1)
            await state.flush()
            await flusher_of(state).confirm_ownership()
            assert commits(storage) == 2
            await state.flush()
            assert commits(storage) == 2
        async with running(storage, clock, None) as state:
            assert await state.get_all() == {"a": 1}
            assert state.revision == 1

    async def test_one_that_is_under_way_does_not_count(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """A commit that began before the question may have been before another writer came."""
        async with running(storage, clock, 0) as state:
            storage.hang("commit")
            setting = asyncio.create_task(state.set("a", 1))
            await until(lambda: commits(storage) == 1)
            confirming = asyncio.create_task(flusher_of(state).confirm_ownership())
            await idle()
            storage.resume()
            await setting
            await confirming
            assert commits(storage) == 2

    async def test_a_commit_without_changes_has_no_age(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """During a commit that contains no change, there is no unflushed change, so its age is 0."""
        async with running(storage, clock, 0) as state:
            await state.set("a", 1)
            clock.advance(1000)
            storage.hang("commit")
            confirming = asyncio.create_task(flusher_of(state).confirm_ownership())
            await until(lambda: commits(storage) == 2)
            assert (state.status().unflushed_keys, state.status().unflushed_age) == (0, 0.0)
            storage.resume()
            await confirming

    @pytest.mark.parametrize("interval", [None, 0, 1.0])
    async def test_a_failure_is_told(self, storage: FaultyStorage, clock: ManualClock, interval: float | None) -> None:
        """A caller that asked is told that the commit failed, and may ask again."""
        async with running(storage, clock, interval) as state:
            storage.fail("commit")
            with pytest.raises(UnavailableError):
                await flusher_of(state).confirm_ownership()
            clock.advance(1)
            await flusher_of(state).confirm_ownership()
            assert not flusher_of(state).fenced

    async def test_it_is_asked_too_late(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """After the stop there is no commit to wait for, and the question is refused."""
        async with running(storage, clock, None) as state:
            flusher = flusher_of(state)
        with pytest.raises(UnavailableError, match=r"the flush task of .* has ended"):
            await flusher.confirm_ownership()

    async def test_it_is_asked_while_commits_fail(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """Without a background flush too, the commit is made when the pause after the failed one is over."""
        async with running(storage, clock, None) as state:
            await state.set("a", 1)
            storage.fail("commit")
            with pytest.raises(UnavailableError):
                await state.flush()
            confirming = asyncio.create_task(flusher_of(state).confirm_ownership())
            await idle()
            assert (commits(storage), confirming.done()) == (1, False)
            clock.advance(0.1)
            await confirming
            assert commits(storage) == 2

    async def test_somebody_else_owns_it(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """A fenced writer is told so, now, later and by stop()."""
        with pytest.raises(FencedError, match="all its changes are durable: none is lost"):
            async with running(storage, clock, None) as state:
                storage.fail("commit", error=FencedError("a newer writer"), times=2)
                for _ in range(2):
                    with pytest.raises(FencedError):
                        await flusher_of(state).confirm_ownership()
                assert flusher_of(state).fenced
