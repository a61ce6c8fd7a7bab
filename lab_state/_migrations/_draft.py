"""`MigrationDraft`: the calls of a migration. Its changes are in a draft until all migrations have succeeded."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar, cast, final
from weakref import ref

from lab_state._arguments import check_key
from lab_state._calls import Calls, at_once
from lab_state._core import CallCore
from lab_state._draft import Draft
from lab_state._entries import DELETED, Absent, Expiring, Stored, StoredOrGone, Value
from lab_state._metrics import Counters
from lab_state._order import Chunk, in_range
from lab_state._periods import Seconds
from lab_state._plain import Plain
from lab_state._state import State
from lab_state._undo import UndoView
from lab_state._values import encode_plain
from lab_state.exceptions import InvalidKeyError, InvalidValueError, KeyNotFoundError

R = TypeVar("R")


class StateDraft(Draft):
    """A draft over a loaded state, whose `entries` are a dict. Reads of many keys take less time than in other drafts.

    Attributes:
        added: The new keys. They are used only until a call other than `MigrationDraft.set` changes the draft, or a
            value gets an expiry.
    """

    __slots__ = ("added",)

    def __init__(self, base: State) -> None:
        super().__init__(base)
        self.added: list[str] = []

    @property
    def beneath(self) -> dict[str, Stored]:
        """The entries of the loaded state; none if they were deleted."""
        return {} if self.cleared else cast("dict[str, Stored]", self.base.entries)

    def all_changes(self) -> dict[str, StoredOrGone]:
        """Return `changes`. If all keys were deleted, which `changes` does not have, add the deletion of each other key."""
        return {**dict.fromkeys(self.base.entries, DELETED), **self.changes} if self.cleared else self.changes

    def view(self) -> UndoView[Stored]:
        """Open a view of the draft; see `Draft.view`. Deleted keys are in its map, but in no page."""
        view = _DraftView(self.beneath, cast("dict[str, Stored]", dict(self.changes)))
        self.views.append(ref(view))
        return view

    def merge(self) -> int | None:
        """Apply all changes to the base, as `Draft.merge` does.

        If values were only set, the base keeps the dict of the changes, and makes no copy.
        """
        if self._only_values and not self.base.changes:
            self.base.changes = self.changes  # updating a dict with itself takes no time
        return super().merge()

    def pieces(self, low: str, high: str | None) -> list[Chunk]:
        """Return the keys in a range; see `State.pieces`."""
        if self._only_values and not in_range(self.added, low, high):
            return self.base.pieces(low, high)
        return super().pieces(low, high)

    def page(self, low: str, high: str | None, limit: int | None = None, *, reverse: bool = False) -> list[str]:
        """Return the first keys in a range; see `State.page`."""
        changes, beneath = self.changes, self.beneath
        mine = in_range(self.added if self._only_values else changes, low, high)
        gone = set[str]() if self._only_values else {key for key in mine if isinstance(changes[key], Absent)}
        found = [] if self.cleared else self.base.page(low, high, reverse=reverse)
        if gone:
            found = [key for key in found if key not in gone]
        if new := [key for key in mine if key not in beneath and key not in gone]:
            found += new
            found.sort(reverse=reverse)
        return found[:limit]


class _DraftView(UndoView[Stored]):
    """A view of a draft. Each of its pages is read once."""

    __slots__ = ("_beneath", "_changes")

    def __init__(self, beneath: dict[str, Stored], changes: dict[str, Stored]) -> None:
        """Begin a view. The view removes items from the dict of the changes. The entries beneath do not change."""
        super().__init__(None, changes or beneath)
        self._beneath = beneath
        self._changes = changes

    def values(self, keys: Sequence[str]) -> Sequence[Stored]:
        """Return the values of keys.

        If all keys have changed, drop their changes, because the migration is about to replace them. In most pages, all
        keys have changed, or none.
        """
        changes, beneath = self._changes, self._beneath
        try:
            found = super().values(keys)
        except KeyError:
            return [changes[key] if key in changes else beneath[key] for key in keys]
        if changes:
            for key in keys:
                del changes[key]
        return found

    def close(self) -> None:
        """Drop all values; see `UndoView.close`."""
        super().close()
        self._beneath, self._changes = {}, {}


class MigrationCore(CallCore):
    """The core of the calls of one migration.

    Attributes:
        refused: The key whose value was refused last; `None` if no value was refused.
        refusal: The error that was raised for this value.
        changes: The changes of the draft; an empty dict after the end of the migration.
        beneath: The entries of the loaded state; an empty dict after the end of the migration.
        is_timed: Whether a key of the loaded state expires.
    """

    __slots__ = ("_is_over", "beneath", "changes", "is_timed", "refusal", "refused")

    state: StateDraft  # pyright: ignore[reportIncompatibleVariableOverride] -- the migration never replaces it by another kind

    def __init__(self, name: str, draft: StateDraft) -> None:
        super().__init__(name, draft, Counters())
        self.refused: str | None = None
        self.refusal: InvalidValueError | None = None
        self.changes: dict[str, StoredOrGone] = draft.changes
        self.beneath: dict[str, Stored] = draft.beneath
        self.is_timed: bool = draft.base.expires
        self._is_over = False

    def check_open(self) -> None:
        """Check that the migration runs.

        Raises:
            RuntimeError: The migration has ended.
        """
        if self._is_over:
            raise RuntimeError("this migration is over: use the draft only inside its function")

    def end(self) -> None:
        """Refuse later calls. A second call does nothing."""
        self.state.close_views()
        self.state = StateDraft(State())  # pyright: ignore[reportIncompatibleVariableOverride] -- it is always a `StateDraft`
        self._is_over = True
        self.changes, self.beneath, self.refusal = {}, {}, None


class _MigrationCalls(Calls):
    """The calls on the draft."""

    __slots__ = ()

    def _check_loop(self) -> None:
        """Check that the migration runs. There is no event loop to check."""
        self._check_open()


@final
class MigrationDraft(Plain):
    """The whole state during a migration, with the calls that read and change it, without `await`.

    It has the calls of a transaction, each with the same guarantees and errors. There are two differences: `set` and
    `set_many` keep the expiry of a key, unless they get a `ttl`. If `set_many` refuses a value, the values before it
    are stored. There is one more call: `move`. A call sees the changes of earlier migrations. Values are not checked
    against the types of the schema before all migrations have ended.

    To read a large state, iterate over `items`, which has few values in memory at once. The iterator shows the
    state as it was at its first step, so keys may be set and deleted in the loop.

    Raises:
        RuntimeError: Each call raises it after the end of the migration.
    """

    __slots__ = ("_core", "_prefix")

    _may_wait = False

    def __init__(self, core: MigrationCore, prefix: str = "") -> None:
        super().__init__(_MigrationCalls(core, prefix))
        self._core = core
        self._prefix = prefix

    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        return at_once(coroutine)

    def set(self, key: str, value: object, *, ttl: Seconds | None = None) -> None:
        """Store a value. Without a `ttl`, an existing key keeps its expiry, or stays without one.

        To remove the expiry of a key, use `touch(key, None)`. For the arguments and errors, see `Manager.set`.
        """
        core = self._core
        try:
            if ttl is not None:
                self._run(self._calls.set(key, value, ttl=ttl))
                return
            stored: Value = encode_plain(value)
            if stored.__class__ is bytes:
                # msgspec allocates up to half as much again as its result needs. The copy does not.
                stored = b"%b" % stored  # pyright: ignore[reportAssignmentType] -- it is still JSON
        except InvalidValueError as error:
            core.check_open()
            core.refused = refused = check_key(self._calls._full(key))  # noqa: SLF001 -- `MigrationDraft` and its `Calls` belong together
            core.refusal = InvalidValueError(f"the value of {refused!r}: {error.args[0]}", error.path)
            raise core.refusal from None
        full = self._prefix + key if key.__class__ is str else self._calls._full(key)  # noqa: SLF001 -- `MigrationDraft` and its `Calls` belong together
        changes, state = core.changes, core.state
        if full not in changes and full not in core.beneath:
            core.check_open()
            check_key(full)
            state.added.append(full)
        if core.is_timed or not state._only_values:  # noqa: SLF001 -- a property would take longer
            at = self._calls._expiry(key) if state.has(full) else None  # noqa: SLF001 -- `MigrationDraft` and its `Calls` belong together
            if at is not None:
                state.set(full, Expiring(stored, at))
                return
        changes[full] = stored  # as in `Transaction.set`; `State.apply` would take longer

    def set_many(self, values: Mapping[str, object], *, ttl: Seconds | None = None) -> None:
        """Store several values, one after the other; see `set`. After an error, the values before it are stored.

        Raises:
            TypeError: `values` is not a mapping.
        """
        self._core.check_open()
        if not isinstance(values, Mapping):
            raise TypeError(f"set_many() needs a mapping of keys to values, not {type(values).__name__}")
        for key, value in values.items():
            self.set(key, value, ttl=ttl)

    def move(self, old: str, new: str) -> None:
        """Move a value and its expiry to another key.

        Args:
            old: The key. It is missing afterwards.
            new: The new key. It must not exist.

        Raises:
            KeyNotFoundError: `old` is missing.
            InvalidKeyError: `new` exists already: two keys cannot become one. Or one of the keys is not allowed.
        """
        core, calls = self._core, self._calls
        core.check_open()
        source, target = (check_key(calls._full(key)) for key in (old, new))  # noqa: SLF001 -- `MigrationDraft` and its `Calls` belong together
        state = core.state
        if not state.has(source):
            raise KeyNotFoundError(old)
        if source == target:
            return
        if state.has(target):
            raise InvalidKeyError(
                f"the key {old!r} cannot move to {new!r}, which exists already: delete one of them first"
            )
        state.apply({target: state.entries[source], source: DELETED}, cleared=False)

    def namespace(self, name: str) -> MigrationDraft:
        """Return a handle of this draft for the keys that begin with `name` and a slash; see `Manager.namespace`."""
        self._core.check_open()
        return MigrationDraft(self._core, self._calls._nested(name))  # noqa: SLF001 -- `MigrationDraft` and its `Calls` belong together

    def __repr__(self) -> str:
        """Return the prefix, and the name of the state."""
        prefix = f"{self._prefix!r} of " if self._prefix else "of "
        return f"<MigrationDraft {prefix}{self._core.name!r}>"

    def __len__(self) -> int:
        """Return the number of keys, with the changes made so far. The cost grows with the number of these changes."""
        return len(self._calls)

    def __contains__(self, key: object) -> bool:
        """Return whether the key exists, with the changes made so far."""
        return key in self._calls
