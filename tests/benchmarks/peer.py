"""What every peer of the bench has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from measure import resident, written

Values = dict[str, Any]
POWER, KILL, NOTHING = "power cut", "SIGKILL", "nothing"


class Peer(ABC):
    """One of them, in a directory of its own."""

    name: ClassVar[str]
    survives: ClassVar[str]
    setup: ClassVar[str]
    module: ClassVar[str]
    most: ClassVar[int] = 10_000_000
    """So many keys are filled in at the most: more would take minutes."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / type(self).__name__
        self.path.mkdir()

    @abstractmethod
    async def open(self) -> None: ...

    @abstractmethod
    async def close(self) -> None: ...

    async def fill(self, values: Values) -> None:
        for key, value in values.items():
            await self.set(key, value)

    @abstractmethod
    async def get(self, key: str) -> Any: ...

    @abstractmethod
    async def set(self, key: str, value: Any) -> None: ...

    async def durable(self, key: str, value: Any) -> None:
        await self.set(key, value)

    def written(self) -> int:
        """Return the bytes that it made the kernel write to disks, so far."""
        return written()

    def resident(self) -> int:
        return resident()
