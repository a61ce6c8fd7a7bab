"""The calls that read."""

from lab_state._reads._calls import MISSING_VALUE, Reads

__all__ = ["MISSING_VALUE", "Reads"]
