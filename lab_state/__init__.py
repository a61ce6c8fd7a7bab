"""An asyncio-native state manager: a map in memory, durable on disk."""

from __future__ import annotations

from lab_state._clock import Clock, Timer
from lab_state.config import Config
from lab_state.exceptions import (
    ClosedError,
    CorruptionError,
    FencedError,
    InvalidKeyError,
    InvalidNameError,
    InvalidValueError,
    KeyNotFoundError,
    LabStateError,
    LockedError,
    StorageError,
    TypeMismatchError,
    UnavailableError,
    UnsupportedError,
)
from lab_state.manager import Manager, Status
from lab_state.storage import FileStorage, MemoryStorage, Recovery, S3Storage, Storage, StorageSession, copy_state

__all__ = [  # noqa: RUF022 -- in groups, each sorted
    # the manager
    "Clock",
    "Config",
    "Manager",
    "Status",
    "Timer",
    # where states are kept
    "FileStorage",
    "MemoryStorage",
    "Recovery",
    "S3Storage",
    "Storage",
    "StorageSession",
    "copy_state",
    # errors
    "ClosedError",
    "CorruptionError",
    "FencedError",
    "InvalidKeyError",
    "InvalidNameError",
    "InvalidValueError",
    "KeyNotFoundError",
    "LabStateError",
    "LockedError",
    "StorageError",
    "TypeMismatchError",
    "UnavailableError",
    "UnsupportedError",
]
