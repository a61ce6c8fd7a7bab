"""The subcommand `repair`: it makes a damaged state loadable, keeps its files, and lists what is lost."""

from __future__ import annotations

import time

from lab_state._clock import SystemClock
from lab_state._expiry import resumed
from lab_state._loading import load
from lab_state._restore import snapshot_source
from lab_state.cli._output import Output
from lab_state.cli._salvage import Salvaged, salvage, salvage_objects
from lab_state.cli._storages import check_deposes, storage_at
from lab_state.cli._target import Target
from lab_state.cli._text import counted
from lab_state.exceptions import CorruptionError
from lab_state.storage import _fs as fs
from lab_state.storage._directory import Paths
from lab_state.storage._history import Restoring, history_of
from lab_state.storage._protocol import Storage

_MOST = 20
"""The largest number of losses that are shown for people. Each lost record is one loss."""


async def repair(output: Output, state: Target, *, dry_run: bool, depose: bool, json: bool) -> None:
    """Repair a state, or only list what a repair would lose."""
    storage = storage_at(state.place, create=True)
    try:
        loaded = await load(state.name, storage)
    except CorruptionError as error:
        reason = str(error)
    else:
        if json:
            output.one(repaired=False, keys=len(loaded.state.entries), lost=[], revision=None, kept=None)
        else:
            output.line("the state can be loaded: there is nothing to repair")
        return
    if dry_run:
        saved, revision, kept = await _salvaged(state, storage), None, None
    else:
        check_deposes(state, depose=depose)
        saved, revision, kept = await _repaired(state, storage)
    if json:
        output.one(repaired=not dry_run, keys=len(saved.state.entries), lost=saved.lost, revision=revision, kept=kept)
        return
    output.line(f"damage: {output.text(reason)}")
    for sentence in saved.lost[:_MOST]:
        output.line(f"lost: {output.text(sentence)}")
    if len(saved.lost) > _MOST:
        output.line(f"lost: {len(saved.lost) - _MOST} more: --json lists all of them")
    done = "a repair would keep" if dry_run else f"revision {revision} has"
    output.line(f"{done} {counted(len(saved.state.entries), 'key')}, with the changes up to {saved.state.revision}")
    if kept is not None:
        what = "objects" if state.place.bucket else "files"
        output.line(f"the damaged {what} are in {output.text(kept)}; delete them when they are no longer needed")


async def _salvaged(state: Target, storage: Storage, restoring: Restoring | None = None) -> Salvaged:
    """Return what can be saved of a state. Nothing is changed. `restoring` has the state open, if a repair follows."""
    if state.place.bucket:
        from lab_state.storage.s3 import S3Storage  # noqa: PLC0415 -- only a bucket needs it
        from lab_state.storage.s3._pieces import read_pieces  # noqa: PLC0415 -- only a bucket needs it
        from lab_state.storage.s3._restoring import S3Restoring  # noqa: PLC0415 -- only a bucket needs it

        if isinstance(restoring, S3Restoring):
            return salvage_objects(await restoring.pieces())
        assert isinstance(storage, S3Storage)
        return salvage_objects(await storage._run(state.name, read_pieces))  # noqa: SLF001 -- a storage has no public call for this
    paths = Paths.of(state.place.directory, state.name)
    snapshot, data = fs.read(paths.snapshot), fs.read(paths.journal)
    return salvage(snapshot, data, state.name)


async def _repaired(state: Target, storage: Storage) -> tuple[Salvaged, int, str | None]:
    """Repair a state under its lock or fence. Return what was saved, the new revision, and the place of the damaged files."""
    history = history_of(storage)
    restoring = await history.restoring(state.name)
    try:
        saved = await _salvaged(state, storage, restoring)
        reached = [one.span.last.revision for one in (await history.generations(state.name)).found]
        revision = max(saved.highest, await restoring.highest(), *reached) + 1
        now = resumed(saved.state.time, saved.state.wall, time.time())[0]
        source = snapshot_source(saved.state, revision, now, SystemClock())
        return saved, revision, await restoring.put(source, is_damaged=True)
    finally:
        await restoring.aclose()
