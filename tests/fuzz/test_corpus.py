"""What the fuzzer found worth keeping, and what it once found a fault with, is loaded by every run of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from loaders import TARGETS

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_of_the_corpus(target: str) -> None:
    """It is loaded, or refused with an error of the error tree; and so is each with its mode changed."""
    inputs = sorted((CORPUS / target).iterdir())
    assert len(inputs) >= 10
    for path in inputs:
        data = path.read_bytes()
        for mode in range(0, 128, 5):
            try:
                TARGETS[target](bytes([mode]) + data[1:])
            except Exception as error:
                error.add_note(f"{path}, with mode {mode}")
                raise
        TARGETS[target](data)


def test_the_corpus_is_small() -> None:
    """It is kept in the repository."""
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert len(sizes) <= 200
    assert sum(sizes) <= 200_000
    assert {path.name for path in CORPUS.iterdir()} == TARGETS.keys()


def test_a_fault_is_found() -> None:
    """A loader that lets another error through fails the replay: the targets swallow none but those of the error tree."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import loaders; from lab_state import _journal\n"
        "def bad(*_): raise IndexError\n"
        "_journal.scan = bad\n"
        "loaders.files(bytes([1]) + b'\\nR{}')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(HERE)], capture_output=True, text=True, check=False)
    assert "IndexError" in done.stderr
