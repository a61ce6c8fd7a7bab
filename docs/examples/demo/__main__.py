"""Begin the demo: `python docs/examples/demo`, or `nox -s demo`."""

from __future__ import annotations

import signal
import sys

# Until the demo handles Ctrl-C itself, the default action ends the process without a traceback.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from demo import main  # noqa: E402 -- the imports take the longest, and Ctrl-C may come in the middle of them

if __name__ == "__main__":
    sys.exit(main())
