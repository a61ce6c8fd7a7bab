"""Calls with many keys, which an owner executes in steps. This module does no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from msgspec import Raw

from lab_state import _batch
from lab_state._batch import in_parts
from lab_state._entries import DELETED, Expiring, StoredOrGone
from lab_state._following import stored_of
from lab_state.shared._layer import OwnerLayer
from lab_state.shared._messages import Call, DeleteAll, DeleteMany, Incr, MakeChanges, Set, SetMany


def is_large(call: Call, layer: OwnerLayer) -> bool:
    """Return whether a call may have so many keys that it is executed in steps."""
    if isinstance(call, Set | Incr):  # the most frequent calls
        return False
    if isinstance(call, DeleteAll):  # without a prefix, all keys are deleted in one short step
        return bool(call.prefix) and len(layer.copy.entries) + len(layer.changes) >= _batch.MANY
    return keys_of(call) >= _batch.MANY


def keys_of(call: Call) -> int:
    """Return the number of keys that a call names, with the keys of its check. Return 0 for a call that names at most one key."""
    if isinstance(call, SetMany):
        return len(call.values)
    if isinstance(call, DeleteMany):
        return len(call.keys)
    if isinstance(call, MakeChanges):
        return len(call.keys) + len(call.changes.set) + len(call.changes.delete)
    return 0


def parts_of(call: Call, layer: OwnerLayer) -> Iterator[Mapping[str, StoredOrGone]]:
    """Yield the changes of a call with many keys, in parts. The caller applies each part to the layer before it asks for the next part."""
    if isinstance(call, DeleteMany | DeleteAll):
        for keys in in_parts(call.keys) if isinstance(call, DeleteMany) else layer.candidates(call.prefix):
            yield {key: DELETED for key in keys if layer.has(key)}
    elif isinstance(call, SetMany):
        at = None if call.ttl is None else layer.now() + call.ttl
        yield from _stored_parts(call.values, lambda _: at)
    else:
        assert isinstance(call, MakeChanges)
        made = call.changes
        for keys in in_parts(() if made.clear else made.delete):
            entries = layer.entries
            yield {key: DELETED for key in keys if key in entries}
        yield from _stored_parts(made.set, made.expires.get)


def _stored_parts(
    values: Mapping[str, Raw], at_of: Callable[[str], int | None]
) -> Iterator[Mapping[str, StoredOrGone]]:
    """Yield values in parts, as they are stored. `at_of` returns the expiry of a key; `None` if it never expires."""
    for items in in_parts(values.items()):
        part: dict[str, StoredOrGone] = {}
        for key, raw in items:
            value, at = stored_of(raw), at_of(key)
            part[key] = value if at is None else Expiring(value, at)
        yield part
