"""A transaction: its calls, and the changes that it makes until it is committed."""

from __future__ import annotations

from collections.abc import Container, Coroutine, Iterable, Mapping
from typing import Any, TypeVar, cast, final

from lab_state._arguments import Seconds
from lab_state._calls import Calls
from lab_state._core import Core
from lab_state._durability import Durability
from lab_state._entries import Absent, Expiring, Stored, StoredOrGone, Value
from lab_state._metrics import Counters
from lab_state._plain import Plain
from lab_state._state import Layer, State, is_due
from lab_state._values import encode_value
from lab_state.exceptions import ClosedError, InvalidValueError

R = TypeVar("R")


class _Live:
    """The entries of a state, whichever object holds them at the moment."""

    __slots__ = ("_state",)

    def __init__(self, state: State) -> None:
        self._state = state

    def __getitem__(self, key: str) -> Stored:
        return self._state.entries[key]

    def __contains__(self, key: object) -> bool:
        return key in self._state.entries

    def items(self) -> Iterable[tuple[str, Stored]]:
        return self._state.entries.items()

    def __len__(self) -> int:
        return len(self._state.entries)


class _Entries(Layer):
    """The entries as the transaction sees them."""

    __slots__ = ()

    def __len__(self) -> int:
        added = sum((not isinstance(value, Absent)) - (key in self.base) for key, value in self.top.items())
        return len(self.base) + added


class Draft(State):
    """A state over another one, which nobody else changes meanwhile.

    `changes` is the top layer of `entries`, so that one store does for both. The
    revision is the one that a commit will make.
    """

    __slots__ = ("_only_values", "base")

    def __init__(self, base: State) -> None:
        """Begin with what is there."""
        self.base = base
        self._only_values = True
        super().__init__(base.monotonic)
        self.entries = _Entries(_Live(base), self.changes)
        self.revision = base.revision + 1

    def now(self) -> int:
        """The time of the state beneath."""
        return self.base.now()

    def has(self, key: str) -> bool:
        """Whether a key is there."""
        return key in self.entries and self._lives(key)

    def count(self) -> int:
        """Return how many keys there are.

        It costs a step for each change, and for each key that expires in this very second.
        """
        total = len(self.entries)
        if self.expires:
            now, beneath = self.now(), self.base.entries
            total -= sum(isinstance(to, Expiring) and to.at <= now for to in self.changes.values())
            if not self.cleared:
                total -= self.base.expiries.due(now) - sum(is_due(beneath, key, now) for key in self.changes)
        return total

    @property
    def expires(self) -> bool:
        """Whether anything does, in the state beneath too."""
        return bool(self.expiries) or bool(self.base.expiries)

    def merge(self) -> int | None:
        """Make it all one change of the state beneath; returns its revision, `None` if it changed nothing."""
        changes: dict[str, StoredOrGone] = self.changes
        if self._only_values:
            return self.base.set_many(cast("dict[str, Value]", changes)) if changes else None
        gone: Container[str] = () if self.cleared else self.base.entries
        changes = {key: to for key, to in changes.items() if not isinstance(to, Absent) or key in gone}
        if not changes and not (self.cleared and len(self.base.entries)):
            return None
        return self.base.apply(changes, cleared=self.cleared)

    def apply(self, changes: Mapping[str, StoredOrGone], *, cleared: bool) -> int:
        """Make them in the draft; however many, they are one change."""
        self._only_values = False
        super().apply(changes, cleared=cleared)
        self.revision = self.base.revision + 1
        return self.revision

    def _empty(self) -> None:
        self.changes.clear()
        self.entries = _Entries({}, self.changes)
        self.cleared = True
        self.expiries.clear()


class DraftCore(Core):
    """What the calls of a transaction share.

    Attributes:
        changes: The changes of the draft; empty, and nobody's, when it is over.
        known: Keys that need not be looked at.
        revision: What `merge` makes it.
    """

    __slots__ = ("_core", "changes", "known", "revision")

    def __init__(self, core: Core) -> None:
        super().__init__(core.name, State(float))
        self._core = core
        self.counters: Counters = core.counters
        self.changes: dict[str, StoredOrGone] = {}
        self.known: Container[str] = ()
        self.revision: int = 0

    @property
    def durability(self) -> Durability:
        """The manager's own; an error when the transaction is over."""
        if not self.is_held and self._core.is_open:
            raise RuntimeError(f"this transaction of {self.name!r} is over: begin another one")
        return self._core.durability

    @property
    def is_held(self) -> bool:
        """Whether the transaction is open."""
        return self._core.transaction is self

    def begin(self) -> None:
        draft = Draft(self._core.state)
        self.state: State = draft
        self.changes = draft.changes
        self.known = draft.base.entries
        self.revision = draft.revision

    def merge(self) -> int | None:
        if not self.is_held:
            self._core.check_process()
            raise ClosedError(
                f"the manager of {self.name!r} was stopped while this transaction was open: nothing changed"
            )
        self.durability.check_loop()
        self.durability.check_writable()
        assert isinstance(self.state, Draft)  # between begin and end
        return self.state.merge()

    def end(self) -> None:
        self.state = State(float)
        self.changes, self.known = {}, ()


@final
class Transaction(Plain):
    """The calls without `await`, on changes of their own that are not yet the state's.

    They have the guarantees and errors of the calls of the same name of the manager,
    see the changes made in the transaction so far, and never wait. The revision that
    `set` and `set_many` return is the one that the whole transaction makes, if in the
    end it changes anything.

    Raises:
        RuntimeError: From every call: the transaction is over.
    """

    __slots__ = ("_core", "_prefix")

    def __init__(self, core: DraftCore, prefix: str) -> None:
        super().__init__(Calls(core, prefix))
        self._core = core
        self._prefix = prefix

    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        try:
            coroutine.send(None)
        except StopIteration as stop:
            result: R = stop.value
            return result
        raise AssertionError("a call on a draft waited")

    def set(self, key: str, value: object, *, ttl: Seconds | None = None) -> int:
        """Store a value; see `set` of the manager."""
        if ttl is not None:
            return self._run(self._calls.set(key, value, ttl=ttl))
        # Written out: the way through a coroutine costs more than the work.
        core = self._core
        try:
            stored = encode_value(value)
        except InvalidValueError:
            core.counters.set_errors += 1
            raise
        full = self._prefix + key if key.__class__ is str else self._calls._full(key)  # noqa: SLF001 -- the calls' other face
        changes = core.changes
        if full not in changes and full not in core.known:
            self._calls._begin(full)  # noqa: SLF001 -- likewise
        changes[full] = stored
        return core.revision

    def namespace(self, name: str) -> Transaction:
        """The same transaction, for the keys that begin with `name` and a slash; see `Scope.namespace`."""
        return Transaction(self._core, self._calls._nested(name))  # noqa: SLF001 -- likewise

    def __repr__(self) -> str:
        """The name of the state, and whether it is open."""
        return f"<Transaction of {self._core.name!r}, {'open' if self._core.is_held else 'over'}>"

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._calls)

    def __contains__(self, key: object) -> bool:
        return key in self._calls
