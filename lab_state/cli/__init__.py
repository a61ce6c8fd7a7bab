"""The command `lab-state`: it reads, changes and checks states from a shell.

`main` is the entry point. `_app` defines the subcommands, with their arguments and help. Other modules of this folder do their work.
"""

from __future__ import annotations

import importlib.util
import signal
import sys

MISSING_EXTRA = "lab-state: the command needs the extra `cli`: pip install 'lab-state[cli]'\n"


def main() -> None:
    """Run the command with the arguments of this process, and exit with its code.

    Without the extra `cli`, print one line to stderr, and exit with the code 2.
    """
    try:
        if raises := signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # An import may hide a `KeyboardInterrupt`. So until the subcommand begins, the kernel ends the process.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if any(importlib.util.find_spec(name) is None for name in ("click", "rich")):
            sys.stderr.write(MISSING_EXTRA)
            sys.exit(2)
        from lab_state.cli._app import run  # noqa: PLC0415 -- it imports click, which is an extra

        if raises:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:  # before or after the subcommand itself, which has its own rule for Ctrl-C
        sys.exit(130)
