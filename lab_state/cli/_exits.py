"""The exit codes of the command. This module does no I/O."""

from __future__ import annotations

import re
import shlex

from lab_state.exceptions import (
    ConflictError,
    CorruptionError,
    FencedError,
    LabStateError,
    LockedError,
    MigrationError,
    SchemaError,
    StorageError,
    UnsupportedError,
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


_RESTORE = re.compile(r"await restore_state\('([\w.-]+)', storage, (\d+), into='\1'\)")
"""The call that the message of a damaged state with a history has."""


class Stop(Exception):  # noqa: N818 -- it may also end a command that has found a difference, which is not an error
    """The end of a subcommand with an exit code, and a message for stderr, if there is one."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


def no_key(key: str, state: object) -> Stop:
    """Return the end of a subcommand that needs a key that does not exist."""
    return Stop(NOT_FOUND, f"there is no key {key!r} in {state}")


def message_of(error: Exception) -> str:
    """Return the message of an error. In place of the call that restores a damaged state, the message has the subcommand."""
    text = str(error)
    found = _RESTORE.search(text)
    if found is None or not isinstance(error, CorruptionError):
        return text
    name, revision = found.groups()
    state = f"{error.path.rpartition(f'/{name}.')[0]}/{name}"
    return text.replace(found[0], f"lab-state restore {shlex.quote(state)} --at r{revision} --into {name}")


def is_missing(error: Exception) -> bool:
    """Return whether the reason for an error is that there is no state of this name, or no directory."""
    return isinstance(error, UnsupportedError) and error.is_missing


def code_of(error: LabStateError | ValueError | ImportError) -> int:
    """Return the exit code for an error.

    A `ValueError` is about an argument. An `ImportError` means that the argument needs an extra which is not installed. A path
    through a file is a wrong argument. So these three get the code of a usage error.
    """
    if is_missing(error) or isinstance(error, MigrationError | SchemaError):
        return NOT_FOUND
    if isinstance(error, LockedError | FencedError):
        return LOCKED
    if isinstance(error, CorruptionError):
        return CORRUPT
    if isinstance(error, ConflictError):
        return CONFLICT
    if isinstance(error.__cause__, NotADirectoryError):
        return USAGE
    return UNAVAILABLE if isinstance(error, StorageError) else USAGE
