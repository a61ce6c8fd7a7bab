"""Storages, which keep states in memory, in files or in an object store."""

from __future__ import annotations

from lab_state.storage._protocol import Reading, Recovery, SnapshotSource, Storage, StorageSession
from lab_state.storage.file import FileStorage
from lab_state.storage.memory import MemoryStorage
from lab_state.storage.s3 import S3Storage

__all__ = [
    "FileStorage",
    "MemoryStorage",
    "Reading",
    "Recovery",
    "S3Storage",
    "SnapshotSource",
    "Storage",
    "StorageSession",
]
