"""The generations of a history on disk that are deleted after a checkpoint. This module does no I/O.

The page `docs/design/disk.md` has the rules, with a reason for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lab_state._journal import ANY_BASE
from lab_state.storage._generations import HistoryFile, Moment, StoredGeneration, grouped, lives
from lab_state.storage._limits import Held, Limits, to_prune


class InUse(NamedTuple):
    """The journal of the state, as its header describes it.

    Attributes:
        base: The snapshot that it follows.
        salt: Its salt, as in the name of a file of the history.
        wall: The time when it was made, in milliseconds since 1970.
        first: The first revision of its generation; `None` if it is not known.
    """

    base: str
    salt: str
    wall: int
    first: int | None = None


class Deletions(NamedTuple):
    """The files to delete. All journals must be deleted, and this must be durable, before the first snapshot is deleted.

    Attributes:
        journals: The journals.
        snapshots: The snapshots, whose journals are all among `journals`.
    """

    journals: tuple[HistoryFile, ...]
    snapshots: tuple[HistoryFile, ...]


def _replaced(sizes: Mapping[HistoryFile, int], in_use: InUse) -> list[StoredGeneration]:
    """Return the generations of a history without the one in use, the oldest first.

    After a crash or a failed checkpoint, the history may have links to files in use.
    """
    found = [one for one in grouped(sizes).generations if not _is_in_use(one, in_use)]
    life = lives([Moment(one.first, one.wall) for one in found], in_use.first)
    return sorted(found, key=lambda one: (life(Moment(one.first, one.wall)), *_age(one)))


def _age(one: StoredGeneration) -> tuple[int, bool, int, int]:
    """Return a sort key, which is smaller for an older generation of one life.

    Several generations may begin with the same revision. Of these, only the newest one has later records. So a snapshot with a
    journal is newer than a snapshot without a journal. It is also newer than a journal with the whole state, whose checkpoint
    has written the snapshot. The times alone do not show this, because the clock may have been set back in between.
    """
    is_alone = not one.journals or one.files[0].base == ANY_BASE
    return one.first, not is_alone, one.wall, max((file.wall for file in one.journals), default=0)


def _is_in_use(one: StoredGeneration, in_use: InUse) -> bool:
    snapshot = one.snapshot
    return any(file.salt == in_use.salt for file in one.journals) or (
        snapshot is not None and snapshot.base == in_use.base
    )


def deletions(sizes: Mapping[HistoryFile, int], in_use: InUse, *, limits: Limits, now: int, added: int) -> Deletions:
    """Decide which files of a history are deleted. `to_prune` decides how many generations.

    Args:
        sizes: The files of the history, with their sizes in bytes.
        in_use: The journal of the state.
        limits: The limits of the history.
        now: The time of the wall clock, in milliseconds since 1970.
        added: The number of generations that were added since the last call.
    """
    kept = _replaced(sizes, in_use)
    held = [Held(one.wall, _bytes_of(one, sizes)) for one in kept]
    chosen = kept[: to_prune(held, in_use.wall, limits, now, added)]
    orphans = [file for file in grouped(sizes).orphans if file.base != in_use.base]
    journals = [file for one in chosen for file in one.journals]
    return Deletions((*journals, *orphans), tuple(one.snapshot for one in chosen if one.snapshot is not None))


def counted(sizes: Mapping[HistoryFile, int], in_use: InUse) -> tuple[int, int]:
    """Return the number of generations without the one in use, and the number of their bytes."""
    kept = _replaced(sizes, in_use)
    return len(kept), sum(_bytes_of(one, sizes) for one in kept)


def _bytes_of(one: StoredGeneration, sizes: Mapping[HistoryFile, int]) -> int:
    return sum(sizes[file] for file in one.files)
