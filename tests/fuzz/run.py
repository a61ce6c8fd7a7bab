"""Coverage-guided fuzzing of one target: `python tests/fuzz/run.py files --executions 1000000`.

Needs atheris (`pip install atheris`), which has wheels for Python 3.11 to 3.13. Inputs that reach something new are
written to the directory given with `--new`; the corpus of the repository is read, and left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(path.name for path in (HERE / "corpus").iterdir()))
    parser.add_argument("--executions", type=int, default=0, help="stop after so many; 0 for never")
    parser.add_argument("--seconds", type=int, default=0, help="stop after so long; 0 for never")
    parser.add_argument("--new", type=Path, help="where new inputs go; a temporary directory when not given")
    parser.add_argument(
        "--keep", action="store_true", help="do not fuzz: add those of --new to the corpus that reach more"
    )
    parser.add_argument("--seed", type=int, default=0, help="0 for another one each time")
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if arguments.keep:
        if arguments.new is None:
            parser.error("--keep needs --new, the directory with the inputs to choose from")
        keep(arguments.target, arguments.new)
        return
    try:
        import atheris  # noqa: PLC0415 -- only here is it needed
    except ImportError:
        sys.exit("the fuzzer needs atheris: pip install atheris (Python 3.11 to 3.13)")
    with atheris.instrument_imports(include=["lab_state"]):
        from loaders import TARGETS  # noqa: PLC0415 -- what is imported here is instrumented
    corpus = HERE / "corpus" / arguments.target
    with tempfile.TemporaryDirectory() as temporary:
        new = arguments.new or Path(temporary)
        new.mkdir(parents=True, exist_ok=True)
        flags = [
            f"-atheris_runs={arguments.executions}" if arguments.executions else "-runs=-1",
            f"-max_total_time={arguments.seconds}",
            f"-seed={arguments.seed}",
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-max_len=2048",
            f"-artifact_prefix={new}/",
            "-print_final_stats=1",
        ]
        directories = [str(new), str(corpus)]
        atheris.Setup([sys.argv[0], *flags, *directories], TARGETS[arguments.target])
        atheris.Fuzz()


def keep(target: str, new: Path) -> None:
    """Add the shortest inputs that reach, one after the other, steps from line to line that none before reached."""
    from loaders import TARGETS  # noqa: PLC0415 -- not before it is known that nothing is fuzzed here

    corpus = HERE / "corpus" / target
    known: set[object] = set()
    inputs = [*sorted(corpus.iterdir()), *sorted(new.iterdir(), key=lambda path: path.stat().st_size)]
    for path in inputs:
        data = path.read_bytes()
        reached = steps(lambda data=data: TARGETS[target](data))  # type: ignore[misc]
        if path.parent != corpus and not reached <= known:
            (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        known |= reached


def steps(call: Callable[[], None]) -> set[object]:
    """Return the steps from line to line that a call takes in the package."""
    reached: set[object] = set()
    last: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if "lab_state" not in frame.f_code.co_filename:
            return None
        reached.add((frame.f_code, last.get(frame), frame.f_lineno, event))
        last[frame] = frame.f_lineno
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return reached


if __name__ == "__main__":
    main()
