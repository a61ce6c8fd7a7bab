"""SIGKILL of a restore before every call with which it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lives import ENVIRONMENT, HERE, in_memory


@pytest.mark.timeout(240)
@pytest.mark.parametrize("state", ["good", "damaged"] if os.environ.get("LAB_STATE_FAULT_RUNS") else ["good"])
def test_killed_at_every_call(tmp_path: Path, state: str) -> None:
    """The state is the one before or the restored one. No moment of the history is lost, and the next restore succeeds."""
    with in_memory(tmp_path) as directory:
        run = subprocess.run(
            [sys.executable, HERE / "restore_killed.py", directory, state],
            capture_output=True,
            text=True,
            check=False,
            env=ENVIRONMENT,
        )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    sys.stdout.write(
        f"killed at {len(found) - 1} calls of a restore: {found.count('restored')} were restored by then\n"
    )
    assert len(found) > 20
    assert found == sorted(found)  # "before" up to one call, and "restored" from there on
    assert {found[0], found[-1]} == {"before", "restored"}
