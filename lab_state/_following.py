"""Copies of a state that follow its owner step by step: the copies of a shared state, and the local copies of a mirror.

This module does no I/O. A step has the new values of keys, the deleted keys, and a flag that says whether all keys were deleted
first. The step is applied to a `State`, so indexes, views and watches work as in a manager. The caller decides
which steps to apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import msgspec
from msgspec import Raw

from lab_state import _batch
from lab_state._batch import Batch, in_parts
from lab_state._entries import DELETED, EXPIRED, SCALARS, Absent, Expiring, Json, StoredOrGone, Value
from lab_state._not_json import NOT_JSON
from lab_state._state import State

_PLAIN = SCALARS | {bytes, Raw}
"""The classes of values that do not expire."""

_OBJECT_OR_ARRAY = (b"{", b"[")


def stored_of(data: bytes | bytearray | memoryview | Raw) -> Value:
    """Return a value as a manager stores it: a scalar decoded, any other value as JSON.

    The result does not keep `data` in memory. If `data` is invalid JSON, so is the result, and a read raises an error.
    """
    held = bytes(data)
    if held[:1] in _OBJECT_OR_ARRAY:
        return Json(held)
    try:
        value: Value = msgspec.json.decode(held)
    except NOT_JSON:
        return Json(held)
    return value if value.__class__ in SCALARS else Json(held)  # a foreign client may have put spaces before an object


def changes_of(
    values: Mapping[str, Raw], expires: Mapping[str, int], deleted: Iterable[str]
) -> dict[str, StoredOrGone]:
    """Return the changes of a step, from its JSON.

    Args:
        values: The new values of keys.
        expires: The expiry times of the keys that expire, in milliseconds since 1970. Keys without a new value are ignored.
        deleted: The keys that are deleted.
    """
    changes: dict[str, StoredOrGone] = {key: stored_of(raw) for key, raw in values.items()}
    if expires:
        for key in expires.keys() & changes.keys():
            changes[key] = Expiring(cast("Value", changes[key]), expires[key])
    if deleted:
        changes.update(dict.fromkeys(deleted, DELETED))
    return changes


def apply_step(
    copy: State, changes: Mapping[str, StoredOrGone], revision: int, *, cleared: bool, time: int = 0
) -> None:
    """Apply a step to a copy without letting the event loop run. For the arguments, see `Step`."""
    kinds = {*map(type, changes.values())}
    effects, expired = changes, 0
    if Absent in kinds:
        effects, expired = _effects(copy, changes.items(), cleared=cleared, time=time)

    def change() -> int | None:
        if changes and not cleared and kinds <= _PLAIN:
            return copy.set_many(cast("Mapping[str, Value]", changes))  # faster than `apply`
        if effects or (cleared and len(copy.entries)):
            return copy.apply(effects, cleared=cleared)
        return None

    _show(copy, change, revision, expired)


class Step:
    """A step that is prepared in parts, and then made at one moment. Other code must not change the copy between `prepare` and `finish`."""

    def __init__(
        self, copy: State, changes: Mapping[str, StoredOrGone], revision: int, *, cleared: bool, time: int = 0
    ) -> None:
        """Set the step. Nothing is changed yet.

        Args:
            copy: The copy. All of its changes must be taken.
            changes: The last effect on each key. A key that is deleted need not exist. The mapping is not changed.
            revision: The revision of the copy after the step.
            cleared: Whether all keys are deleted first.
            time: The time of the owner at the step, in milliseconds since 1970. A deleted key with an expiry up to
                this time counts as expired. With 0, no key counts as expired.
        """
        self._copy = copy
        self._changes = changes
        self._revision = revision
        self._cleared = cleared
        self._time = time
        self._expired = 0
        self._batch: Batch | None = None

    def prepare(self) -> Iterator[None]:
        """Prepare the step in parts. If it has `_batch.MANY` changes or more, yield after each part.

        Reads do not see the step before `finish`.
        """
        copy, source = self._copy, dict[str, StoredOrGone]()
        for part in in_parts(self._changes.items()):
            effects, expired = _effects(copy, part, cleared=self._cleared, time=self._time)
            source.update(effects)
            self._expired += expired
            if len(self._changes) >= _batch.MANY:
                yield
        self._batch = Batch(copy, source, cleared=self._cleared, expired=True)
        yield from self._batch.prepare()

    def finish(self) -> None:
        """Make the prepared changes in one short step. From now on, reads see them."""
        assert self._batch is not None  # `prepare` has made the batch
        _show(self._copy, self._batch.switch, self._revision, self._expired)


def _effects(
    copy: State, changes: Iterable[tuple[str, StoredOrGone]], *, cleared: bool, time: int
) -> tuple[dict[str, StoredOrGone], int]:
    """Return the changes without deletions of missing keys, and the number of expired keys.

    With `cleared`, leave out all deletions. The deletion of an expired key is marked as `EXPIRED`.
    """
    effects: dict[str, StoredOrGone] = {}
    entries, expired = copy.entries, 0
    for key, to in changes:
        if not isinstance(to, Absent):
            effects[key] = to
        elif not cleared and key in entries:
            stored = entries[key]
            has_expired = isinstance(stored, Expiring) and stored.at <= time
            expired += has_expired
            effects[key] = EXPIRED if has_expired else DELETED
    return effects, expired


def _show(copy: State, change: Callable[[], int | None], revision: int, expired: int) -> None:
    """Make a change, and note it as a step: set the revision, count the expired keys, and take the changes.

    `change` makes the change. It returns `None` if it has changed nothing.
    """
    before = copy.revision
    copy.skip_to(revision - 1)
    try:
        if change() is None:
            copy.skip_to(revision)
    except BaseException:  # such as a MemoryError: a part of the step may be missing, so the caller repeats the step
        copy.take()
        copy.skip_to(before)
        raise
    copy.deleted -= expired
    copy.swept += expired
    copy.free(copy.end_window())
    if copy.expiries:
        copy.expiries.advance(copy.now())
