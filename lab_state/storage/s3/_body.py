"""The bodies of PUT requests. A body is bytes, or an upload that is sent in parts, such as a spooled snapshot."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import IO, NamedTuple

from lab_state.exceptions import UnavailableError
from lab_state.storage import _fs as fs
from lab_state.storage.s3._threads import S3Threads

LONG = 256 * 1024
"""Data of this size in bytes or more are hashed and framed in a thread, and sent in parts."""

_IN_MEMORY = 8 * 1024 * 1024
_BATCH = 1024 * 1024
_SENT_AT_ONCE = 64 * 1024


class Body(NamedTuple):
    """The body of a PUT, with its MD5 in base64, which the store checks."""

    content: bytes | Upload
    size: int
    md5: str

    @classmethod
    def of(cls, data: bytes) -> Body:
        """Return a body with these bytes. This takes a millisecond for each MB."""
        content = data if len(data) < LONG else Upload(_SpooledBytes(data))
        return cls(content, len(data), _base64(hashlib.md5(data, usedforsecurity=False)))


def _base64(digest: hashlib._Hash) -> str:
    return base64.b64encode(digest.digest()).decode()


class Spool:
    """The bytes of a snapshot before they are sent. They are in memory, or in a temporary file if there are many.

    Only a thread of the session writes and reads the file. About a megabyte is written at a time, and 64 KiB are read at a time.
    """

    def __init__(self, thread: S3Threads) -> None:
        self._thread = thread
        self._lock = threading.Lock()  # a thread may still be at work after its caller was cancelled
        self._file: IO[bytes] | None = None
        self._digest = hashlib.md5(usedforsecurity=False)
        self._batch: list[bytes] = []
        self._batched = 0
        self.size: int = 0

    async def add(self, part: bytes) -> None:
        """Append a part."""
        self._batch.append(part)
        self._batched += len(part)
        if self._batched >= _BATCH:
            await self._write()

    async def body(self) -> Body:
        """Return a body with all parts that were added. After this call, no part may be added."""
        await self._write()
        return Body(Upload(self), self.size, _base64(self._digest))

    async def _write(self) -> None:
        batch, self._batch, self._batched = self._batch, [], 0
        self.size += sum(map(len, batch))
        await asyncio.get_running_loop().run_in_executor(self._thread, self._append, batch)

    def _append(self, batch: list[bytes]) -> None:
        with self._lock:
            if self._file is None:
                self._file = fs.spool(_IN_MEMORY)
            for part in batch:
                self._digest.update(part)
            fs.add_to_spool(self._file, batch)

    async def read(self, position: int) -> bytes:
        """Return some bytes that begin at a position. At the end, return no bytes.

        The bytes are few enough to be sent without blocking the event loop.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, position)

    def _read(self, position: int) -> bytes:
        with self._lock:
            assert self._file is not None, "a spool is read after it was written"
            self._file.seek(position)
            return self._file.read(_SENT_AT_ONCE)

    def discard(self) -> None:
        """Close the file, after the work in the thread has ended."""
        try:
            self._thread.submit(self._close)
        except UnavailableError:  # no thread is available, so close the file here
            self._close()

    def _close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()


class _SpooledBytes:
    """Bytes with the interface of a spool."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size: int = len(data)

    async def read(self, position: int) -> bytes:
        return self._data[position : position + _SENT_AT_ONCE]


class Upload:
    """The content of a spool as the body of a request. It can be sent several times."""

    def __init__(self, spool: Spool | _SpooledBytes) -> None:
        self._spool = spool
        self.moved: Callable[[], object] = lambda: None  # called before each part is sent
        self.sent: int = 0  # the number of bytes that were sent; bytes that are sent again are not counted
        self.count: Callable[[int], object] = lambda _: None  # called with the number of new bytes

    def __len__(self) -> int:
        """Return the size, for botocore."""
        return self._spool.size

    def read(self) -> bytes:
        """Raise an error. botocore only checks that this method exists, and aiohttp iterates over the body instead."""
        raise NotImplementedError

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the parts of the body, from its start."""
        position = 0
        while part := await self._spool.read(position):
            self.moved()
            yield part
            position += len(part)
            if position > self.sent:
                self.count(position - self.sent)
                self.sent = position
