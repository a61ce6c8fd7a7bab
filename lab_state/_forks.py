"""Managers, locks and files in a forked child, which inherits them and must not use them.

A child has the memory and the descriptors of its parent, and none of its threads. An
`flock` belongs to the open file, which parent and child share. So the lock would stay held
while the child lives, even after the parent has ended. The child closes the descriptors, and
each object refuses its calls there. An object that was idle at the fork can be used in
the child as in any other process.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Inherited(Protocol):
    """An object that a forked child must not use."""

    def disown(self) -> None:
        """Close the descriptors, and refuse every call from now on. Runs in the child before any other code.

        It must neither wait nor await. The thread that used the object may have been in
        the middle of any of its methods, and does not exist in the child.
        """
        ...


_inherited: WeakSet[Inherited] = WeakSet()
_kept: list[object] = []
_is_registered = False


def disown_in_children(inherited: Inherited) -> None:
    """Register an object: its `disown` is called in each child that is forked while the object lives."""
    global _is_registered  # noqa: PLW0603 -- a function cannot be unregistered, so there is one for all objects
    if not _is_registered:
        _is_registered = True
        if hasattr(os, "register_at_fork"):  # pragma: no branch -- Windows has no fork
            os.register_at_fork(after_in_child=_disown)
    _inherited.add(inherited)


def keep(*inherited: object) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
    """Keep these objects as long as the child lives.

    If they were collected, the last steps of their tasks would run, and their connections
    would be closed. That removes a socket from the selector, which the parent shares.
    """
    _kept.extend(inherited)


def _disown() -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
    for inherited in list(_inherited):
        keep(inherited)
        inherited.disown()
