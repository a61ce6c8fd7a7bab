"""Mirrors: copies of states that other processes read."""

from __future__ import annotations

from lab_state.cache._protocol import SPOILT, Cache, CacheSession, Seen, Slice, Step
from lab_state.cache.memory import MemoryCache
from lab_state.cache.reader import Reader
from lab_state.cache.redis import RedisCache

__all__ = ["SPOILT", "Cache", "CacheSession", "MemoryCache", "Reader", "RedisCache", "Seen", "Slice", "Step"]
