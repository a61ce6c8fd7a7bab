"""What the applications of the tests of servers share: the manager, and the counting of each id exactly once."""

from __future__ import annotations

import os
from typing import Any

from lab_state import Config, FileStorage, Manager, Transaction

NAME = "counts"


def make_manager() -> Manager:
    """Return the manager of one worker, with the settings in the environment."""
    config = Config(NAME, shared=True, owner_timeout=float(os.environ.get("OWNER_TIMEOUT", "10")))
    return Manager(config, FileStorage(os.environ["STATE_DIRECTORY"]))


async def count(state: Manager, name: str) -> dict[str, Any]:
    """Count an id, unless it was counted before. Return its number, and which process has counted it.

    The text before the first dash of an id names its counter.
    """

    def once(tx: Transaction) -> int:
        if (number := tx.get(f"id/{name}", 0, type=int)) == 0:
            number = tx.incr(f"count/{name.partition('-')[0]}", type=int)
            tx.set(f"id/{name}", number)
        return number

    return {"number": await state.transact(once), "pid": os.getpid(), "role": state.role}
