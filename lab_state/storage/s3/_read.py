"""Read a state in S3 while a writer may have it open. There is no fence and no probe, and nothing is written.

1. Load as a start does: GET the snapshot, LIST the records after the last one that it covers,
   and GET them. No number may be missing up to the last number in the list.
2. HEAD the snapshot. If it was replaced meanwhile, go back to step 1.

Step 2 is needed because a checkpoint deletes the records that the new snapshot covers. Suppose that
a reader gets the snapshot before the checkpoint, and lists the records after the checkpoint. The reader
finds no records, and would treat the old snapshot as the whole state. If the snapshot is still the same
after the LIST, no later record was deleted before the LIST. A start does not need this step, because it
creates a fence.
"""

from __future__ import annotations

from lab_state.storage._protocol import Reading, no_state
from lab_state.storage.s3._client import Requests
from lab_state.storage.s3._format import Names
from lab_state.storage.s3._open import Loader


async def read_objects(store: Requests, names: Names) -> Reading:
    """Read a state. The docstring of the module has the steps.

    Raises:
        StorageError: See `Storage.read`.
    """
    path = names.url(names.snapshot)
    tries = store.tries("reading", names.snapshot)
    loader = Loader(store, names)
    while True:
        loaded = await loader.load()
        now = await store.head(names.snapshot)
        if (None if now is None else now.etag) == loaded.etag:
            snapshot, records, _, _, crc = loaded.recovery
            if snapshot is None and loaded.last == loaded.covered:
                raise no_state(path, ": check the name, the prefix and the bucket")
            return Reading(snapshot, records, len(records), None, path, crc)
        await tries.pause("a change of the state while it was read")
