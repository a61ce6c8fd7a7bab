"""Which storages have a history, and which can list their states."""

from __future__ import annotations

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


def test_a_storage_with_a_history_and_a_list() -> None:
    """Both come from the storage."""
    found: list[object] = [history_of(Full()), catalog_of(Full())]
    assert found == ["its history", "its states"]


@pytest.mark.parametrize("storage", [MemoryStorage(), MemoryStorage, Full, "state"])
def test_no_history(storage: object) -> None:
    """The error names the class, and says which storages have a history."""
    name = storage.__name__ if isinstance(storage, type) else type(storage).__name__
    with pytest.raises(UnsupportedError, match=f"^{name} keeps no history: use a FileStorage or an S3Storage"):
        history_of(storage)


@pytest.mark.parametrize("storage", [Full, "state"])
def test_no_list(storage: object) -> None:
    """The error names the class."""
    with pytest.raises(UnsupportedError, match=" cannot list or remove its states"):
        catalog_of(storage)
