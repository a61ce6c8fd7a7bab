"""The states in a bucket: their list, and the removal of one.

A state that was removed and keeps its history leaves an object in the place of its snapshot: an empty state with the mark
`REMOVED` in its metadata. This object covers all records. So the numbers go on when a state of this name is made again, and the
history stays in order. A state without a history leaves nothing. Its records are deleted in order. So if the call is interrupted,
the remaining records begin with a gap, and a start refuses them.
"""

from __future__ import annotations

from collections.abc import Callable

from lab_state.config import Config
from lab_state.exceptions import CorruptionError, InvalidNameError
from lab_state.storage._history import FoundState
from lab_state.storage._protocol import no_state
from lab_state.storage.s3._client import Requests
from lab_state.storage.s3._format import REMOVED, Names, kept_in_metadata, stamp_in_metadata
from lab_state.storage.s3._open import AT_ONCE, together
from lab_state.storage.s3._outcomes import ObjectInfo
from lab_state.storage.s3._restoring import open_to_restore

_PARTS = (".json", ".journal/", ".history/")


async def list_states(store: Requests, of: Callable[[str], Names]) -> list[FoundState]:
    """Return the states, sorted by name; see `Catalog.states`. `of` returns the names of the objects of a state.

    Raises:
        StorageError: See `Catalog.states`.
    """
    above = of("x").snapshot.removesuffix("x.json")
    names = sorted({name for key in await store.level(above) if (name := _name(key.removeprefix(above))) is not None})
    found: dict[str, FoundState] = {}
    left = iter(names)

    async def some() -> None:
        for name in left:
            found[name] = await _state(store, of(name))

    await together([some() for _ in range(min(AT_ONCE, len(names)))])
    return [found[name] for name in names]


def _name(key: str) -> str | None:
    """Return the name of the state to which a key belongs; `None` if it belongs to no state."""
    for part in _PARTS:
        if key.endswith(part):
            name = key.removesuffix(part)
            try:
                return Config(name=name).name
            except InvalidNameError:
                return None
    return None


async def _state(store: Requests, names: Names) -> FoundState:
    present = await store.head(names.snapshot)
    seq = size = 0
    if present is not None:
        seq = _covered(present, names)
        size = 0 if REMOVED in present.metadata else present.size
    history = sum((await store.sizes(names.history, names.history)).values())
    listed = await store.sizes(names.journal, names.record(0))
    for key, bytes_ in listed.items():
        number = names.number(key)
        if number is not None and number > seq:
            size += bytes_
        elif number is not None:
            history += bytes_
    return FoundState(names.name, size, history, None, None)


def _covered(present: ObjectInfo, names: Names) -> int:
    """Return the number of the last record that a snapshot covers; 0 if its metadata do not have it, or are damaged."""
    try:
        stamp = stamp_in_metadata(present.metadata, names.snapshot)
    except CorruptionError:
        return 0
    return 0 if stamp is None else stamp.seq


async def remove_state(store: Requests, names: Names, *, history: bool, keeps: bool) -> None:
    """Remove a state; see `Catalog.remove`. `keeps` says whether the storage keeps a history.

    Raises:
        StorageError: See `Catalog.remove`.
    """
    present = await store.head(names.snapshot)
    copies = [key for key in await store.sizes(names.history, names.history) if names.older(key) is not None]
    journal = await store.sizes(names.journal, names.record(0))
    if present is None and not copies and not journal:
        raise no_state(names.url(names.snapshot), ", and no history of it: check the name, the prefix and the bucket")
    kept = 0 if present is None else kept_in_metadata(present.metadata) or 0
    if (keeps or copies or kept) and not history:
        if present is None or REMOVED not in present.metadata or max(journal) > names.record(_covered(present, names)):
            restoring = await open_to_restore(store, names, _nothing)
            await restoring.remove()
        return
    # Without its first objects, a start refuses the rest.
    await store.delete([names.snapshot])
    await store.delete(copies)
    await store.delete(journal)
    await store.delete([names.probe])


def _nothing() -> None:
    """Do nothing at the end of a session, because its connections are still in use."""
