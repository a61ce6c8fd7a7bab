"""Reading a state in S3 beside its writer: no fence, no probe, nothing is written.

Load as a start does: GET the snapshot, LIST what comes after the number that it covers, GET the
records; no number may be missing up to the last one listed. Then HEAD the snapshot: where it is
another one by now, begin again. So no record behind the one that was read was deleted before the
LIST: a checkpoint deletes only what a snapshot covers that is in place. Without this, a reader
that read the snapshot before a checkpoint and listed after it would find nothing behind the old
snapshot, and take that for the whole. A start has its fence for that.
"""

from __future__ import annotations

from lab_state.exceptions import UnsupportedError
from lab_state.storage._protocol import Reading
from lab_state.storage.s3._client import Requests
from lab_state.storage.s3._format import Names
from lab_state.storage.s3._open import Loader


async def read_objects(store: Requests, names: Names) -> Reading:
    """Read a state; see the module.

    Raises:
        StorageError: It could not; see `Storage.read`.
    """
    path = names.url(names.snapshot)
    tries = store.tries("reading", names.snapshot)
    loader = Loader(store, names)
    while True:
        loaded = await loader.load()
        now = await store.head(names.snapshot)
        if (None if now is None else now.etag) == loaded.etag:
            snapshot, records, _, _, crc = loaded.recovery
            if snapshot is None and not loaded.last:
                raise UnsupportedError(f"there is no state at {path}: check the name, the prefix and the bucket")
            return Reading(snapshot, records, len(records), None, path, crc)
        await tries.pause("it was changed meanwhile")
