"""An asyncio-native state manager: a map in memory that is made durable in files or in S3."""

from __future__ import annotations

from lab_state._catalog import StateInfo, list_states, remove_state
from lab_state._checking import Misfit
from lab_state._clock import Clock, Timer
from lab_state._copy import copy_state
from lab_state._escaping import escape_key, escape_name
from lab_state._history import Generation, list_generations
from lab_state._items import Items, PlainItems
from lab_state._metrics import Metrics
from lab_state._migrations import MigrationDraft, Schema
from lab_state._restore import Restored, restore_state
from lab_state._state_view import StateView, read_state
from lab_state._status import MirrorStatus, Status
from lab_state._transaction import Transaction
from lab_state._watch import Change
from lab_state.blocking import Blocking, BlockingEntry
from lab_state.cache import Cache, CacheSession, MemoryCache, Reader, RedisCache
from lab_state.config import Config
from lab_state.entry import Entry
from lab_state.exceptions import (
    ClosedError,
    ConflictError,
    CorruptionError,
    FencedError,
    InvalidKeyError,
    InvalidNameError,
    InvalidValueError,
    KeyNotFoundError,
    LabStateError,
    LockedError,
    MigrationError,
    SchemaError,
    StorageError,
    TypeMismatchError,
    UnavailableError,
    UnsupportedError,
    WaitTimeoutError,
)
from lab_state.handles import Namespace
from lab_state.manager import Manager
from lab_state.storage import (
    FileStorage,
    MemoryStorage,
    Reading,
    Recovery,
    S3Storage,
    Storage,
    StorageSession,
)

__version__: str = "0.1.0"

__all__ = [  # noqa: RUF022 -- in groups, each sorted
    # the manager
    "Clock",
    "Config",
    "Manager",
    "Metrics",
    "MirrorStatus",
    "Status",
    "Timer",
    # handles, and the results of their calls
    "Blocking",
    "BlockingEntry",
    "Change",
    "Entry",
    "Items",
    "Namespace",
    "PlainItems",
    "Transaction",
    # schemas and migrations
    "MigrationDraft",
    "Misfit",
    "Schema",
    # storages, and the calls that use a storage without a manager
    "FileStorage",
    "Generation",
    "MemoryStorage",
    "Reading",
    "Recovery",
    "Restored",
    "S3Storage",
    "StateInfo",
    "StateView",
    "Storage",
    "StorageSession",
    "copy_state",
    "list_generations",
    "list_states",
    "read_state",
    "remove_state",
    "restore_state",
    # mirrors and their readers
    "Cache",
    "CacheSession",
    "MemoryCache",
    "Reader",
    "RedisCache",
    # names and keys
    "escape_key",
    "escape_name",
    # errors
    "ClosedError",
    "ConflictError",
    "CorruptionError",
    "FencedError",
    "InvalidKeyError",
    "InvalidNameError",
    "InvalidValueError",
    "KeyNotFoundError",
    "LabStateError",
    "LockedError",
    "MigrationError",
    "SchemaError",
    "StorageError",
    "TypeMismatchError",
    "UnavailableError",
    "UnsupportedError",
    "WaitTimeoutError",
]
