"""Iterators over the keys and values of one moment.

Theory of operation. At the first step, an iterator gets the keys of its range from the index, as sorted
tuples (`_order`). In the same moment it opens a view of the values (`_undo`). Each step then takes the
values of some keys, and decodes them. The event loop runs between two steps of an `async for`.
"""

from lab_state._items._collected import collected
from lab_state._items._iterators import Items, Iterates, PlainItems
from lab_state._items._pages import Decoding, Pages
from lab_state._items._steps import StateSource, Steps

__all__ = ["Decoding", "Items", "Iterates", "Pages", "PlainItems", "StateSource", "Steps", "collected"]
