"""The slices of a mirror."""

from __future__ import annotations

from lab_state._entries import DELETED, Expiring, Json, StoredOrGone
from lab_state.cache._format import slices


def test_a_part() -> None:
    """A slice has values as JSON, the times of keys that expire, and the deleted keys."""
    items: list[tuple[str, StoredOrGone]] = [("good", Json(b"[1]")), ("kept", Expiring("x", 6)), ("gone", DELETED)]
    (part,) = slices(items, 0)
    assert part is not None
    assert part.values == {"good": b"[1]", "kept": b'"x"'}
    assert part.expires == {"kept": 6}
    assert part.deleted == ["gone"]
