"""Iterators over the keys and values of one moment.

Theory of operation. At its first step an iterator takes the keys of its range, which the index keeps in
sorted tuples (`_order`), and opens a view of the values (`_undo`). Then it takes the values of some
keys at a time, and decodes them. Between two steps the event loop runs.
"""

from lab_state._items._collected import collected
from lab_state._items._iterators import Items, Iterates, PlainItems
from lab_state._items._pages import Decoding, Pages
from lab_state._items._steps import StateSource, Steps

__all__ = ["Decoding", "Items", "Iterates", "Pages", "PlainItems", "StateSource", "Steps", "collected"]
