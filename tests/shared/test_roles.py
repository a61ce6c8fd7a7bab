"""What must differ in a shared state is a list of tests, and each of them exists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from roles import DIFFERENT, names_of

TESTS = Path(__file__).parent.parent


def test_the_list_names_tests_that_exist() -> None:
    """Each test that does not run in a shared state is named once, and would run there otherwise."""
    listed = [test for tests in DIFFERENT.values() for test in tests]
    assert len(listed) == len(set(listed))
    modules = sorted({TESTS / test.partition("::")[0] for test in listed})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *map(str, modules)]
    collected = subprocess.run(command, cwd=TESTS.parent, check=True, capture_output=True, text=True, timeout=60)
    found = {name for line in collected.stdout.splitlines() for name in names_of(line)}
    assert set(listed) - found == set()
