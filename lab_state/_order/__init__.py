"""The keys of a state in order of code points. This module does no I/O.

A `State` makes an `Index` when a call needs sorted keys and there is no index. Other modules call these methods of the state:

- `State.index_steps()` returns an iterator that builds the index, or brings it up to date, in steps of
  a few milliseconds. An asynchronous call runs it first, if `State.is_index_behind` is True, and lets the
  event loop run between two steps. Without these steps, the methods below do the necessary work in one step.
- `State.pieces(low, high)` returns the keys in a range at this moment, as sorted tuples. The keys of each
  tuple are above all keys of the tuple before. Expired keys are included, so the caller must check each entry.
- `State.names(low, high, limit, reverse=...)` returns the keys in a range that have not expired.
- `State.count_in(low, high)` returns the number of these keys.
- `State.note_many(keys)` tells the index that keys may have been added or removed. Code that
  changes `State.entries` without a method of `State` must call `note_many`, or `Index.note`, in the same
  step as the change. Without an index, `note_many` does nothing. A replaced value needs no note. `_index.py`
  describes one change that may come without a note.

The function `bounds(prefix, after, reverse=...)` makes the two bounds of a range.
"""

from lab_state._order._index import CHUNKS_AT_ONCE, Index, bounds, corrected, in_range
from lab_state._order._sorted_keys import Chunk

__all__ = ["CHUNKS_AT_ONCE", "Chunk", "Index", "bounds", "corrected", "in_range"]
