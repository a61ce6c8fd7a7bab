"""Bugs of the history that are put into the library, one at a time, to prove that the exploration finds them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import workloads
from bugs import Bug

from lab_state.storage import _file_calls, _file_restore, _fs, _history_files, _limits, _lookup, _pruning
from lab_state.storage._directory import Paths
from lab_state.storage._file_calls import FileRestoring
from lab_state.storage._generations import HistoryFile, StoredGeneration
from lab_state.storage._keeping import KeptHistory
from lab_state.storage._limits import Held, Limits
from lab_state.storage._lookup import Fingerprint
from lab_state.storage._protocol import SnapshotSource

Patch = pytest.MonkeyPatch


def linked_after_the_rename(patch: Patch) -> None:
    """Link the files of a state only when they are replaced."""
    rename = _fs.rename
    keepers: list[KeptHistory] = []

    def keep(self: KeptHistory, base: str, known: Fingerprint | None, *, sync: bool = False) -> bool:
        keepers[:] = [self]
        return True

    def renamed(temporary: str, path: str) -> None:
        rename(temporary, path)
        for keeper in keepers:
            really(keeper, "", None)

    really = KeptHistory._keep
    patch.setattr(KeptHistory, "_keep", keep)
    patch.setattr(_fs, "rename", renamed)


def _no_sync_of(patch: Patch, end: str) -> None:
    sync = _fs.sync_directory
    patch.setattr(_fs, "sync_directory", lambda path: None if path.endswith(end) else sync(path))


def no_sync_of_the_links(patch: Patch) -> None:
    """Replace files whose names in the history may be lost."""
    _no_sync_of(patch, ".history")


def no_sync_of_a_new_history(patch: Patch) -> None:
    """Let the directory of the history itself be lost."""
    make = _history_files._make

    def made(paths: Paths, *, sync_parent: bool) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(_fs, "sync_directory", lambda path: None)
            make(paths, sync_parent=sync_parent)

    patch.setattr(_history_files, "_make", made)


def journal_replaced_without_a_link(patch: Patch) -> None:
    """Leave out the journals that rules 4, 6 and 8 replace."""

    @contextmanager
    def replacing(*_: Any, **__: Any) -> Generator[None]:
        yield

    patch.setattr(KeptHistory, "replacing", replacing)


def journal_linked_without_its_snapshot(patch: Patch) -> None:
    """Link the journal alone."""
    present = _history_files.present_files
    patch.setattr(_history_files, "present_files", lambda *args: present(*args)[-1:])


def snapshot_linked_without_its_journal(patch: Patch) -> None:
    """Link only the snapshot that a checkpoint replaces."""
    present = _history_files.present_files
    patch.setattr(
        _history_files, "present_files", lambda *args: [one for one in present(*args) if one.file.is_snapshot]
    )


def records_behind_an_early_look_left_out(patch: Patch) -> None:
    """Leave out a journal that had no records when the checkpoint looked at it, but has some when it is replaced."""
    keep = KeptHistory._keep

    def kept(self: KeptHistory, *args: Any, **kwargs: Any) -> bool:
        keep(self, *args, **kwargs)
        return True

    patch.setattr(KeptHistory, "_keep", kept)


def every_journal_taken_for_copied(patch: Patch) -> None:
    """Leave out the journal in use, although the next one begins with the whole state."""
    replacing = KeptHistory.replacing
    patch.setattr(
        KeptHistory, "replacing", lambda self, base, known, *, is_copied: replacing(self, base, known, is_copied=True)
    )


def snapshot_pruned_before_its_journal(patch: Patch) -> None:
    """Delete the snapshot of a generation first."""
    delete, waiting = _history_files.delete, list[HistoryFile]()

    def deleted(directory: str, files: Iterable[HistoryFile]) -> None:
        given = list(files)
        if given and not given[0].is_snapshot:
            waiting.extend(given)
            return
        delete(directory, given)
        delete(directory, waiting)
        waiting.clear()

    patch.setattr(_history_files, "delete", deleted)


def no_sync_between_a_journal_and_its_snapshot(patch: Patch) -> None:
    """Delete both at once, so that a crash may keep the journal alone."""
    prune = KeptHistory._prune

    def pruned(self: KeptHistory) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(_fs, "sync_directory", lambda path: None)
            prune(self)

    patch.setattr(KeptHistory, "_prune", pruned)


def newest_pruned_first(patch: Patch) -> None:
    """Begin with the newest generation."""
    replaced = _pruning._replaced

    def reverse(sizes: Mapping[HistoryFile, int], in_use: _pruning.InUse) -> list[StoredGeneration]:
        return replaced(sizes, in_use)[::-1]

    patch.setattr(_pruning, "_replaced", reverse)


def too_many_pruned(patch: Patch) -> None:
    """Delete as many as it takes, at once."""
    patch.setattr(_limits, "_MOST_FOR_EACH_ADDED", 1000)


def one_too_many_pruned(patch: Patch) -> None:
    """Delete one generation more than the rules allow."""
    choose = _limits.to_prune
    patch.setattr(_pruning, "to_prune", lambda kept, *args: min(choose(kept, *args) + 1, len(kept)))


def the_next_one_is_not_waited_for(patch: Patch) -> None:
    """Delete a generation when it has begun before the history, although the next one has not."""
    choose = _limits.to_prune

    def chosen(kept: list[Held], in_use: int, *args: Any) -> int:
        walls = [0, *(one.wall for one in kept)]
        return choose(
            [Held(wall, one.size) for wall, one in zip(walls, kept, strict=False)], walls[-1] or in_use, *args
        )

    patch.setattr(_pruning, "to_prune", chosen)


def a_history_in_the_wrong_unit(patch: Patch) -> None:
    """Keep it for as many milliseconds as it should have seconds."""
    _limit_by(patch, 1 / 1000)


def deletions_made_later(patch: Patch) -> None:
    """Let each generation that was added count again and again."""
    prune = KeptHistory._prune

    def pruned(self: KeptHistory) -> None:
        added = self._added
        prune(self)
        self._added = added

    patch.setattr(KeptHistory, "_prune", pruned)


def nothing_is_too_old(patch: Patch) -> None:
    """Let only the size of a history count."""
    _limit_by(patch, 1_000_000)


def _limit_by(patch: Patch, factor: float) -> None:
    choose = _limits.to_prune

    def chosen(kept: list[Held], in_use: int, limits: Limits, *args: Any) -> int:
        return choose(kept, in_use, limits._replace(length=int(limits.length * factor)), *args)

    patch.setattr(_pruning, "to_prune", chosen)


def restore_that_links(patch: Patch) -> None:
    """Put the files of a generation in use, in place of a copy of the state."""

    async def put(self: FileRestoring, snapshot: SnapshotSource, *, is_damaged: bool) -> None:
        writer = self._writer
        _file_restore.keep_present(writer)
        kept = [name for name in _lookup.names_in(writer.paths.history) if name.endswith(".json")]
        temporary = _fs.temporary(writer.paths.snapshot)
        system = vars(_history_files)["os"]
        system.link(f"{writer.paths.history}/{max(kept)}", temporary, follow_symlinks=False)
        _fs.rename(temporary, writer.paths.snapshot)
        _fs.discard(writer.paths.journal)
        _fs.sync_directory(writer.paths.directory)

    patch.setattr(FileRestoring, "put", put)


def restore_that_keeps_nothing(patch: Patch) -> None:
    """Replace the files of a state without a link."""
    patch.setattr(_file_calls, "keep_present", lambda writer: None)


def restore_without_a_sync(patch: Patch) -> None:
    """Rename the journal with the restored state before it is on the disk, and do not sync the name."""
    put = FileRestoring.put

    async def unsynced(self: FileRestoring, snapshot: SnapshotSource, *, is_damaged: bool) -> str | None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(_fs, "_sync", lambda fd: None)
            inner.setattr(_fs, "sync_directory", lambda path: None)
            inner.setattr(self._session, "checkpoint", _no_checkpoint)
            return await put(self, snapshot, is_damaged=is_damaged)

    patch.setattr(FileRestoring, "put", unsynced)


async def _no_checkpoint(_: object) -> None: ...


BUGS = (
    Bug(linked_after_the_rename, workloads.checkpoints_beside_commits, history_bytes=1 << 30),
    Bug(no_sync_of_the_links, workloads.checkpoints_beside_commits, history_bytes=1 << 30),
    Bug(no_sync_of_a_new_history, workloads.given_up, history_bytes=1 << 30),
    Bug(journal_replaced_without_a_link, workloads.given_up, history_bytes=1 << 30),
    Bug(journal_linked_without_its_snapshot, workloads.generations, history_bytes=1 << 30),
    Bug(snapshot_linked_without_its_journal, workloads.generations, history_bytes=1 << 30),
    Bug(records_behind_an_early_look_left_out, workloads.given_up, history_bytes=1 << 30),
    Bug(every_journal_taken_for_copied, workloads.given_up, history_bytes=1 << 30),
    Bug(snapshot_pruned_before_its_journal, workloads.generations, history_bytes=1500),
    Bug(no_sync_between_a_journal_and_its_snapshot, workloads.generations, history_bytes=1500),
    Bug(newest_pruned_first, workloads.generations, history_bytes=1500),
    Bug(too_many_pruned, workloads.less_room, history_bytes=1 << 30),
    Bug(one_too_many_pruned, workloads.generations, history_bytes=1500),
    Bug(the_next_one_is_not_waited_for, workloads.by_age, history_bytes=1 << 30),
    Bug(a_history_in_the_wrong_unit, workloads.by_age, history_bytes=1 << 30),
    Bug(deletions_made_later, workloads.by_age, history_bytes=1 << 30),
    Bug(nothing_is_too_old, workloads.by_age, history_bytes=1 << 30),
    Bug(restore_that_links, workloads.restores, history_bytes=1 << 30),
    Bug(restore_that_keeps_nothing, workloads.restores, history_bytes=1 << 30),
    Bug(restore_without_a_sync, workloads.restores, history_bytes=1 << 30),
)
