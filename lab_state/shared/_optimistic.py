"""Transactions of a shared state. They hold no lock, and note what they have read.

A draft is a layer over the copy. Other calls change the copy meanwhile, and the draft notes the changed keys. All other
keys still have their values from the beginning of the draft. So a read returns the value of the key at the beginning, or
raises `ConflictError`. At the commit, the owner checks that none of the keys that were read has changed since the beginning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import cast

from lab_state._arguments import check_key
from lab_state._core import Core
from lab_state._draft import Draft
from lab_state._durability import Durability
from lab_state._entries import Absent, Readable, Stored, StoredOrGone
from lab_state._layered import LayeredEntries, Live
from lab_state._state import State
from lab_state._transaction import DraftCore
from lab_state.exceptions import ClosedError, ConflictError, InvalidKeyError
from lab_state.shared._answers import Refusal
from lab_state.shared._checks import MOST_KEYS
from lab_state.shared._data_calls import can_begin_key


class _Noted(Live):
    """The entries of the copy. Each read of a key is noted. A read of all keys is noted as a listing."""

    __slots__ = ("_draft",)

    def __init__(self, draft: OptimisticDraft) -> None:
        super().__init__(draft.base)
        self._draft = draft

    def __getitem__(self, key: str) -> Stored:
        self._draft.note_read(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._draft.note_read(cast("str", key))
        return super().__contains__(key)

    def items(self) -> Iterable[tuple[str, Stored]]:
        self._draft.note_listing("")
        return super().items()

    def __len__(self) -> int:
        self._draft.note_listing("")
        return super().__len__()


class OptimisticDraft(Draft):
    """A draft that notes which keys are read. Other calls may change the base meanwhile.

    Attributes:
        read_at: The revision of the base at the beginning, or that of the seed.
        keys: The keys that were read, including missing ones.
        prefixes: The prefixes whose keys were listed.
        has_conflict: Whether a `ConflictError` of this draft was raised.
        seed: The refusal whose values the draft had at its beginning; `None` if it began with the base alone. A draft with a
            seed can read no other keys, because the base may have them at another revision.
    """

    __slots__ = ("_stale", "has_conflict", "keys", "prefixes", "read_at", "seed")

    def __init__(self, base: State, seed: Refusal | None = None) -> None:
        self.seed = seed
        if seed is not None:
            base = refused(base, seed)
        self.read_at: int = base.revision if seed is None else seed.revision
        self.keys: set[str] = set()
        self.prefixes: set[str] = set()
        self.has_conflict: bool = False
        self._stale: set[str] | None = set()  # the keys of the base that have changed; `None`: any key may have changed
        super().__init__(base)
        self.entries = LayeredEntries(_Noted(self), self.changes)

    @property
    def known(self) -> Readable:
        """The entries, for reads that are not noted."""
        return LayeredEntries({} if self.cleared else Live(self.base), self.changes)

    def note_changed(self, keys: Collection[str] | None) -> None:
        """Note that keys of the base have changed; `None` if all may have changed.

        If more than `MOST_KEYS` keys have changed, all keys count as changed, because the owner would refuse the check. With
        a seed, do nothing, because the draft does not read the base.
        """
        if self.seed is not None:
            return
        if keys is None or self._stale is None:
            self._stale = None
            return
        self._stale.update(keys)
        if len(self._stale) > MOST_KEYS:
            self._stale = None

    def note_read(self, key: str) -> None:
        """Note that a key is read.

        Raises:
            ConflictError: The key has changed since the draft began, or the seed does not have it.
        """
        if self._stale is None or key in self._stale:
            raise self.conflict()
        if self.seed is not None and key not in (self.seed.values or ()):
            raise self.conflict()
        self.keys.add(key)

    def note_listing(self, prefix: str) -> None:
        """Note that all keys with a prefix are read.

        Raises:
            ConflictError: A key with this prefix has changed since the draft began, or the draft has a seed.
        """
        if self.cleared:  # then the keys of the base are hidden
            return
        if self.seed is not None or self._stale is None or any(key.startswith(prefix) for key in self._stale):
            raise self.conflict()
        self.prefixes.add(prefix)

    def check(self) -> None:
        """Check that nothing that was read has changed since the beginning.

        Raises:
            ConflictError: Something that was read has changed.
        """
        if not self.keys and not self.prefixes:
            return
        starts = tuple(self.prefixes)
        if self._stale is None or any(key in self.keys or key.startswith(starts) for key in self._stale):
            raise self.conflict()

    def reads(self) -> tuple[list[str], list[str]]:
        """Return the keys and the prefixes for the check of the commit.

        Leave out keys under one of these prefixes. Also leave out texts that cannot be keys, because no change can affect them.
        """
        prefixes = [prefix for prefix in self.prefixes if can_begin_key(prefix)]
        starts = tuple(prefixes)
        return [key for key in self.keys if not key.startswith(starts) and _is_key(key)], prefixes

    def conflict(self) -> ConflictError:
        """Note that something that was read has changed, and return the error."""
        self.has_conflict = True
        return ConflictError(
            "something that this transaction has read was changed meanwhile, and the transaction changed nothing: run it "
            "again; `transact` does so by itself"
        )

    def count(self) -> int:
        """Return the number of keys. Note a read of all keys."""
        self.note_listing("")
        return super().count()

    def apply(self, changes: Mapping[str, StoredOrGone], *, cleared: bool) -> int:
        """Apply changes to the draft. This call notes no read, because a change alone reads no value."""
        noted, self.entries = self.entries, cast("LayeredEntries", self.known)
        try:
            return super().apply(changes, cleared=cleared)
        finally:
            if not self.cleared:
                self.entries = noted


def refused(copy: State, refusal: Refusal) -> Draft:
    """Return a draft over the copy. The draft has the values of a refusal."""
    seen = Draft(copy)
    assert refusal.values is not None
    seen.apply(
        {key: to for key, to in refusal.values.items() if not isinstance(to, Absent) or key in copy.entries},
        cleared=False,
    )
    return seen


def _is_key(text: str) -> bool:
    try:
        check_key(text)
    except InvalidKeyError:
        return False
    return True


class OptimisticCore(DraftCore):
    """The common part of the calls of a transaction that holds no lock.

    Attributes:
        draft: The draft, which notes what is read.
        refusal: The refusal of the commit, if the next attempt can begin with the values of the refusal; otherwise `None`.
    """

    __slots__ = ("_durability", "draft", "refusal")

    def __init__(self, core: Core, seed: Refusal | None = None) -> None:
        """Begin a draft over the copy of this process, with the values of a refusal if there is one."""
        super().__init__(core)
        self._durability = core.durability
        self.refusal: Refusal | None = None
        self.draft: OptimisticDraft = OptimisticDraft(core.state, seed)
        self._take(self.draft)

    @property
    def seed(self) -> Refusal | None:
        """The refusal whose values the next attempt begins with; `None` if there is none."""
        return self.refusal

    @property
    def has_conflict(self) -> bool:
        """Whether a `ConflictError` of this transaction was raised."""
        return self.draft.has_conflict

    @property
    def is_held(self) -> bool:
        """Whether the transaction is open."""
        return not self._is_over

    @property
    def durability(self) -> Durability:
        """The durability of the manager.

        Raises:
            RuntimeError: The transaction is over.
            ClosedError: The manager is not running, or was stopped and started again meanwhile.
        """
        if self._is_over and self._core.is_open:
            raise RuntimeError(f"this transaction of {self.name!r} is over: begin another one")
        if self._core.durability is not self._durability:
            raise ClosedError(
                f"the manager of {self.name!r} was stopped while this transaction was open: nothing was changed"
            )
        return self._durability
