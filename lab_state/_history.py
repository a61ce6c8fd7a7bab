"""`list_generations`: the moments of a state that its storage keeps."""

from __future__ import annotations

from typing import NamedTuple

from lab_state._past import generations
from lab_state.config import Config
from lab_state.storage._generations import holes
from lab_state.storage._history import history_of
from lab_state.storage._protocol import Storage


class Generation(NamedTuple):
    """A snapshot with the journal that follows it, or a journal that needs no snapshot.

    Each moment from the first to the last revision can be read with `read_state(…, at=…)`.

    Attributes:
        first_revision: The first revision.
        last_revision: The last revision. In the generation in use, it grows while a manager runs.
        first_wall: The time of the writer's wall clock at the first revision, in seconds since 1970; `None` if it is not recorded.
        last_wall: The time of the writer's wall clock at the last revision; see `first_wall`. It may be earlier than
            `first_wall`: by some milliseconds in a new state, and by more if the clock was set back.
        size: The size of the files or objects in bytes.
        hole_before: Whether revisions are missing between this generation and the ones before it.
        in_use: Whether this is the generation that `start()` loads.
    """

    first_revision: int
    last_revision: int
    first_wall: float | None
    last_wall: float | None
    size: int
    hole_before: bool
    in_use: bool


async def list_generations(name: str, storage: Storage) -> list[Generation]:
    """Return the generations of a state, the oldest first.

    The call takes no lock and writes nothing, and works beside a manager that runs. Normally it reads only the
    beginning and the end of each file, so the time of a call grows with the number of generations, and not with their size.

    A damaged generation is left out if the call notices the damage, and the next one may have a hole before it. If the generation
    in use is damaged in this way, or the state was removed, the list has only the history. Otherwise the last generation is in
    use. Damage in the middle of a file is noticed only by a call that reads the generation.

    If the caller is cancelled, nothing stays open. Each call reads everything again.

    Args:
        name: The name of the state.
        storage: The storage that contains it: a `FileStorage` or an `S3Storage`.

    Raises:
        InvalidNameError: The name is not allowed; see `Config.name`.
        TypeError: The name is not a `str`, or the storage is not a storage.
        UnsupportedError: There is no state of this name, and no history of it: check the name and the storage. Or the storage
            is neither a `FileStorage` nor an `S3Storage`. Or a permission is missing, or a newer version of lab_state wrote a
            journal of the state or of its history: use that version. `read_state` with `at` still reads the other generations.
        CorruptionError: The files in use are damaged, and there is no history: restore a copy.
        UnavailableError: The list could not be read this time: call again.
    """
    found = await generations(history_of(storage), Config(name=name).name)
    missing = holes([one.span for one in found])
    return [
        Generation(
            one.span.first.revision,
            one.span.last.revision,
            one.span.first.wall / 1000 if one.span.first.wall else None,
            one.span.last.wall / 1000 if one.span.last.wall else None,
            one.size,
            hole,
            one.in_use,
        )
        for one, hole in zip(found, missing, strict=True)
    ]
