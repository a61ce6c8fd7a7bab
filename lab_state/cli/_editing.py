"""Edit a text in the user's editor. If the edited text cannot be stored, it is kept in a file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager

import click

from lab_state.cli._output import note
from lab_state.exceptions import StorageError, UnavailableError
from lab_state.storage import _fs as fs

_BOM = b"\xef\xbb\xbf"


@contextmanager
def edited(text: bytes) -> Generator[bytes]:
    """Open a text in the user's editor, and yield the edited text.

    If the editor fails, or the block raises an error, a text that is changed and not empty is kept in a file that only this user can
    read. A line on stderr names the file. Otherwise all files of the editor are deleted.

    Raises:
        ClickException: The editor cannot be started, or failed.
        StorageError: The file could not be written or read.
        OSError: The directory for temporary files is missing, or cannot be written.
    """
    # Only this user can read the directory, and the files that the editor leaves beside the text.
    directory = tempfile.mkdtemp(prefix="lab-state-edit-")
    path = os.path.join(directory, "value.json")
    is_kept = False
    try:
        fs.close(fs.create(path, [text], fs.WrittenBytes()))
        click.edit(filename=path)
        yield _read(path)
    except BaseException:
        is_kept = _has_changed(path, text)
        if is_kept:
            os.chmod(path, 0o600)  # an editor may have made a new file
            note(f"lab-state: your text is kept in {path}")
        raise
    finally:
        if not is_kept:
            shutil.rmtree(directory, ignore_errors=True)


def is_same(before: bytes, after: bytes) -> bool:
    """Return whether two texts are the same, except for white space around them."""
    return before.strip() == after.strip()


def _has_changed(path: str, text: bytes) -> bool:
    """Return whether a file has a text that is worth keeping."""
    try:
        found = _read(path)
    except StorageError:  # the file could not be written, or the editor has deleted it
        return False
    return bool(found.strip()) and not is_same(text, found)


def _read(path: str) -> bytes:
    found = fs.read(path)
    if found is None:
        raise UnavailableError(f"the editor has deleted {path}: nothing was written")
    return found.removeprefix(_BOM)
