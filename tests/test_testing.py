"""The helpers for other people's tests."""

from __future__ import annotations

import pytest

from lab_state import Config, FileStorage, Manager, MemoryStorage, UnavailableError
from lab_state.testing import FaultyStorage, ManualClock


def test_a_manual_clock_calls_what_falls_due_in_order() -> None:
    """Both clocks move together; a cancelled timer is not called; what is due later waits."""
    clock, seen = ManualClock(time=100.0), list[tuple[str, float, float]]()
    for name, delay in (("second", 2.0), ("first", 1.0), ("cancelled", 1.5), ("late", 9.0)):
        timer = clock.call_later(delay, lambda name=name: seen.append((name, clock.monotonic(), clock.time())))  # type: ignore[misc]
        if name == "cancelled":
            timer.cancel()
    clock.advance(3.0)
    assert seen == [("first", 1.0, 101.0), ("second", 2.0, 102.0)]
    assert (clock.monotonic(), clock.time()) == (3.0, 103.0)


def test_a_manual_clock_jumps_but_does_not_go_back() -> None:
    """The wall clock may be set; the monotonic one only advances."""
    clock = ManualClock(time=100.0)
    clock.jump(-50)
    assert (clock.monotonic(), clock.time()) == (0.0, 50.0)
    with pytest.raises(ValueError, match=r"use jump\(\)"):
        clock.advance(-1)


@pytest.mark.parametrize(
    ("arguments", "times"), [(("comit",), 1), (("commit", "befor"), 1), (("commit", "after"), 0), (("commit", ""), 1)]
)
def test_a_fault_that_would_never_come_is_refused(arguments: tuple[str, ...], times: int) -> None:
    """A test with a misspelt fault would prove nothing."""
    with pytest.raises(ValueError, match=r"no operation|once or more"):
        FaultyStorage(MemoryStorage()).fail(*arguments, times=times)  # type: ignore[arg-type]


def test_a_hang_that_would_never_come_is_refused() -> None:
    """Likewise."""
    with pytest.raises(ValueError, match="no operation 'comit'"):
        FaultyStorage(MemoryStorage()).hang("comit")  # type: ignore[arg-type]


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_an_open_that_fails_leaves_nothing_open(moment: str) -> None:
    """Also when the inner storage did open."""
    storage = FaultyStorage(MemoryStorage())
    storage.fail("open", moment)  # type: ignore[arg-type]
    manager = Manager("test", storage)
    with pytest.raises(UnavailableError, match="open failed on demand"):
        await manager.start()
    async with manager:
        pass


async def test_a_close_that_fails_has_let_go() -> None:
    """Whatever moment was asked for, as every storage must."""
    storage = FaultyStorage(MemoryStorage())
    storage.fail("aclose", "before")
    for _ in range(2):
        async with Manager("test", storage):
            pass


def test_what_is_no_argument_is_refused_at_once() -> None:
    """A storage, a config or a directory of the wrong kind is a clear error where it is given."""
    with pytest.raises(TypeError, match="config must be a Config or a str"):
        Manager(5, MemoryStorage())  # type: ignore[arg-type]
    for storage in ("state", MemoryStorage, None):
        with pytest.raises(TypeError, match="storage must be an object"):
            Manager(Config(name="x"), storage)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NUL"):
        FileStorage("a\0b")
    assert repr(FileStorage("state")) == "FileStorage('state')"
