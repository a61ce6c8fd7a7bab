"""The map in memory: entries, unflushed changes, revisions. Pure and synchronous.

Theory of operation. `entries` maps keys to stored values. A scalar is stored as it
is; everything else as its JSON, so that no caller's object is ever shared. `changes`
holds what was changed since the last commit took the changes away, key to stored value
or `Absent.DELETED`; `cleared` says that everything older was deleted first. A commit
takes the changes by swapping in an empty dict (`take`); a commit that failed puts them
back under what came since (`put_back`).

A snapshot needs a view that stands still while writers go on. `freeze` gives the
dict itself as that view and puts an `Overlay` over it that takes the writes; `fold`
brings them home in small steps afterwards. So neither step costs what the size of
the state costs. Whoever reads or writes `entries` cannot tell the two apart.

A value that expires is in `entries` until a sweep finds it, so whoever reads one asks
`alive`; `count` and `names` leave out what is due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeAlias, cast

from lab_state._entries import DELETED, EXPIRED, MISSING, Absent, ChangeSet, Expiring, Stored, StoredOrGone, Value
from lab_state._expiry import Expiries

OnChange: TypeAlias = Callable[[str | None, StoredOrGone, int], None]
"""Is told a key, what became of it, and the revision; `None` when everything was deleted at once."""

WATCHED_CLEAR = 10_000
"""Up to so many keys are deleted one by one, where someone watches, instead of all at once."""


class Readable(Protocol):
    """What can lie beneath a layer."""

    def __getitem__(self, key: str, /) -> Stored: ...
    def __contains__(self, key: object, /) -> bool: ...
    def __len__(self) -> int: ...
    def items(self) -> Iterable[tuple[str, Stored]]: ...


class Layer:
    """Takes the writes, in `top`, while the map beneath, `base`, stays as it is."""

    __slots__ = ("base", "top")

    def __init__(self, base: Readable, top: dict[str, StoredOrGone]) -> None:
        self.base: Readable = base
        self.top: dict[str, StoredOrGone] = top

    def __getitem__(self, key: str) -> Stored:
        value = self.top.get(key, MISSING)
        if value is MISSING:
            return self.base[key]
        if isinstance(value, Absent):
            raise KeyError(key)
        return value

    def __len__(self) -> int:
        raise NotImplementedError

    def __contains__(self, key: object) -> bool:
        value = self.top.get(key, MISSING)  # type: ignore[call-overload]  # any object may be looked up
        return key in self.base if value is MISSING else value is not DELETED

    def __iter__(self) -> Iterator[str]:
        return (key for key, _ in self.items())

    def items(self) -> Iterator[tuple[str, Stored]]:
        for key, stored in self.base.items():
            if key not in self.top:
                yield key, stored
        for key, value in self.top.items():
            if not isinstance(value, Absent):
                yield key, value

    def __setitem__(self, key: str, stored: Stored) -> None:
        self.top[key] = stored

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self.top[key] = DELETED


class Overlay(Layer):
    """A layer over a view that is folded into it in the end."""

    __slots__ = ("_left", "_size", "view")

    def __init__(self, view: dict[str, Stored]) -> None:
        super().__init__(view, {})
        self.view: dict[str, Stored] = view
        self._size = len(view)
        self._left: int | None = None

    def __len__(self) -> int:
        return self._size

    def __setitem__(self, key: str, stored: Stored) -> None:
        if key not in self:
            self._size += 1
        self.top[key] = stored

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._size -= 1

    def fold(self, most: int) -> bool:
        """Move up to `most` writes into the view, or as many as keep ahead of new ones; False once none is left."""
        came = 0 if self._left is None else len(self.top) - self._left
        for _ in range(min(max(most, 2 * came), len(self.top))):
            key, value = self.top.popitem()
            if isinstance(value, Absent):
                self.view.pop(key, None)
            else:
                self.view[key] = value
        self._left = len(self.top)
        return bool(self.top)


class State:
    """The map of one manager.

    Attributes:
        entries: Key to stored value. `clear`, `freeze` and `fold` put another object
            in its place, so ask for it each time.
        changes: What changed since the last `take`.
        cleared: Whether everything older than `changes` was deleted first.
        revision: The number of the last change.
        taken: The revision up to which changes were taken.
        since: When the oldest change that was not taken was made, in seconds of
            `monotonic`.
        deleted: How many keys were deleted, since the state was loaded.
        swept: How many had expired.
        expiries: Finds the keys that are due.
        monotonic: The clock that is never set.
        on_change: Called after each change, where someone watches; `set` of `Calls` does so itself.
        on_first_change: Called before the first change that was not taken, where that is of
            interest.
        free: Called with a map that nobody needs any more, and that may be large.
        borrowed: Whether entries may be views that keep the buffer alive that they
            were loaded from.
    """

    __slots__ = (
        "_epoch",
        "_first",
        "_more",
        "_wall_clock",
        "borrowed",
        "changes",
        "cleared",
        "deleted",
        "entries",
        "expiries",
        "free",
        "monotonic",
        "on_change",
        "on_first_change",
        "revision",
        "since",
        "swept",
        "taken",
    )

    def __init__(
        self, monotonic: Callable[[], float], start: float = 0.0, wall_clock: Callable[[], float] = float
    ) -> None:
        """Nothing in it; the time is `start`, and the wall clock beside it shows its own, in seconds since 1970."""
        self.monotonic: Callable[[], float] = monotonic
        self._wall_clock = wall_clock
        self._epoch = start - monotonic()
        self.on_change: OnChange | None = None
        self.on_first_change: Callable[[], object] | None = None
        self.free: Callable[[dict[Any, Any]], object] = len
        self.load({}, 0)

    def load(self, entries: dict[str, Stored], revision: int, expires: Mapping[str, int] | None = None) -> None:
        """Begin with these values, all of them taken; `expires` has times in milliseconds."""
        self.entries: dict[str, Stored] | Layer = entries
        self.borrowed: bool = bool(entries)
        self.changes: dict[str, StoredOrGone] = {}
        self.cleared: bool = False
        self.revision: int = revision
        self.taken: int = revision
        self.since: float = self.monotonic()
        self.deleted: int = 0
        self.swept: int = 0
        self._first = revision
        self._more = 0
        self.expiries: Expiries = Expiries(0 if expires else self.now())  # what is overdue keeps its second
        for key, at in (expires or {}).items():
            entries[key] = Expiring(cast("Value", entries[key]), at)
            self.expiries.add(key, at)

    @property
    def stored(self) -> int:
        """How many values were stored since the state was loaded: one for each `set`, and so not counted there."""
        return self.revision - self._first + self._more

    # Time

    def now(self) -> int:
        """Milliseconds since 1970: the wall clock at the start, and what has passed since."""
        return int((self._epoch + self.monotonic()) * 1000)

    def wall(self) -> int:
        """Milliseconds since 1970, as the wall clock has it now; for the next start to count from."""
        return int(self._wall_clock() * 1000)

    def alive(self, expiring: Expiring) -> Value | Literal[Absent.MISSING]:
        """The value, if its time has not come."""
        return expiring.value if expiring.at > self.now() else MISSING

    def has(self, key: str) -> bool:
        """Whether a key is there."""
        if key not in self.entries:
            return False
        return not self.expiries or self._lives(key)

    def _lives(self, key: str) -> bool:
        stored = self.entries[key]
        return not isinstance(stored, Expiring) or self.alive(stored) is not MISSING

    def count(self) -> int:
        """How many keys there are. Costs what the number of keys costs that expire in this very second, at most."""
        return len(self.entries) - (self.expiries.due(self.now()) if self.expiries else 0)

    def names(self, prefix: str) -> list[str]:
        """The keys that begin with it."""
        if self.expires:
            now = self.now()
            return [
                key
                for key, stored in self.entries.items()
                if key.startswith(prefix) and not (isinstance(stored, Expiring) and stored.at <= now)
            ]
        if prefix:
            return [key for key in self.entries if key.startswith(prefix)]
        return list(self.entries)

    @property
    def expires(self) -> bool:
        """Whether anything does."""
        return bool(self.expiries)

    def sweep(self, most: int) -> int:
        """Take away keys whose time is over, as one change; returns how many were looked at, up to `most`."""
        now, entries = self.now(), self.entries
        keys = self.expiries.take(now, most)
        found = [key for key in keys if is_due(entries, key, now)]  # whatever the index says
        self._drop(found, EXPIRED)
        self.deleted -= len(found)
        self.swept += len(found)
        return len(keys)

    # Changes

    def before_change(self) -> None:
        """Before a change: note the time, if it is the first that was not taken."""
        if self.revision == self.taken:
            self.since = self.monotonic()
            if self.on_first_change is not None:
                self.on_first_change()

    def set(self, key: str, stored: Stored) -> int:
        """Store one value; returns the new revision."""
        return self.apply({key: stored}, cleared=False)

    def keep_decoded(self, key: str, stored: Stored, same: Value) -> None:
        """Keep a stored value in another form, which is no change."""
        # An overlay would take it for a write; one that expires is kept within.
        if self.entries.__class__ is dict and self.entries[key] is stored:
            self.entries[key] = same

    def set_many(self, values: Mapping[str, Value]) -> int:
        """Store all of them, which do not expire, as one change; returns the new revision."""
        entries = self.entries
        if not isinstance(entries, dict) or self.on_change is not None:
            return self.apply(values, cleared=False)
        self.before_change()
        self.revision += 1
        if self.expiries:
            for key in values:
                self.expiries.discard(key)
        entries.update(values)
        self.changes.update(values)
        self._more += len(values) - 1
        return self.revision

    def delete_many(self, keys: Iterable[str]) -> int:
        """Delete those of them that are there, as one change; returns how many."""
        found = {key for key in keys if self.has(key)}
        self._drop(found, DELETED)
        return len(found)

    def _drop(self, keys: Iterable[str], how: Literal[Absent.DELETED, Absent.EXPIRED]) -> None:
        if keys:
            self.apply(dict.fromkeys(keys, how), cleared=False)

    def clear(self) -> int:
        """Delete everything; returns how many. Costs the same for any size."""
        count = self.count()
        if len(self.entries):
            self.apply({}, cleared=True)
        return count

    def apply(self, changes: Mapping[str, StoredOrGone], *, cleared: bool) -> int:
        """Make all of them as one change, on an empty map if `cleared`; returns the new revision.

        What is deleted must be there.
        """
        if cleared and self.on_change is not None and len(self.entries) <= WATCHED_CLEAR:
            changes, cleared = {**dict.fromkeys(self.entries, DELETED), **changes}, False
        self.before_change()
        self.revision += 1
        if cleared:
            self.deleted += len(self.entries)
            self._empty()
        absent = 0
        entries, mine, expiries = self.entries, self.changes, self.expiries
        for key, stored in changes.items():
            if isinstance(stored, Absent):
                del entries[key]
                expiries.discard(key)
                absent += 1
            else:
                if isinstance(stored, Expiring):
                    expiries.add(key, stored.at)
                elif key in expiries:
                    expiries.discard(key)
                entries[key] = stored
            mine[key] = stored
        self.deleted += absent
        self._more += len(changes) - absent - 1
        if self.on_change is not None:
            if cleared:
                self.on_change(None, DELETED, self.revision)
            for key, stored in changes.items():
                self.on_change(key, stored, self.revision)
        return self.revision

    def _empty(self) -> None:
        entries, changes = self.entries, self.changes
        self.entries, self.changes = {}, {}
        for unneeded in (changes, *self.expiries.clear()):
            self.free(unneeded)
        self.free(entries if isinstance(entries, dict) else entries.top)  # a view is somebody's
        self.cleared = True

    def untaken(self) -> ChangeSet:
        """Return the changes that `take` would take away."""
        time, wall = (self.now(), self.wall()) if self.expiries else (0, 0)
        return ChangeSet(self.taken, self.revision, self.cleared, self.changes, self.since, time, wall)

    def take(self, taken: ChangeSet | None = None) -> ChangeSet:
        """Take the changes away for a commit.

        Args:
            taken: What `untaken` has just returned, for a caller that keeps it: whatever
                interrupts this, `put_back` of it loses nothing.
        """
        if taken is None:
            taken = self.untaken()
        self.cleared = False  # before the changes go: `put_back` drops what is older than a clear
        self.changes, self.taken = {}, self.revision
        return taken

    def put_back(self, taken: ChangeSet) -> None:
        """Put back the changes of a failed commit, under newer ones. A second call changes nothing."""
        if not self.cleared:
            older, newer = taken.changes, self.changes
            if len(newer) <= len(older):  # the smaller one moves
                older.update(newer)
                self.changes = older
            else:
                for key, changed in older.items():
                    newer.setdefault(key, changed)
            self.cleared = taken.cleared
        self.taken, self.since = taken.start, taken.since

    def freeze(self) -> dict[str, Stored]:
        """A view of the entries that stands still until `fold` was called with it.

        One view is free; another one at the same time is a copy, which costs what the
        size of the state costs. That happens when a sync fails while a checkpoint runs.
        """
        if isinstance(self.entries, Overlay):
            return dict(self.entries.items())
        view = self.entries
        assert isinstance(view, dict)  # a draft is never frozen
        self.entries = Overlay(view)
        return view

    @property
    def frozen(self) -> bool:
        """Whether a view stands still, so that another one would be a copy."""
        return isinstance(self.entries, Overlay)

    def owned(self, view: dict[str, Stored]) -> None:
        """Every value of a view was replaced by one of its own; note it, if that is the view that comes home."""
        if isinstance(self.entries, Overlay) and self.entries.view is view:
            self.borrowed = False

    def fold(self, view: dict[str, Stored], most: int) -> bool:
        """Give a view back, about `most` writes at a time; False once that is done."""
        entries = self.entries
        if isinstance(entries, Overlay) and entries.view is view:
            if entries.fold(most):
                return True
            self.entries = view
        return False


def is_due(entries: dict[str, Stored] | Layer, key: str, now: int) -> bool:
    """Whether the entry of a key has expired."""
    if key not in entries:
        return False
    stored = entries[key]
    return isinstance(stored, Expiring) and stored.at <= now
