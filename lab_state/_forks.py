"""Managers, locks and files that a forked child inherits, and must not use.

A child has the memory and the descriptors of its parent, but only the thread that forked.
An `flock` belongs to the open file, which parent and child share. So the lock would stay held
while the child runs, even after the parent has ended. Therefore the child closes the inherited
descriptors. An object that was in use at the fork refuses all calls in the child. An object that was
idle at the fork can be used in the child as in any other process.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Inherited(Protocol):
    """An object that a forked child must not use."""

    def disown(self) -> None:
        """Close the descriptors, and refuse every call if the object is in use. This runs in the child, before the fork returns.

        The method must neither block nor await. At the fork, another thread may have been in the middle
        of any method of the object. That thread does not exist in the child.
        """
        ...


_inherited: WeakSet[Inherited] = WeakSet()
_kept: list[object] = []
_is_registered = False


def disown_in_children(inherited: Inherited) -> None:
    """Register an object. Its `disown` is called in each child that is forked while the object exists."""
    global _is_registered  # noqa: PLW0603 -- Python cannot unregister a function, so one function is registered for all objects
    if not _is_registered:
        _is_registered = True
        if hasattr(os, "register_at_fork"):  # pragma: no branch -- Windows has no fork
            os.register_at_fork(after_in_child=_disown)
    _inherited.add(inherited)


def keep(*inherited: object) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
    """Keep references to these objects as long as the child runs.

    If the objects were collected, the `finally` blocks of their tasks would run, and their
    connections would be closed. Closing a connection removes its socket from the selector, and
    the parent uses the same selector.
    """
    _kept.extend(inherited)


def _disown() -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
    for inherited in list(_inherited):
        keep(inherited)
        inherited.disown()
