"""The exit codes of the command. Pure."""

from __future__ import annotations

from lab_state.exceptions import (
    ConflictError,
    CorruptionError,
    FencedError,
    LabStateError,
    LockedError,
    MigrationError,
    SchemaError,
    StorageError,
)

OK = 0
NOT_FOUND = 1
USAGE = 2
LOCKED = 3
CORRUPT = 4
UNAVAILABLE = 5
CONFLICT = 6
INTERRUPTED = 130
BROKEN_PIPE = 141
"""The code of a process that SIGPIPE has ended, as a shell shows it."""

NO_STATE = "there is no state at "
"""The beginning of the message of each storage that has no state of a name."""


class Stop(Exception):  # noqa: N818 -- it may also end a command that has found a difference, which is not an error
    """The end of a subcommand with an exit code, and a message for stderr, if there is one."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


def no_key(key: str, state: object) -> Stop:
    """Return the end of a subcommand that needs a key that does not exist."""
    return Stop(NOT_FOUND, f"there is no key {key!r} in {state}")


def code_of(error: LabStateError | ValueError | ImportError) -> int:
    """Return the exit code for an error.

    A `ValueError` is about an argument, and so is an `ImportError`: the extra for the storage is missing.
    """
    is_missing = isinstance(error, StorageError) and str(error).startswith(NO_STATE)
    if is_missing or isinstance(error, MigrationError | SchemaError):
        return NOT_FOUND
    if isinstance(error, LockedError | FencedError):
        return LOCKED
    if isinstance(error, CorruptionError):
        return CORRUPT
    if isinstance(error, ConflictError):
        return CONFLICT
    return UNAVAILABLE if isinstance(error, StorageError) else USAGE
