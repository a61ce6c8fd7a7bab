"""The command `lab-state`, as `python -m lab_state`."""

from __future__ import annotations

from lab_state.cli import main

if __name__ == "__main__":
    main()
