"""What a mirror is given, in parts."""

from __future__ import annotations

from lab_state._expiry import Expiring
from lab_state._state import DELETED, Changed
from lab_state.cache._format import slices


def test_what_is_not_json_counts_as_deleted() -> None:
    """A `msgspec.Raw` that is not JSON reaches no reader; its key counts as deleted, without an expiry time."""
    items: list[tuple[str, Changed]] = [
        ("good", b"[1]"),
        ("bad", b"nope"),
        ("half", b'1,"x":2'),
        ("late", Expiring(b"nope", 5)),
        ("kept", Expiring("x", 6)),
        ("gone", DELETED),
    ]
    (part,) = slices(items)
    assert part.values == {"good": b"[1]", "kept": b'"x"'}
    assert part.expires == {"kept": 6}
    assert sorted(part.deleted) == ["bad", "gone", "half", "late"]
