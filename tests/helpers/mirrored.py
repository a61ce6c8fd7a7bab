"""The status of a mirror, for managers that have one."""

from __future__ import annotations

from lab_state import Manager, MirrorStatus


def mirror_of(state: Manager) -> MirrorStatus:
    mirror = state.status().mirror
    assert mirror is not None, "the manager has no cache"
    return mirror
