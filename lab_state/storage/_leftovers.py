"""Files that earlier sessions left. Each storage object lists a directory only once to find them.

A directory may have the files of many states, and listing it then takes long. So a start lists it only if the lock
file does not say which temporary files may exist, or if the journal has a torn tail.
"""

from __future__ import annotations

import os
import re
import threading

from lab_state import _forks as forks
from lab_state.storage import _lookup as lookup

_LEFT = re.compile(r"(.+\.(?:json|journal))\.(?:[0-9a-f]{8}\.tmp|torn-\d+)")
"""The name of a temporary file, or of a file that keeps a torn tail. A snapshot, a journal or a lock file never has such a name."""


class Leftovers:
    """The temporary files, and the files of torn tails, that the first listing of each directory found, or that `add` has noted since."""

    def __init__(self) -> None:
        """Start without any listing."""
        self._lock = threading.Lock()
        self._found: dict[str, dict[str, list[str]]] = {}

    def __reduce__(self) -> tuple[type[Leftovers], tuple[()]]:
        """Let `copy` and `pickle` make an object without listings. The copy lists the directories again."""
        return Leftovers, ()

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Replace the lock. This runs in a forked child. A thread of the parent may hold the old lock."""
        self._lock = threading.Lock()

    def temporary(self, path: str) -> list[str]:
        """Return the temporary files that were made to replace the file at `path`. Some may have been deleted since.

        Raises:
            StorageError: The directory cannot be listed.
        """
        return [file for file in self._beside(path) if file.endswith(".tmp")]

    def torn(self, path: str) -> list[str]:
        """Return a new list of the files that keep torn tails of a journal, the oldest first. Some may have been deleted since.

        Raises:
            StorageError: The directory cannot be listed.
        """
        return [file for file in self._beside(path) if not file.endswith(".tmp")]

    def add(self, path: str, file: str) -> None:
        """Note a file that was written just now, and keeps a torn tail of a journal."""
        self._beside(path).append(file)

    def _beside(self, path: str) -> list[str]:
        directory, name = os.path.split(path)
        forks.disown_in_children(self)
        with self._lock:
            if directory not in self._found:
                self._found[directory] = _listed(directory)
            return self._found[directory].setdefault(name, [])


def _listed(directory: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(lookup.names_in(directory)):
        if match := _LEFT.fullmatch(name):
            found.setdefault(match[1], []).append(os.path.join(directory, name))
    return found
