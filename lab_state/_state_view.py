"""`read_state`: a state at one moment, without its lock."""

from __future__ import annotations

from lab_state._clock import Clock, SystemClock
from lab_state._core import Core
from lab_state._expiry import resumed
from lab_state._loading import Loaded, load
from lab_state._reads import Reads
from lab_state._state import State
from lab_state.config import Config
from lab_state.storage._protocol import Storage


class StateView(Reads):
    """A state as it was at one moment: a copy in memory that never changes.

    `read_state` makes it. It has the reading calls of a manager; none of them waits. Time
    stands still in it too: what had expired at that moment is not there, what had not yet
    expired stays, and `expires_in` counts from that moment.

    Attributes:
        revision: The number of the last change in it.
        durable_revision: Every change up to this one is durable for certain. It is lower
            than `revision` where the last record may still be lost: the writer may be about
            to sync it, or have ended without that. The next start, or the next
            record, settles it.
        wall: What the writer's wall clock showed at the last change, in seconds since 1970;
            `None` where that is not recorded. It is recorded as long as a key expires.
        live: Whether a writer has the state open; `None` where that cannot be told.
    """

    __slots__ = ("_path", "durable_revision", "live", "revision", "wall")

    def __init__(self, name: str, loaded: Loaded, now: float) -> None:
        """Make the view for `read_state`. `now` is the time of the wall clock, in seconds since 1970."""
        found = loaded.state
        time = resumed(found.time, found.wall, now)[0] if found.expires else now
        due = {key for key, at in found.expires.items() if at <= time * 1000}
        for key in due:
            del found.entries[key]
        state = State(start=time)
        expires = {key: at for key, at in found.expires.items() if key not in due}
        state.load(found.entries, found.revision, expires)
        self._path = loaded.path
        self.revision: int = found.revision
        self.durable_revision: int = loaded.durable_revision
        self.wall: float | None = found.wall / 1000 if found.expires and found.wall else None
        self.live: bool | None = loaded.live
        super().__init__(_Still(name, state), "")

    def __repr__(self) -> str:
        """Name the place where it was read, and its revision."""
        return f"<StateView of {self._path} at revision {self.revision}>"


class _Still(Core):
    """The part of a manager's core that reading calls need, for a state that never changes."""

    __slots__ = ()

    def check_open(self) -> None:
        """Do nothing: a view is always open."""


async def read_state(name: str, storage: Storage, *, clock: Clock | None = None) -> StateView:
    """Read a state, whether a manager is running on it or not.

    It takes no lock and writes nothing. A manager that starts, runs or stops meanwhile
    notices nothing. The only permission needed is to read the files, so this works on a
    read-only mount. The result is the state at one moment between call and return. All its
    keys are of the same moment, and everything that was durable at the call is in it.
    Changes that a manager holds in memory and has not flushed are not in it.

    The files are read in the storage's own threads, in a time that grows with the state.
    Decoding holds up the event loop as `start()` does, about 0.8 s for a million keys. A
    caller that is cancelled leaves nothing open. Each call reads everything anew.

    Args:
        name: The name of the state.
        storage: Where it is.
        clock: For tests; the machine's own when not given.

    Returns:
        The state.

    Raises:
        InvalidNameError: The name is out of bounds.
        UnsupportedError: There is no state of this name: check the name and the storage. Or it
            cannot be read as it is: permissions, a newer format.
        CorruptionError: What is stored is damaged; `start()` would refuse it as well.
        UnavailableError: It could not be read this time: read it again.
        TypeError: That is no storage, or one without the method `read`.
    """
    name = Config(name=name).name
    loaded = await load(name, storage)
    return StateView(name, loaded, (clock or SystemClock()).time())
