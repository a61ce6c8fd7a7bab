"""What a mirror is given, in parts."""

from __future__ import annotations

from lab_state._entries import DELETED, Expiring, Json, StoredOrGone
from lab_state.cache._format import slices


def test_a_part() -> None:
    """A part has values as JSON, the times of those that expire, and the keys that were deleted."""
    items: list[tuple[str, StoredOrGone]] = [("good", Json(b"[1]")), ("kept", Expiring("x", 6)), ("gone", DELETED)]
    (part,) = slices(items, 0)
    assert part is not None
    assert part.values == {"good": b"[1]", "kept": b'"x"'}
    assert part.expires == {"kept": 6}
    assert part.deleted == ["gone"]
