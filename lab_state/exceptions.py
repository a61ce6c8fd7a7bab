"""The classes of errors that lab_state defines, in one tree.

Each class requires a different action of the caller. A message never contains a value
or a credential. It may contain keys, names, paths and types.
For a wrong argument or a call in the wrong place, lab_state also raises `TypeError`, `ValueError` and `RuntimeError`.
"""

from __future__ import annotations

from typing import Literal


class LabStateError(Exception):
    """The base class of all errors of lab_state."""


class KeyNotFoundError(LabStateError, KeyError):
    """The key is not in the state: pass a default, or set the key first.

    Attributes:
        key: The key as it was passed to the call.
    """

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        """Return a message with a remedy. `KeyError.__str__` would return only the quoted key."""
        return f"no key {self.key!r} in the state; to read a key that may be missing, pass a default"


class InvalidNameError(LabStateError, ValueError):
    """The name of a state is not allowed: fix the argument. `Config` says which names are allowed. `escape_name` makes a valid name."""


class InvalidKeyError(LabStateError, ValueError):
    """The key is not a `str`, or is not allowed: fix the argument. `escape_key` makes a valid key.

    A key has 1 to 1,024 characters. It has no NUL and no lone surrogate, and is not `$lab_state`.
    """


class InvalidValueError(LabStateError, ValueError):
    """The value cannot be kept as JSON, or a `ttl`, a number of `incr` or the result of a function is refused: fix the argument.

    A write also raises it if the value is not of its type in the `Schema` of the manager.

    Attributes:
        path: The JSON path to the bad part of the value; `$` is the value itself.
    """

    def __init__(self, message: str, path: str = "$") -> None:
        super().__init__(message, path)
        self.path = path

    def __str__(self) -> str:
        """Return the message, and the path unless it is `$`."""
        message = str(self.args[0])
        return message if self.path == "$" else f"{message} - at `{self.path}`"


class TypeMismatchError(LabStateError):
    """A value cannot be decoded as the type that was passed: pass another type, or migrate the value.

    The value is a stored value, or a new value that `update`, `incr` or `get_or_set` would store. `incr` also raises it if the
    stored value is not a number.

    Attributes:
        path: The JSON path to the part that does not match; `$` is the value itself.
    """

    def __init__(self, message: str, path: str = "$") -> None:
        super().__init__(message, path)
        self.path = path

    def __str__(self) -> str:
        """Return the message alone, because it already contains the path."""
        return str(self.args[0])


class SchemaError(LabStateError):
    """The schema of the code does not fit the state: use other code, or migrate the state. The state was left untouched.

    The message says what to do. In a shared state, a call of a running manager raises it if another process has migrated
    the state meanwhile. `Manager.start` raises it in these cases:

    - Newer code wrote the state, and does not allow code as old as this; see `Schema.readable_by`.
    - The state needs a migration, and `Config.migrate` is `"refuse"`.
    - The state is shared, and its owner runs with another schema.
    - With `Schema(strict=True)`: a value has a member that its type does not know.
    """


class MigrationError(LabStateError):
    """A migration failed, or a value does not have its type after all migrations: fix the migration. The state was left untouched.

    `Manager.start` raises it. If a migration raised an exception, that exception is the `__cause__`. Its text may contain values.

    Attributes:
        migration: The version that the failed migration leads to. If a value does not have its type: the last version.
        key: The key of the value that does not have its type, or that the migration could not store. `None` if the migration
            failed for another reason.
        path: The JSON path to the wrong part of that value; `$` is the value itself.
    """

    def __init__(self, message: str, migration: int, key: str | None = None, path: str = "$") -> None:
        super().__init__(message, migration, key, path)
        self.migration = migration
        self.key = key
        self.path = path

    def __str__(self) -> str:
        """Return the message alone, because it contains the migration, the key and the path."""
        return str(self.args[0])


class ClosedError(LabStateError):
    """The manager or the reader is not running: use it between its start and its stop.

    A call that is still running when the manager is stopped may raise it, too.
    """


class StorageError(LabStateError):
    """The base class of the errors of a storage or a cache. `copy_state` raises it if the copy differs from the source."""


class ConflictError(LabStateError):
    """Something that a transaction has read was changed meanwhile: run the transaction again. The transaction has changed nothing.

    `Manager.transact` runs the transaction again automatically. Only a shared state raises this error, because in
    any other state no write is made while a transaction is open.
    """


class UnavailableError(StorageError):
    """The storage or the cache failed this time, and may work again later.

    If a write or a flush raises it, the changes are in memory. The next flush writes them, so there is
    no need to repeat the call. There are two exceptions. If the flush task has ended, a write changes
    nothing; see `Status.task_failure`. If the error has an `outcome`, the outcome says whether the call was made.
    If `start()` raises it, call `start()` again. If `stop()` raises it, the changes above
    `durable_revision` may be lost. If a `Reader` raises it, read again later. In a shared state, a call
    raises it too if no process owns the state, or if the owner gives no sign of life; see `outcome`.

    Attributes:
        outcome: Whether a call of a shared state was made, if the process that owns the state did not answer.
            `"not made"`: the call has changed nothing, and never will. `"unknown"`: the call was made once, or not
            at all; read the state to find out. `None` for every other error.
    """

    outcome: Literal["not made", "unknown"] | None = None


class WaitTimeoutError(UnavailableError, TimeoutError):
    """A wait took longer than its `timeout`: wait again, or go on without the awaited change.

    This error is also a `TimeoutError`. Calls with an argument `timeout` raise it, such as
    `Manager.wait_durable` and `Reader.wait_revision`. The state is not affected. The
    awaited revision may still come later.
    """


class UnsupportedError(StorageError):
    """The storage or the cache cannot be used as it is: fix its permissions, its settings or the version of the library.

    In a forked child, the calls of a manager that the parent runs raise this error. Make a manager with another name
    in the child. The calls of a reader that is open in the parent raise this error, too. Open another reader.
    """

    # Whether the error says that there is no state of this name, or no directory. The command has an exit code for this.
    is_missing: bool = False


class LockedError(StorageError):
    """Another process, or another manager in this process, owns the state: stop that writer, or share the state.

    The message names the writer. Processes of one machine share a state with `Config(shared=True)` in each of them.
    """

    place: object = None  # the place of the state, if the storage gives it; equal places mean the same state


class FencedError(StorageError):
    """A newer writer owns the state: end this process.

    Once a manager knows of the newer writer, every write and every transaction raises this error
    and changes nothing, with every `flush_interval`. `flush()` raises it, too, if a change is not
    durable. Reads still succeed. The callback `on_fenced` of `Manager` is called.
    """


class CorruptionError(StorageError):
    """The stored state is damaged: restore a copy. The stored data were not changed.

    A damaged state is never treated as an empty state.

    Attributes:
        path: The damaged file or object.
        offset: The offset of the byte at which the damage was noticed; 0 if the whole file is concerned.
        detail: The damage, and its remedy.
    """

    def __init__(self, path: str, offset: int, detail: str) -> None:
        super().__init__(path, offset, detail)
        self.path = path
        self.offset = offset
        self.detail = detail

    def __str__(self) -> str:
        """Return the place, the damage and the remedy."""
        return f"{self.path} cannot be loaded (byte {self.offset}): {self.detail}"
