"""The history of one state on disk, as its writer keeps it. The calls block.

The page `docs/design/disk.md` has the rules, with a reason for each.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager

from lab_state import _journal as journal
from lab_state._clock import wall_now
from lab_state._log import Log
from lab_state.exceptions import StorageError
from lab_state.storage import _fs as fs
from lab_state.storage import _history_files as files
from lab_state.storage import _lookup as lookup
from lab_state.storage._directory import Paths
from lab_state.storage._generations import HistoryFile, journal_file
from lab_state.storage._limits import Limits
from lab_state.storage._protocol import HistoryFigures
from lab_state.storage._pruning import InUse, counted, deletions

_logger = Log(logging.getLogger("lab_state"))


class Keeping:
    """The settings of a history on disk, for all states of a storage object.

    Attributes:
        limits: The limits of each history.
        tried: The directories in which a hard link was tried out with success.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits: Limits = limits
        self.tried: set[lookup.Identity] = set()


class KeptHistory:
    """The history of one state. The worker for checkpoints and the worker for commits call the methods.

    If a file cannot be linked, the commit or the checkpoint succeeds all the same. The failure is logged and counted, and the
    history has a hole.

    Attributes:
        failures: The number of such failures since the start.
        generations: The number of generations when they were last counted, without the one in use.
        bytes: The number of bytes of these generations.
        is_due: Whether a checkpoint has ended since the last call of `prune`.
    """

    def __init__(self, paths: Paths, name: str, keeping: Keeping) -> None:
        """Set the attributes. No file is touched."""
        self.failures: int = 0
        self.generations: int = 0
        self.bytes: int = 0
        self.is_due: bool = False
        self._paths = paths
        self._name = name
        self._keeping = keeping
        self._added = 0  # the number of generations that were added since the last call of `prune`
        self._is_settled = False  # whether the journal in use is linked, or the link has failed
        # Whether the start found the journal in use. Then its bytes may be only in the page cache.
        self._is_found = True
        self._is_named = False  # whether this session has synced the name of the directory
        # The other worker must not replace a file between a look at the file and its link.
        self._lock = threading.Lock()

    @property
    def figures(self) -> HistoryFigures:
        """The figures for `status()`. Any thread may read them."""
        return HistoryFigures(self.failures, self.generations, self.bytes)

    def open(self, noted: Callable[..., AbstractContextManager[None]]) -> None:
        """Check at the start that files can be linked into the history. Count its generations. For `noted`, see `_directory.try_out`.

        Raises:
            UnsupportedError: The file system has no hard links, the history is not a directory or is a mount point, or a
                permission is missing.
            StorageError: A directory cannot be looked up, or listed.
        """
        files.check_directory(self._paths)
        files.try_link(self._paths, self._keeping.tried, noted)
        self._count(*self._look())

    def keep_early(self, base: str, known: lookup.Fingerprint | None) -> None:
        """Link the files that a checkpoint will replace, while commits go on. A journal that is linked still grows.

        The worker for checkpoints calls this. `keep_rest` calls this, too.

        Args:
            base: The present snapshot, by its bytes.
            known: The fingerprint of this snapshot; `None` if there is none.
        """
        with self._lock:
            self._is_settled = self._keep(base, known)

    def keep_rest(self, base: str, known: lookup.Fingerprint | None) -> None:
        """Link the files right before a checkpoint replaces them, if `keep_early` has not linked them.

        Such a case is rare: the journal had no records at the time of `keep_early`, or a commit has replaced the journal since
        then. The worker for commits calls this.
        """
        if not self._is_settled:
            self.keep_early(base, known)

    @contextlib.contextmanager
    def replacing(self, base: str, known: lookup.Fingerprint | None, *, is_copied: bool) -> Generator[None]:
        """Link the journal in use, with its snapshot, before the block replaces the journal. Do nothing if both are linked already.

        The worker for commits calls this.

        Args:
            base: As in `keep_early`.
            known: As in `keep_early`.
            is_copied: Whether the new journal has copies of all records of the journal in use that are not linked. Then nothing is
                linked.
        """
        with self._lock:
            if not is_copied and not self._is_settled:
                self._keep(base, known, sync=self._is_found)
            try:
                yield
            finally:
                self._is_settled = self._is_found = False

    def _keep(self, base: str, known: lookup.Fingerprint | None, *, sync: bool = False) -> bool:
        """Link the present files. Return False if there is no journal with records to link. After a failure, return True."""
        try:
            found = files.present_files(self._paths, self._name, base, known)
            if files.link_all(self._paths, found, sync=sync, sync_parent=not self._is_named):
                self._added += 1
        except StorageError as error:
            self.failures += 1
            _logger.error(  # noqa: TRY400 -- one line
                "%s lacks the files of the state that are now replaced, because they could not be linked: %s",
                self._paths.history,
                error,
            )
            return True
        self._is_named = self._is_named or bool(found)
        return any(not link.file.is_snapshot for link in found)

    def prune(self) -> None:
        """Delete the generations that are no longer kept, after a checkpoint. If this fails, the next checkpoint tries again.

        The worker for checkpoints calls this.
        """
        if not self.is_due:
            return
        self.is_due = False
        try:
            self._prune()
        except StorageError as error:
            _logger.warning(
                "%s: old files could not be deleted before the next checkpoint: %s", self._paths.history, error
            )

    def _prune(self) -> None:
        sizes, in_use = self._look()
        added, self._added = self._added, 0
        gone = deletions(sizes, in_use, limits=self._keeping.limits, now=wall_now(), added=added)
        files.delete(self._paths.history, gone.journals)
        if gone.journals and gone.snapshots:
            # No crash may leave a journal without its snapshot.
            fs.sync_directory(self._paths.history)
        files.delete(self._paths.history, gone.snapshots)
        for file in (*gone.journals, *gone.snapshots):
            del sizes[file]
        self._count(sizes, in_use)

    def _count(self, sizes: dict[HistoryFile, int], in_use: InUse) -> None:
        self.generations, self.bytes = counted(sizes, in_use)

    def _look(self) -> tuple[dict[HistoryFile, int], InUse]:
        """Return the files of the history with their sizes, and the journal in use."""
        path = self._paths.journal
        with self._lock:
            sizes, head = files.sizes_in(self._paths.history), fs.read(path, files.HEAD_BYTES)
            if head is None:
                return sizes, InUse("", "", 0)
            header = journal.read_header(head, self._name, path)
            first = files.first_revision(self._paths, header.base)
        salt = journal_file(0, 0, header.base, header.salt).salt
        return sizes, InUse(header.base, salt, header.wall, first)
