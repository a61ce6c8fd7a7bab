"""A call of a round, its effect on the keys of the state, and the order that explains the effects of several. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from round_history import ABSENT, Began, Ended

READS = frozenset({"look", "mismatch", "raise", "catch_up", "wait"})
"""The calls that change nothing."""


class Call(NamedTuple):
    """A call, its process, and its end; `None` if the process ended before that."""

    process: str
    began: Began
    end: Ended | None

    @property
    def id(self) -> str:
        """The id of the call."""
        return self.began.call

    @property
    def is_ok(self) -> bool:
        """Whether the call has returned."""
        return self.end is not None and self.end.outcome == "ok"

    @property
    def may_be_made(self) -> bool:
        """Whether the call has no certain outcome."""
        return self.end is None or self.end.outcome == "unknown"

    @property
    def is_read(self) -> bool:
        """Whether the call has only read the copy of its process: a `get_or_set` that found its key."""
        return self.began.kind == "get_or_set" and self.is_ok and self.revision is None

    @property
    def revision(self) -> int | None:
        """The revision of its answer."""
        return None if self.end is None else self.end.revision

    @property
    def result(self) -> Any:
        """Its result."""
        return None if self.end is None else self.end.result

    @property
    def changed(self) -> bool:
        """Whether the call has changed something, by its result."""
        kind, result = self.began.kind, self.result
        if kind in READS or not self.is_ok:
            return False
        if kind in {"delete", "add", "delete_all"}:
            return bool(result)
        if kind == "pop":
            return result is not ABSENT
        if kind == "claim":
            return result is ABSENT
        if kind == "get_or_set":
            return bool(result == self.id)
        return True

    def __str__(self) -> str:
        """Return the call in short."""
        end = self.end
        told = "no answer" if end is None else f"{end.outcome} {end.error} {end.result!r} at revision {end.revision}"
        return f"{self.began.kind} {self.id} {self.began.keys} of {self.process} ({told})"


Bound: TypeAlias = Literal["any", "absent", "present"]


class Effect(NamedTuple):
    """What a call needs a key to be, and what it leaves there.

    Attributes:
        needs: A kind of value, or a list with the one value.
        leaves: A list with the new value. An empty list: as it was.
    """

    needs: Bound | tuple[Any]
    leaves: tuple[Any, ...]

    def fits(self, value: Any) -> bool:
        """Return whether the call can be made on this value."""
        if self.needs == "any":
            return True
        if self.needs == "absent":
            return value is ABSENT
        if self.needs == "present":
            return value is not ABSENT
        return bool(value == self.needs[0])

    def after(self, value: Any) -> Any:
        """Return what the call leaves of this value."""
        return self.leaves[0] if self.leaves else value


JOINED = frozenset({"pop", "get_or_set"})
"""The calls of one process for one key that may share one message, and so a revision, also if one changed nothing."""

SETS = frozenset({"set", "set_many"})
DELETES = frozenset({"delete", "delete_all", "pop"})
KEEPS: tuple[Any, ...] = ()


def effect_of(call: Call) -> Effect:
    """Return the effect of a call that has returned on a key of the kind `s/`."""
    kind, result, own = call.began.kind, call.result, call.id
    if kind in SETS:
        return Effect("any", (own,))
    if kind == "delete_all":
        return Effect("any", (ABSENT,))
    if kind == "pop":
        return Effect((result,), (ABSENT,))
    if kind == "delete":
        return Effect("present", (ABSENT,)) if result else Effect("absent", KEEPS)
    if call.changed:
        return Effect("absent", (own,))
    return Effect("present" if kind == "add" else (result,), KEEPS)


def possible_effect(call: Call) -> Effect | None:
    """Return the effect that a call without an answer may have had; `None` if it changes nothing."""
    kind, own = call.began.kind, call.id
    if kind in SETS:
        return Effect("any", (own,))
    if kind in DELETES:
        return Effect("any", (ABSENT,))
    return Effect("absent", (own,)) if kind in {"add", "claim", "get_or_set"} else None


def explains(start: Any, end: Any, must: Sequence[Effect], may: Sequence[Effect]) -> bool:
    """Return whether some order of all effects in `must`, and of some in `may`, leads from one value to another."""
    effects = [*must, *may]
    needed = (1 << len(must)) - 1
    seen: set[tuple[int, str]] = set()
    todo: list[tuple[int, Any]] = [(0, start)]
    while todo:
        done, value = todo.pop()
        if done & needed == needed and value == end:
            return True
        for at, effect in enumerate(effects):
            if not done & 1 << at and effect.fits(value):
                after = done | 1 << at, effect.after(value)
                if (known := (after[0], repr(after[1]))) not in seen:
                    seen.add(known)
                    todo.append(after)
    return False


def useful(may: Sequence[Effect], must: Sequence[Effect], end: Any) -> list[Effect]:
    """Return the effects that can matter. Of those that do the same, as all deletions do, a few are enough."""
    seen = {end, *(effect.needs[0] for effect in must if isinstance(effect.needs, tuple))}
    kept: list[Effect] = []
    alike: Counter[tuple[Any, bool, Any]] = Counter()
    for effect in may:
        value = effect.leaves[0]
        same = effect.needs, value is ABSENT, value if value in seen else ABSENT
        alike[same] += 1
        if alike[same] <= len(must) + 1:
            kept.append(effect)
    return kept


def digits(number: int) -> dict[int, int]:
    """Return how often each power of 4 is in a number."""
    found: dict[int, int] = {}
    at = 0
    while number:
        number, count = divmod(number, 4)
        if count:
            found[at] = count
        at += 1
    return found
