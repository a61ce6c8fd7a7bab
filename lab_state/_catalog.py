"""`list_states` and `remove_state`: the states of a storage."""

from __future__ import annotations

from typing import NamedTuple

from lab_state.config import Config
from lab_state.storage._history import catalog_of
from lab_state.storage._protocol import Storage


class StateInfo(NamedTuple):
    """A state in a storage, without its content.

    Attributes:
        name: The name of the state.
        size: The number of bytes that `start()` loads. 0 for a state that was never written, or was removed.
        history_size: The number of bytes of its older generations.
        live: Whether a manager has the state open; `None` if it is not known.
        holder: The process that has the state open, for a message; `None` if there is none, or if it is not known.
    """

    name: str
    size: int
    history_size: int
    live: bool | None
    holder: str | None


async def list_states(storage: Storage) -> list[StateInfo]:
    """Return the states of a storage, sorted by name.

    The call takes no lock, reads no state and writes nothing. On disk, a state is a file `<name>.json`, `<name>.journal` or
    `<name>.lock`, or a history. So a JSON file of another program is listed as well: a manager with this name would load the file.
    The files of a state may change during the call. If the caller is cancelled, nothing stays open.

    Args:
        storage: The storage.

    Raises:
        UnsupportedError: The storage cannot list its states, because it is from another package. Or the directory is missing, or
            a permission is missing.
        UnavailableError: The states could not be listed this time: call again.
        TypeError: The argument is not a storage.
    """
    return [StateInfo(*one) for one in await catalog_of(storage).states()]


async def remove_state(name: str, storage: Storage, *, history: bool = False) -> None:
    """Remove a state that no manager has open.

    If the storage was made with `history=`, or if the state has a history, the last generation is added to the history, and the
    history stays. So `restore_state(name, storage, at, into=name)` brings the state back. Otherwise the state is deleted
    permanently. With `history=True` the history is removed, too. A damaged state is not added to the history on disk.

    On disk, the call deletes all files of the state except its lock and, without `history=True`, its history. It does not
    delete `<name>.damaged-<time>/`, nor files in the history that lab_state has not made. A crash during the call leaves the
    state as it was, or a state that `start()` refuses, or no state: then call again. If the caller is cancelled, the removal
    goes on. A second call raises `UnsupportedError`, unless there is still a history.

    A new state of this name begins at revision 0. If the history of the removed state is kept, a revision may exist twice; see
    `read_state`. So remove the history as well if the name is used for another state.

    Args:
        name: The name of the state.
        storage: The storage that contains it.
        history: Whether to remove the history, too.

    Raises:
        InvalidNameError: The name is not allowed; see `Config.name`.
        TypeError: The name is not a `str`, or the storage is not a storage.
        LockedError: A manager has the state open: stop it first, in all processes that share the state. In S3, only a manager of
            this process is noticed.
        UnsupportedError: There is neither a state of this name nor a history of it. Or the storage cannot remove states. Or
            a permission is missing.
        UnavailableError: A part could not be removed this time: call again.
    """
    await catalog_of(storage).remove(Config(name=name).name, history=history)
