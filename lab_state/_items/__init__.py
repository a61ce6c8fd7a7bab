"""Iterators over the keys and values of one moment.

Theory of operation. At the first step, an iterator gets the keys of its range from the index, as sorted
tuples (`_order`). In the same moment it opens a view of the values (`_undo`). A page has the decoded values
of some keys. An `async for` gets the pairs of a page one by one, and the event loop runs between two pages.
"""

from lab_state._items._collected import collected
from lab_state._items._iterators import Items, Iterates, PlainItems
from lab_state._items._pages import SKIPPED, Decoding, Pages
from lab_state._items._steps import StateSource, Steps

__all__ = ["SKIPPED", "Decoding", "Items", "Iterates", "Pages", "PlainItems", "StateSource", "Steps", "collected"]
