"""Bugs that are put into the library, one at a time, to prove that the exploration finds what it looks for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import workloads
from explore import Recording, deaths, failing_syncs, full_disks
from recorder import Faults
from workloads import Workload

from lab_state import StorageError, _codec, _journal
from lab_state._entries import ChangeSet
from lab_state._journal import ANY_BASE, NO_BASE, Accepted, FrameKind, Scan
from lab_state._state import State
from lab_state.storage import _directory, _file_start, _fs, _lookup
from lab_state.storage._directory import Paths
from lab_state.storage._file_writer import Need, Writer
from lab_state.storage._leftovers import Leftovers
from lab_state.storage._lock import Lock
from lab_state.storage._lookup import Fingerprint
from lab_state.storage._new_journal import NewJournal
from lab_state.storage._os_errors import translated
from lab_state.storage._protocol import Recovery

Patch = pytest.MonkeyPatch


def _system() -> Any:
    """Return what `_fs` takes for the module `os`."""
    return _fs.os  # type: ignore[attr-defined]  # its own, not for export


def no_faults(clean: Recording) -> Iterable[Faults]:
    return (Faults(),)


class Bug(NamedTuple):
    """A bug, and where it shows.

    Attributes:
        apply: Puts it in.
        workload: What finds it.
        plans: With which calls failing.
        restart: Whether another process goes on after the first failure.
        first: Which of the plans is the first to be tried.
        history_bytes: The most bytes of the history; without it, there is none.
    """

    apply: Callable[[Patch], None]
    workload: Workload = workloads.one_writer
    plans: Callable[[Recording], Iterable[Faults]] = no_faults
    restart: bool = False
    first: int = 0
    history_bytes: int | None = None


# Syncs that are missing


def no_sync_of_a_commit(patch: Patch) -> None:
    """Write a frame, and do not sync it."""
    patch.setattr(_fs, "_sync_data", lambda fd: None)


def acknowledged_before_the_sync(patch: Patch) -> None:
    """Sync a frame only with the next one."""

    def append(fd: int, path: str, parts: Sequence[bytes], offset: int, progress: _fs.WrittenBytes) -> None:
        _fs._sync_data(fd)
        _fs._write(fd, parts, offset, progress)

    patch.setattr(_fs, "append", append)


def no_sync_of_a_snapshot(patch: Patch) -> None:
    """Rename a new snapshot with its bytes in the cache."""
    patch.setattr(_fs.NewFile, "finish", lambda self: self._close())


def no_sync_of_a_new_journal(patch: Patch) -> None:
    """Rename a new journal with its bytes in the cache."""

    def create(path: str, parts: Sequence[bytes], progress: _fs.WrittenBytes, *_: str) -> int:
        fd: int = _system().open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _fs._write(fd, parts, 0, progress)
        return fd

    patch.setattr(_fs, "create", create)


def _no_directory_sync_behind(patch: Patch, suffix: str) -> None:
    rename, sync, last = _fs.rename, _fs.sync_directory, [""]

    def renamed(temporary: str, path: str) -> None:
        last[0] = Path(path).suffix
        rename(temporary, path)

    patch.setattr(_fs, "rename", renamed)
    patch.setattr(_fs, "sync_directory", lambda path: None if last[0] == suffix else sync(path))


def no_directory_sync_behind_a_snapshot(patch: Patch) -> None:
    """Let the name of a new snapshot be lost while the journal that follows it stays."""
    _no_directory_sync_behind(patch, ".json")


def no_directory_sync_behind_a_journal(patch: Patch) -> None:
    """Let the name of a new journal be lost."""
    _no_directory_sync_behind(patch, ".journal")


def no_sync_of_a_new_directory(patch: Patch) -> None:
    """Let the directory itself be lost."""
    patch.setattr(_directory, "_make", lambda path: Path(path).mkdir(parents=True, exist_ok=True))
    patch.setattr(_directory, "sync_parents", lambda path: None)


def directory_of_a_dead_process_trusted(patch: Patch) -> None:
    """Take a directory that is there for one whose name is durable."""
    patch.setattr(_directory, "sync_parents", lambda path: None)


def no_sync_of_what_was_put_there(patch: Patch) -> None:
    """Build upon a snapshot as it is, although a user put it there a moment ago."""
    patch.setattr(Writer, "_sync_found", lambda self, base, *journal: None)


def snapshot_of_a_copied_directory_trusted(patch: Patch) -> None:
    """Take a snapshot that the journal beside it names for one that was synced."""
    load, sync = _file_start._load, Writer._sync_found

    def loaded(paths: Paths, name: str, lock: Lock, leftovers: Leftovers, *, whole: bool) -> tuple[Writer, Recovery]:
        found = load(paths, name, lock, leftovers, whole=whole)
        vouched.append(not found[1].unsettled and Path(paths.journal).exists())
        return found

    def synced(self: Writer, base: str, *journal: str) -> None:
        sync(self, NO_BASE if vouched[-1] else base, *journal)

    vouched: list[bool] = []
    patch.setattr(_file_start, "_load", loaded)
    patch.setattr(Writer, "_sync_found", synced)


def directories_above_a_journal_trusted(patch: Patch) -> None:
    """Take the names above a journal for synced."""
    sync = _directory.sync_parents
    patch.setattr(_directory, "sync_parents", lambda path: None if any(Path(path).glob("*.journal")) else sync(path))


# Files that change under a running manager


def _problem_not_noticed(patch: Patch, told: str) -> None:
    problem = Writer._problem

    def noticed(self: Writer, named: Fingerprint | None, opened: Fingerprint | None) -> str | None:
        found = problem(self, named, opened)
        return None if found is None or told in found else found

    patch.setattr(Writer, "_problem", noticed)


def cut_off_journal_not_noticed(patch: Patch) -> None:
    """Take a journal of the same inode for the one that was written, whatever its size."""
    _problem_not_noticed(patch, "cut off")


def overwritten_journal_not_noticed(patch: Patch) -> None:
    """Take a journal of the same inode and size for the one that was written."""
    _problem_not_noticed(patch, "overwritten")


def closed_descriptor_not_noticed(patch: Patch) -> None:
    """Let commits go on to the number that the journal had."""
    patch.setattr(Writer, "_opened", lambda self: _lookup.fingerprint(self.paths.journal))
    patch.setattr(_lookup, "is_as_left", lambda path, _, left: _lookup.fingerprint(path) == left)


# Failures


def failed_sync_repeated(patch: Patch) -> None:
    """Repeat a failed sync: the kernel reports success the second time, and has lost the data."""
    sync = _fs._sync_data

    def twice(fd: int) -> None:
        try:
            sync(fd)
        except OSError:
            sync(fd)

    patch.setattr(_fs, "_sync_data", twice)


def _failed_directory_sync(patch: Patch, failed: Callable[[Writer], None]) -> None:
    put_in_place = Writer._put_in_place

    def put(self: Writer, new: NewJournal, *replaced: list[int]) -> None:
        self._poison = lambda: failed(self)  # type: ignore[method-assign]
        try:
            put_in_place(self, new, *replaced)
        finally:
            del self._poison

    patch.setattr(Writer, "_put_in_place", put)
    patch.setattr(Writer, "_problem", lambda self, named, opened: None)


def old_journal_kept_after_a_failed_directory_sync(patch: Patch) -> None:
    """Let commits go on into a file whose name may be gone."""
    _failed_directory_sync(patch, lambda writer: None)


def new_journal_used_after_a_failed_directory_sync(patch: Patch) -> None:
    """Let commits go on into a file whose name may never come."""
    sync = _fs.sync_directory

    def synced(path: str) -> None:
        with contextlib.suppress(StorageError):
            sync(path)

    patch.setattr(_fs, "sync_directory", synced)


def failed_changes_forgotten(patch: Patch) -> None:
    """Forget the changes of a failed commit."""

    def forget(self: State, taken: ChangeSet) -> None:
        self.taken = taken.start

    patch.setattr(State, "put_back", forget)


def cut_short_write_left_in_place(patch: Patch) -> None:
    """Write the next frame behind the rest of one that found no room."""

    def append(fd: int, path: str, parts: Sequence[bytes], offset: int, progress: _fs.WrittenBytes) -> None:
        with translated("writing", path):
            _fs._write(fd, parts, os.fstat(fd).st_size, progress)
            _fs._sync_data(fd)

    patch.setattr(_fs, "append", append)


# The order of a checkpoint


def no_checkpoint_frame(patch: Patch) -> None:
    """Rename a snapshot that nothing in the journal names."""
    append = Writer._append
    patch.setattr(
        Writer,
        "_append",
        lambda self, kind, payload: None if kind is FrameKind.CHECKPOINT else append(self, kind, payload),
    )


def journal_before_snapshot(patch: Patch) -> None:
    """Put the new journal in place before the snapshot that it follows."""

    def publish(self: Writer, new: str, upcoming: NewJournal, size: int, since: list[bytes], _: int) -> None:
        upcoming.add(since[upcoming.records :])
        self._put_in_place(upcoming)
        _fs.rename(new, self.paths.snapshot)
        _fs.sync_directory(self.paths.directory)
        self.base, self.snapshot_fingerprint, self.snapshot_bytes = (
            upcoming.base,
            _lookup.fingerprint(self.paths.snapshot),
            size,
        )

    patch.setattr(Writer, "publish", publish)


def journal_truncated_in_place(patch: Patch) -> None:
    """Let a checkpoint empty the journal instead of replacing it."""
    put_in_place = Writer._put_in_place

    def truncate(self: Writer, new: NewJournal, *replaced: list[int]) -> None:
        if self.need is not Need.NOTHING or new.base == ANY_BASE:
            put_in_place(self, new, *replaced)
            return
        data = os.pread(new.fd, new.end, 0)
        self._salt, self.end = new.salt, new.end
        _system().ftruncate(self._fd, 0)
        _fs.append(self._fd, self.paths.journal, [data], 0, self.progress)

    patch.setattr(Writer, "_put_in_place", truncate)


def commits_beside_a_checkpoint_dropped(patch: Patch) -> None:
    """Leave out of the next journal what was committed while the snapshot was written."""
    patch.setattr(NewJournal, "add", lambda self, records: None)


def last_commits_beside_a_checkpoint_not_synced(patch: Patch) -> None:
    """Rename the next journal with its last records in the cache."""

    def add(self: NewJournal, records: list[bytes]) -> None:
        parts = self._framed((FrameKind.RECORD, record) for record in records)
        _fs._write(self.fd, parts, self.end, self._progress)
        self.end += sum(map(len, parts))

    patch.setattr(NewJournal, "add", add)


def records_counted_that_were_not_written(patch: Patch) -> None:
    """Take the records committed before the next journal was begun for a part of it."""

    def prepare(self: Writer, upcoming: NewJournal, base: str, since: list[bytes]) -> None:
        upcoming.create(base)
        upcoming.records = len(since)

    patch.setattr(Writer, "prepare", prepare)


def expiry_left_out(patch: Patch) -> None:
    """Leave out the times, so that an expired key comes back to stay."""

    def nothing(*_: Any) -> Iterator[bytes]:
        yield b""

    patch.setattr(_codec, "times", nothing)


# Recovery


def no_checksum(patch: Patch) -> None:
    """Take a frame for whole if it has a head and ends with a newline."""

    def frame_at(data: bytes, position: int, salt: str) -> tuple[bytes, bytes, int] | None:
        match = _journal._FRAME.match(data, position)
        if match is None:
            return None
        end = match.end() + int(match[3])
        if end >= len(data) or data[end : end + 1] != b"\n":
            return None
        return match[4], data[match.end() : end], end + 1

    patch.setattr(_journal, "_frame_at", frame_at)


def torn_tail_taken_for_whole(patch: Patch) -> None:
    """Count a frame that the end of the file cuts short."""
    whole = _journal._frame_at

    def frame_at(data: bytes, position: int, salt: str) -> tuple[bytes, bytes, int] | None:
        match = _journal._FRAME.match(data, position)
        if match is not None and match.end() + int(match[3]) >= len(data):
            return match[4], data[match.end() :], len(data)
        return whole(data, position, salt)

    patch.setattr(_journal, "_frame_at", frame_at)


def torn_tail_refused(patch: Patch) -> None:
    """Take bytes behind the last frame for damage."""
    patch.setattr(
        _journal, "_valid_frame_behind", lambda data, position, salt: position if position < len(data) else None
    )


def inherited_journal_appended_to(patch: Patch) -> None:
    """Let commits go on behind frames that may be in the page cache alone."""
    load = _file_start._load

    def loaded(paths: Paths, name: str, lock: Lock, leftovers: Leftovers, *, whole: bool) -> tuple[Writer, Recovery]:
        data = _fs.read(paths.journal)
        writer, recovery = load(paths, name, lock, leftovers, whole=whole)
        if data is not None:
            scan = _journal.scan(data, name, "journal")
            fd = _system().open(paths.journal, os.O_RDWR)
            writer._use(fd, _lookup.fingerprint_of(fd, paths.journal))
            writer._salt, writer.end, writer.need = scan.header.salt, scan.end, Need.NOTHING
            if scan.end < len(data):
                _system().ftruncate(writer._fd, scan.end)
        return writer, recovery

    patch.setattr(_file_start, "_load", loaded)


def inherited_journal_deleted(patch: Patch) -> None:
    """Keep the recovered state in memory alone until the new journal is written."""
    load = _file_start._load

    def loaded(paths: Paths, name: str, lock: Lock, leftovers: Leftovers, *, whole: bool) -> tuple[Writer, Recovery]:
        found = load(paths, name, lock, leftovers, whole=whole)
        _fs.discard(paths.journal)
        return found

    patch.setattr(_file_start, "_load", loaded)


def no_full_journal_after_an_unclean_end(patch: Patch) -> None:
    """Let a start after a crash go on as after a clean stop."""
    accept = _journal.accept

    def accepted(found: Scan | None, size: int, base: str, path: str) -> Accepted:
        return accept(found, size, base, path)._replace(unclean=False)

    patch.setattr(_journal, "accept", accepted)


def recovered_state_acknowledged_unwritten(patch: Patch) -> None:
    """Count the state that was found as durable, although it may be in the page cache alone."""
    load = _file_start._load

    def loaded(paths: Paths, name: str, lock: Lock, leftovers: Leftovers, *, whole: bool) -> tuple[Writer, Recovery]:
        writer, recovery = load(paths, name, lock, leftovers, whole=whole)
        return writer, recovery._replace(unsettled=False)

    patch.setattr(_file_start, "_load", loaded)


# The end of a journal, and copied journals


def frames_appended_behind_the_end(patch: Patch) -> None:
    """Continue a journal behind its end, and not in its place."""
    adopt = Writer.adopt
    patch.setattr(Writer, "adopt", lambda self, salt, end, left: adopt(self, salt, left.size, left))


def continued_journal_trusted(patch: Patch) -> None:
    """Take a journal with an end, and the snapshot beside it, for synced, although they may have been copied."""
    adopt = Writer.adopt

    def adopted(self: Writer, salt: str, end: int, left: Fingerprint) -> None:
        adopt(self, salt, end, left)
        self.unsynced = False

    patch.setattr(Writer, "adopt", adopted)


def every_journal_continued(patch: Patch) -> None:
    """Continue a journal without an end, as if it had one."""
    accept = _journal.accept

    def accepted(found: Scan | None, size: int, base: str, path: str) -> Accepted:
        return accept(found, size, base, path)._replace(unclean=False)

    def go_on(writer: Writer, found: Scan, _: Accepted) -> None:
        left = _lookup.fingerprint(writer.paths.journal)
        assert left is not None
        if found.frames and found.end == left.size and found.names(writer.base):
            writer.adopt(found.header.salt, found.end, left)

    patch.setattr(_journal, "accept", accepted)
    patch.setattr(_file_start, "_continue", go_on)


def _copied(patch: Patch, copied: Callable[[tuple[bytes, ...]], tuple[bytes, ...]]) -> None:
    inherit = Writer.inherit
    patch.setattr(Writer, "inherit", lambda self, records, wall: inherit(self, copied(records), wall))


def last_record_not_copied(patch: Patch) -> None:
    """Leave out of the copied journal the last record, which may have been acknowledged."""
    _copied(patch, lambda records: records[:-1])


def torn_tail_copied(patch: Patch) -> None:
    """Copy the end of a journal as it is, without a look whether it is a record."""
    load = _file_start._load

    def loaded(paths: Paths, name: str, lock: Lock, leftovers: Leftovers, *, whole: bool) -> tuple[Writer, Recovery]:
        writer, recovery = load(paths, name, lock, leftovers, whole=whole)
        if recovery.dropped_bytes and writer.need is Need.NEW:
            data = _fs.read(paths.journal) or b""
            writer.inherit((*recovery.records, data[-recovery.dropped_bytes :]), 0)
        return writer, recovery

    patch.setattr(_file_start, "_load", loaded)


def snapshot_of_a_copied_journal_not_synced(patch: Patch) -> None:
    """Let a copied journal follow a snapshot that may be in the page cache alone."""
    sync = Writer._sync_found
    patch.setattr(
        Writer, "_sync_found", lambda self, base, *journal: sync(self, NO_BASE if self._inherited else base, *journal)
    )


def name_of_a_copied_journal_not_synced(patch: Patch) -> None:
    """Use a copied journal whose name may be lost."""
    put_in_place = Writer._put_in_place

    def put(self: Writer, new: NewJournal, *replaced: list[int]) -> None:
        with pytest.MonkeyPatch.context() as inner:
            if self._inherited:
                inner.setattr(_fs, "sync_directory", lambda path: None)
            put_in_place(self, new, *replaced)

    patch.setattr(Writer, "_put_in_place", put)


def copied_journal_behind_a_checkpoint_frame(patch: Patch) -> None:
    """Let a copied journal follow a snapshot that only a checkpoint frame names. The name of that snapshot may be lost."""

    def go_on(writer: Writer, found: Scan, accepted: Accepted) -> None:
        if accepted.unclean and found.header.base != ANY_BASE and found.names(writer.base):
            writer.inherit(accepted.records, found.header.wall)
        else:
            really(writer, found, accepted)

    really = _file_start._continue
    patch.setattr(_file_start, "_continue", go_on)


BUGS = (
    Bug(no_sync_of_a_commit),
    Bug(acknowledged_before_the_sync),
    Bug(no_sync_of_a_snapshot, workloads.checkpoints_beside_commits),
    Bug(no_sync_of_a_new_journal),
    Bug(no_directory_sync_behind_a_snapshot, workloads.checkpoints_beside_commits),
    Bug(no_directory_sync_behind_a_journal),
    Bug(no_sync_of_a_new_directory),
    Bug(directory_of_a_dead_process_trusted, workloads.steps, deaths, restart=True, first=1),
    Bug(no_sync_of_what_was_put_there, workloads.put_by_hand),
    Bug(snapshot_of_a_copied_directory_trusted, workloads.moved),
    Bug(directories_above_a_journal_trusted, workloads.moved),
    Bug(cut_off_journal_not_noticed, workloads.changed_in_place),
    Bug(overwritten_journal_not_noticed, workloads.changed_in_place),
    Bug(closed_descriptor_not_noticed, workloads.changed_in_place),
    Bug(failed_sync_repeated, workloads.steps, failing_syncs, first=6),
    Bug(old_journal_kept_after_a_failed_directory_sync, workloads.steps, failing_syncs, first=12),
    Bug(new_journal_used_after_a_failed_directory_sync, workloads.steps, failing_syncs, first=5),
    Bug(failed_changes_forgotten, workloads.steps, full_disks),
    Bug(cut_short_write_left_in_place, workloads.steps, full_disks, first=4),
    Bug(no_checkpoint_frame, workloads.checkpoints_beside_commits),
    Bug(journal_before_snapshot, workloads.checkpoints_beside_commits),
    Bug(journal_truncated_in_place, workloads.checkpoints_beside_commits),
    Bug(commits_beside_a_checkpoint_dropped, workloads.checkpoints_beside_commits),
    Bug(last_commits_beside_a_checkpoint_not_synced, workloads.checkpoints_beside_commits),
    Bug(records_counted_that_were_not_written, workloads.journals_written_beside_commits),
    Bug(expiry_left_out, workloads.expiring),
    Bug(no_checksum),
    Bug(torn_tail_taken_for_whole),
    Bug(torn_tail_refused),
    Bug(inherited_journal_appended_to, workloads.steps, failing_syncs, restart=True, first=5),
    Bug(inherited_journal_deleted, workloads.unclean_ends),
    Bug(no_full_journal_after_an_unclean_end, workloads.unclean_ends),
    Bug(recovered_state_acknowledged_unwritten, workloads.steps, failing_syncs, restart=True, first=6),
    Bug(frames_appended_behind_the_end, workloads.handed_over),
    Bug(continued_journal_trusted, workloads.moved),
    Bug(every_journal_continued, workloads.handed_over, failing_syncs, restart=True),
    Bug(last_record_not_copied, workloads.killed_again_and_again),
    Bug(torn_tail_copied, workloads.handed_over),
    Bug(snapshot_of_a_copied_journal_not_synced, workloads.moved),
    Bug(name_of_a_copied_journal_not_synced, workloads.killed_again_and_again),
    Bug(copied_journal_behind_a_checkpoint_frame, workloads.steps, failing_syncs, restart=True, first=12),
)
