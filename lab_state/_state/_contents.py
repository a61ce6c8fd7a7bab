"""The contents of a state, and their expiry. This module does no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, cast

from lab_state._entries import (
    FIRST_VERSIONS,
    MISSING,
    Absent,
    Expiring,
    Layer,
    Readable,
    Stored,
    StoredOrGone,
    Value,
    Versions,
)
from lab_state._expiry import Expiries
from lab_state._order import Index
from lab_state._undo import Views
from lab_state.shared._results import ResultTable

Keys: TypeAlias = set[str]

OnChanges: TypeAlias = Callable[[Sequence[str], Sequence[StoredOrGone], int], None]
"""A callback that gets keys, their new values in the same order, and the revision. The callee keeps both sequences."""

OnChange: TypeAlias = Callable[[str | None, StoredOrGone, int], None]
"""A callback that gets a key, its new value or `DELETED` or `EXPIRED`, and the revision.

The key is `None` if all keys were deleted and are not reported one by one, or if a copy shows another state.
"""


def no_clock() -> float:
    """Return 0.0. This is used in place of a clock if time must not pass, and in place of a callback without arguments."""
    return 0.0


def ignore(*_: object) -> None:
    """Do nothing. This is used in place of a callback with arguments."""


class Contents:
    """The contents of a state: its entries, changes, revisions and time. `State` has the calls that change them.

    Attributes:
        entries: Stored values by key. Many calls replace this object, such as `clear`, `freeze`, `switch` and `fold_staged`:
            read the attribute each time.
        changes: The keys that changed since the last `take`, each with its value, `DELETED` or `EXPIRED`.
        cleared: Whether all keys were deleted before `changes`.
        revision: The number of the last change.
        taken: The revision up to which changes were taken.
        since: The time of the oldest change that was not taken, in seconds of
            `monotonic`.
        deleted: The number of keys that were deleted since the state was loaded. Sweeps do not count.
        swept: The number of keys that were deleted by sweeps.
        epoch: The time of the state, in seconds since 1970, when `monotonic` is 0.
        expiries: The index of keys that expire.
        monotonic: The monotonic clock, in seconds.
        on_change: A callback for each key of a change, if there is a watch. `apply` and `Writing.set` call it. `switch` calls
            it only if all keys are deleted.
        on_changes: A callback for all keys of a change that `switch` makes, if there is a watch.
        on_staged: A callback after a change of many keys, which `fold_staged` has to merge.
        on_first_change: A callback before the first change after a `take`; `None` if there is none.
        index: The keys in order of code points; `None` until a call needs it. See `_order`.
        free: A callback that frees a map that is no longer needed, and may be large. Its second argument is
            optional: the number of items that one step frees.
        results: The results of calls of other processes; `None` if there has been none. The records of a shared state
            change this table. Each snapshot except a backup contains it.
        versions: The versions of the state. Each snapshot contains them, unless they are `FIRST_VERSIONS`.
        written_at: The time of the wall clock at the last write before the state was loaded, in milliseconds since 1970; 0 if
            it is not known. Only messages use it.
        versions_at: The revision of the change whose record has the versions. It is above `revision` until this change is made.
        borrowed: Whether values may be `Raw` objects that are parts of the buffer from which they were loaded. They keep the
            whole buffer in memory.
        views: The views that `items()` and `get_all()` read. If the list is not empty, `before_overwrite`
            has to be called before each change.
        on_views: A callback after each opening of such a view, and when no view is open any longer. It may also be called
            when nothing has changed.
    """

    has_steps: ClassVar[bool] = True
    """Whether calls with many keys may work in steps. It is False for a `Layered`, such as a draft."""

    __slots__ = (
        "_held",
        "_loaded_revision",
        "_stored_more",
        "_wall_clock",
        "borrowed",
        "changes",
        "cleared",
        "deleted",
        "entries",
        "epoch",
        "expiries",
        "free",
        "index",
        "monotonic",
        "on_change",
        "on_changes",
        "on_first_change",
        "on_staged",
        "on_views",
        "results",
        "revision",
        "since",
        "swept",
        "taken",
        "versions",
        "versions_at",
        "views",
        "written_at",
    )

    def __init__(
        self,
        monotonic: Callable[[], float] = no_clock,
        start: float = 0.0,
        wall_clock: Callable[[], float] = no_clock,
    ) -> None:
        """Make an empty state.

        Args:
            monotonic: The monotonic clock, in seconds. Without it, the time of the state does not advance.
            start: The time of the state now, in seconds since 1970.
            wall_clock: The wall clock, in seconds since 1970.
        """
        self.monotonic: Callable[[], float] = monotonic
        self._wall_clock = wall_clock
        self.epoch: float = start - monotonic()
        self.on_change: OnChange | None = None
        self.on_changes: OnChanges | None = None
        self.on_staged: Callable[[], object] = no_clock
        self.on_first_change: Callable[[], object] | None = None
        self.free: Callable[..., object] = ignore
        self.results: ResultTable | None = None
        self.versions: Versions = FIRST_VERSIONS
        self.versions_at: int = 0
        self.written_at: int = 0
        self.views: Views[Stored] = []
        self.on_views: Callable[[], object] = no_clock
        self._held: list[dict[Any, Any]] = []
        self.load({}, 0)

    def load(self, entries: dict[str, Stored], revision: int, expires: Mapping[str, int] | None = None) -> None:
        """Replace the contents by loaded ones. After this, there are no changes to take.

        `expires` has times in milliseconds since 1970.
        """
        self.entries: dict[str, Stored] | Layer = entries
        self.index: Index | None = None
        self.borrowed: bool = bool(entries)
        self.changes: dict[str, StoredOrGone] = {}
        self.cleared: bool = False
        self.revision: int = revision
        self.taken: int = revision
        self.since: float = self.monotonic()
        self.deleted: int = 0
        self.swept: int = 0
        self._loaded_revision = revision
        self._stored_more = 0  # see `stored`
        # With 0, a key that is already due goes into the bucket of its expiry, not into the bucket of the present second.
        self.expiries: Expiries = Expiries(0 if expires else self.now())
        for key, at in (expires or {}).items():
            entries[key] = Expiring(cast("Value", entries[key]), at)
            self.expiries.add(key, at)

    def load_from(self, other: Contents) -> None:
        """Replace the contents and the time by those of another state. `other` is not used after this."""
        self.load({}, other.revision)
        self.entries, self.expiries, self.borrowed = other.entries, other.expiries, other.borrowed
        self.epoch, self.results = other.epoch, other.results
        self.versions, self.versions_at, self.written_at = other.versions, other.versions_at, other.written_at

    @property
    def stored(self) -> int:
        """The number of values stored since the state was loaded.

        A `set` adds one to the revision, and stores one value. Every other change adds the number
        of its values, less one, to `_stored_more`. So the sum below is exact, and `set` does not
        have to count. A counter would make `set` 3 % slower: an increment took 52 ns, and a `set`
        1,560 ns, in the same process.
        """
        return self.revision - self._loaded_revision + self._stored_more

    @property
    def known(self) -> Readable:
        """The entries, for internal lookups. A draft that notes reads does not note these lookups."""
        return self.entries

    def note_listing(self, prefix: str) -> None:
        """Note that the application is about to read all keys with a prefix. Only some drafts need this."""

    # Time

    def now(self) -> int:
        """Return the time of the state, in milliseconds since 1970: its time at the start plus the time since then."""
        return int((self.epoch + self.monotonic()) * 1000)

    def wall(self) -> int:
        """Return the time of the wall clock, in milliseconds since 1970. Each commit and each snapshot records it."""
        return int(self._wall_clock() * 1000)

    def alive(self, expiring: Expiring) -> Value | Literal[Absent.MISSING]:
        """Return the value if it has not expired, and `MISSING` otherwise."""
        return expiring.value if expiring.at > self.now() else MISSING

    def has(self, key: str) -> bool:
        """Return whether a key exists, and has not expired."""
        if key not in self.entries:
            return False
        return not self.expiries or self._lives(key)

    def _lives(self, key: str) -> bool:
        stored = self.entries[key]
        return not isinstance(stored, Expiring) or self.alive(stored) is not MISSING

    def count(self) -> int:
        """Return the number of keys that have not expired. The cost depends on the number of keys that expire in this second."""
        return len(self.entries) - (self.due(self.now()) if self.expires else 0)

    def due(self, now: int) -> int:
        """Return the number of keys that have expired by `now`, and are not removed yet. `now` is in milliseconds since 1970."""
        return self.expiries.due(now)

    def due_keys(self, now: int) -> list[str]:
        """Return the keys that have expired by `now`, and are not removed yet, in no particular order; see `due`."""
        return self.expiries.due_keys(now)

    @property
    def expires(self) -> bool:
        """Whether any key expires."""
        return bool(self.expiries)


def is_due(entries: dict[str, Stored] | Layer, key: str, now: int) -> bool:
    """Return whether the entry of a key exists and has expired."""
    if key not in entries:
        return False
    stored = entries[key]
    return isinstance(stored, Expiring) and stored.at <= now
