"""`read_state` and `StateView`: a state at one moment, read without its lock."""

from __future__ import annotations

from datetime import datetime

from lab_state._argument_types import check_clock
from lab_state._clock import Clock, SystemClock
from lab_state._core import CallCore
from lab_state._expiry import resumed
from lab_state._loading import Decoded, load
from lab_state._metrics import Counters
from lab_state._past import check_at, load_at, with_remedy
from lab_state._reads import Reads
from lab_state._state import State
from lab_state.config import Config
from lab_state.exceptions import CorruptionError
from lab_state.storage._protocol import Storage


class StateView(Reads):
    """A state as it was at one moment: a copy in memory that never changes.

    `read_state` makes a view. A view has the reading calls of a manager. The time of a view does not advance.
    It is the time of the state at the call of `read_state`, or at the moment `at`. With a revision as `at`, it is calculated
    for `wall`. If the wall clock was set, the time of the state can differ from the wall clock; see "Which clock" on the page "Expiry".
    Keys that had expired by then are not in the view. All other keys stay in the view. `expires_in` counts from the time of the view.

    Attributes:
        revision: The number of the last change that the view contains.
        durable_revision: Every change up to this revision is certainly durable. On disk, a reader cannot
            see whether the last record is synced. So the changes of that record are not counted, even after `flush()` has
            returned, until the writer writes the next record or stops. After a kill, the next start shows whether the record is lost.
        wall: The time of the writer's wall clock at the last commit or checkpoint that the view contains, in
            seconds since 1970. The last change may be older. `None` if no time is recorded, as in a file of another program.
        schema: The version of the schema of the values; see `Schema`. It is 1 if none is recorded.
        readable_by: The oldest version of the schema whose code can read the values; see `Schema`.
        live: Whether a writer has the state open; `None` if that is unknown.
    """

    __slots__ = ("_path", "durable_revision", "live", "readable_by", "revision", "schema", "wall")

    def __init__(self, name: str, loaded: Decoded, now: float) -> None:
        """Make the view for `read_state`. `now` is the wall clock's time at which the state is shown, in seconds since 1970."""
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
        self.wall: float | None = found.wall / 1000 if found.wall else None
        self.live: bool | None = loaded.live
        self.schema: int
        self.readable_by: int
        self.schema, self.readable_by = found.versions
        super().__init__(_Still(name, state, Counters()), "")

    def __repr__(self) -> str:
        """Return the place of the state in its storage, and the revision."""
        return f"<StateView of {self._path} at revision {self.revision}>"


class _Still(CallCore):
    """The core of a state that never changes, for the reading calls."""

    __slots__ = ()

    def check_open(self) -> None:
        """Do nothing: a view is always open."""


async def read_state(
    name: str, storage: Storage, *, at: int | datetime | None = None, clock: Clock | None = None
) -> StateView:
    """Read a state as it is now, or as it was at an earlier moment. A manager may be running on it.

    The call takes no lock and writes nothing. It does not disturb a manager that starts, runs
    or stops meanwhile. It needs only the permission to read, so it works on a
    read-only mount. Without `at`, the result is the state at one moment between call and return. It contains
    every change that was durable when the call began, and only changes that the writer has written.

    `FileStorage` reads the files in its threads. The time of a call grows with the size of
    the state. Decoding blocks the event loop, as in `start()`: about 0.8 s for a million keys. If
    the caller is cancelled, nothing stays open. Each call reads everything again.

    With `at`, the call reads the generation that has this moment. If several generations have the same revision, it reads
    the newest one that can be read. The view shows the state as it was: keys that have expired since are in it. Earlier
    generations are there if the `FileStorage` or `S3Storage` was told to keep a history. Without one, the moments since the
    last checkpoint can be read. The changes of one commit cannot be read separately. So `revision` of the view may be
    lower than `at`.

    Args:
        name: The name of the state.
        storage: The storage that contains it.
        at: The moment. A revision gives the state after the last record that ends at or below this revision. An aware
            `datetime` gives the state after the newest record whose time, by the clock of the writer, is at or before it. If
            that clock was set back within a generation, the times of the first and the last record of the generation
            decide which generation is read. `None` gives the present state.
        clock: A clock for tests. By default it is the clock of the machine.

    Returns:
        A view of the state.

    Raises:
        InvalidNameError: The name is not allowed; see `Config.name`.
        UnsupportedError: There is no state of this name: check the name and the storage. Or the
            state cannot be read as it is: you may not read its files, or a newer version of lab_state wrote it. Or `at` was
            given, and the storage is neither a `FileStorage` nor an `S3Storage`.
        CorruptionError: Without `at`, the stored state is damaged, and `start()` would refuse it as well. The message names
            the newest good generation, if there is one. With `at`, each generation that has the moment is damaged: pass
            another moment.
        UnavailableError: The state could not be read this time, or it changed during each of ten attempts to read it: call
            `read_state` again.
        ValueError: `at` is a `datetime` without a time zone. Or the moment is outside of the history, in a hole of it, or
            in the future. For a moment that cannot be read, the message names the first and the last moment that can be
            read, or the moments before and after the hole: pass one of these.
        TypeError: `storage` is not a storage, or has no method `read`. Or the name is not a `str`, or `at` is
            neither an `int` nor a `datetime`, or `clock` is not a clock.
    """
    name = Config(name=name).name
    check_clock(clock)
    now = (SystemClock() if clock is None else clock).time()
    if at is None:
        try:
            return StateView(name, await load(name, storage), now)
        except CorruptionError as error:
            raise await with_remedy(error, name, storage) from error.__cause__
    at = check_at(at)
    loaded = await load_at(name, storage, at, now)
    # The view shows the state at the moment `at`. So its time is calculated from the wall clock at `at`, not from the present.
    then = at.timestamp() if isinstance(at, datetime) else loaded.state.wall / 1000
    return StateView(name, loaded, then)
