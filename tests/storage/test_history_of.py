"""Which storages have a history, and which can list their states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab_state import MemoryStorage, UnsupportedError
from lab_state.storage._history import catalog_of, history_of


class Full:
    """A storage that has both."""

    def _history(self) -> Any:
        return "its history"

    def _catalog(self) -> Any:
        return "its states"


class Foreign:
    """A storage of another package."""

    async def open(self, name: str) -> Any:
        raise NotImplementedError


def test_a_storage_with_a_history_and_a_list() -> None:
    """Both come from the storage."""
    found: list[object] = [history_of(Full()), catalog_of(Full())]
    assert found == ["its history", "its states"]


def test_no_history() -> None:
    """The error names the class, and says which storages have a history."""
    with pytest.raises(UnsupportedError, match=r"^MemoryStorage keeps no history: use a FileStorage or an S3Storage"):
        history_of(MemoryStorage())


def test_no_list() -> None:
    """The error names the class."""
    with pytest.raises(UnsupportedError, match=r"^Foreign cannot list or remove its states"):
        catalog_of(Foreign())


@pytest.mark.parametrize("storage", [MemoryStorage, Full, "state", Path("state"), None])
@pytest.mark.parametrize("of", [history_of, catalog_of])
def test_no_storage(of: Callable[[object], object], storage: object) -> None:
    """A class, a path and other objects are wrong arguments."""
    with pytest.raises(TypeError, match=r"^storage must be an object such as FileStorage\('directory'\), not "):
        of(storage)
