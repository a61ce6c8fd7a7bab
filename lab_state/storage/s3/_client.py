"""Requests to an object store. Each request is repeated until its outcome is known, or until its time limit."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar

from lab_state._clock import Pauses
from lab_state._log import Log
from lab_state.exceptions import StorageError, UnavailableError, UnsupportedError
from lab_state.storage.s3._body import Body, Spool, Upload
from lab_state.storage.s3._connect import STANDSTILL, Client
from lab_state.storage.s3._failures import FAILURES, failure_of
from lab_state.storage.s3._outcomes import (
    COPIES,
    DELETES,
    LISTS,
    READS,
    WRITE_ID,
    WRITES,
    Failure,
    Next,
    NotOursError,
    ObjectInfo,
    Verdict,
    advice,
    after_look,
    unquoted,
    verdict,
)
from lab_state.storage.s3._threads import S3Threads
from lab_state.storage.s3._time import Limit, Time

R = TypeVar("R")

_logger = Log(logging.getLogger("lab_state"))

DEADLINE = 30.0
"""The seconds for which a request is repeated. One second is added for each `SLOWEST` bytes of its body."""

SLOWEST = 256 * 1024

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0
_TOLD_EVERY = 10.0
_CHUNK = 1024 * 1024
_LISTED_AT_ONCE = 100  # the answer is parsed on the event loop, at about 0.06 ms for each object
_MOST_DELETED_AT_ONCE = 1000
_REPLACED = '"replaced"'


class Tries:
    """The repetitions of one request, or of several requests together, with pauses between them and a time limit."""

    def __init__(self, time: Time, what: str, seconds: float, *, is_told: bool) -> None:
        """Start the time limit. With `is_told`, log a WARNING at the second and each later failure, at most once in 10 s."""
        self._time = time
        self._what = what
        self._seconds = seconds
        self._end = time.clock.monotonic() + seconds
        self._pauses = Pauses(time.clock, _FIRST_PAUSE, _LONGEST_PAUSE)
        self._tell_at = -math.inf if is_told else math.inf

    async def pause(self, why: Failure | str) -> None:
        """Wait after an attempt that failed, before the next one. `why` is the failure, or a noun for the reason.

        Raises:
            UnavailableError: The time limit is reached.
        """
        longest = self._pauses.start()
        failed = self._pauses.failures
        left = self._end - self._time.clock.monotonic()
        if left <= 0:
            raise UnavailableError(f"{self._what} failed {failed} times in {self._seconds:.0f} s, last with {why}")
        if failed > 1 and (now := self._time.clock.monotonic()) >= self._tell_at:
            self._tell_at = now + _TOLD_EVERY
            _logger.warning(
                "a start or a read waits for S3: %s failed %d times, last with %s; it is repeated for %.0f s more at most",
                self._what,
                failed,
                why,
                left,
            )
        await self._time.sleep(min(left, self._time.jitter(longest)))

    def refuse(self, failure: Failure, needs: str) -> StorageError:
        """Return the error for a failure that a repetition does not fix. `needs` is the permission for the request."""
        return UnsupportedError(f"{self._what} failed with {failure}: {advice(failure, needs)}")


class Requests:
    """The requests of one session to one bucket.

    An exception of the client is never passed on, not even as a cause or a context. Its text
    may contain a credential, such as the password of a proxy, and a traceback would show it.

    Attributes:
        thread: The threads for work that would block the event loop.
        sent: The number of bytes of bodies that were sent. A part that is sent again is not counted.
        time: The pauses and the time limits.
        is_opening: Whether the state is being opened or read; True at first. Meanwhile, requests that
            fail twice are logged. Later, the manager logs the error that a call raises.
    """

    def __init__(self, bucket: str, connecting: Callable[[], Awaitable[Client]], thread: S3Threads, time: Time) -> None:
        self.thread: S3Threads = thread
        self.time: Time = time
        self.sent: int = 0
        self.is_opening: bool = True
        self._bucket = bucket
        self._connecting = connecting
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn: tuple[asyncio.AbstractEventLoop | None, asyncio.Lock] = None, asyncio.Lock()
        self._unquoted = False

    async def _client(self) -> Client:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # the first request on this event loop
            if self._turn[0] is not loop:
                self._turn = loop, asyncio.Lock()
            async with self._turn[1]:
                # Another task may have connected meanwhile. A test covers this case, but coverage does not see the jump.
                if self._loop is not loop:  # pragma: no branch
                    self._connected = await self._connecting()
                    self._loop = loop
        return self._connected

    async def aclose(self) -> None:
        """Close the connections, if there are any on this event loop."""
        if self._loop is asyncio.get_running_loop():
            await self._connected.close()

    def tries(self, doing: str, key: str, size: int = 0) -> Tries:
        """Return the repetitions for a request with a body of `size` bytes. The time limit starts now."""
        what = f"{doing} s3://{self._bucket}/{key}"
        return Tries(self.time, what, DEADLINE + size / SLOWEST, is_told=self.is_opening)

    # Reading

    async def head(self, key: str) -> ObjectInfo | None:
        """Return ETag, metadata and size of an object, with a HEAD request; `None` if there is no object."""
        return await self._head(key, self.tries("looking at", key))

    async def _head(self, key: str, tries: Tries) -> ObjectInfo | None:
        async def once(client: Client, _: Limit) -> ObjectInfo:
            return _found(await client.head_object(Bucket=self._bucket, Key=key))

        return await self._read(once, tries)

    async def get(self, key: str) -> tuple[ObjectInfo, bytes] | None:
        """Return an object with its body; `None` if there is no object."""

        async def once(client: Client, limit: Limit) -> tuple[ObjectInfo, bytes]:
            response = await client.get_object(Bucket=self._bucket, Key=key)
            return _found(response), await _bytes_of(response, limit)

        return await self._read(once, self.tries("reading", key))

    async def get_end(self, key: str, size: int) -> tuple[ObjectInfo, bytes] | None:
        """Return an object with the last `size` bytes of its body; `None` if there is no object. The object must not be empty."""

        async def once(client: Client, limit: Limit) -> tuple[ObjectInfo, bytes]:
            response = await client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes=-{size}")
            return _found(response), await _bytes_of(response, limit)

        return await self._read(once, self.tries("reading", key))

    async def get_spooled(self, key: str) -> tuple[ObjectInfo, Spool] | None:
        """Return an object with its body in a spool, which the caller must discard; `None` if there is no object."""

        async def once(client: Client, limit: Limit) -> tuple[ObjectInfo, Spool]:
            response = await client.get_object(Bucket=self._bucket, Key=key)
            spool = Spool(self.thread)
            try:
                async with response["Body"] as body:
                    async for part in body.iter_chunks(_CHUNK):
                        limit.moved()
                        await spool.add(part)
            except BaseException:
                spool.discard()
                raise
            return _found(response), spool

        return await self._read(once, self.tries("reading", key))

    async def sizes(self, prefix: str, after: str) -> dict[str, int]:
        """Return the sizes by key, for all objects whose key has a prefix and comes after `after`."""
        sizes: dict[str, int] = {}
        token: str | None = None
        tries = self.tries("listing", prefix)
        while True:
            page, token = await self.page(prefix, after, token, tries)
            sizes.update(page)
            if token is None:
                return sizes

    async def page(
        self, prefix: str, after: str, token: str | None = None, tries: Tries | None = None
    ) -> tuple[dict[str, int], str | None]:
        """Return one page of the result of `sizes`, and the token of the next page; `None` after the last page."""
        where: dict[str, Any] = {"StartAfter": after} if token is None else {"ContinuationToken": token}

        async def once(client: Client, _: Limit) -> dict[str, Any]:
            return await client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, MaxKeys=_LISTED_AT_ONCE, **where)

        page = await self._read(once, tries or self.tries("listing", prefix), LISTS)
        if page is None:
            raise self._no_bucket(prefix)
        sizes = {str(entry["Key"]): int(entry["Size"]) for entry in page.get("Contents", ())}
        return sizes, page.get("NextContinuationToken") if page.get("IsTruncated") else None

    async def level(self, above: str) -> list[str]:
        """Return the keys that begin with `above`. If a slash follows later in a key, return only the part up to that slash, once."""
        found: list[str] = []
        where: dict[str, Any] = {}
        tries = self.tries("listing", above)

        async def once(client: Client, _: Limit) -> dict[str, Any]:
            return await client.list_objects_v2(
                Bucket=self._bucket, Prefix=above, Delimiter="/", MaxKeys=_LISTED_AT_ONCE, **where
            )

        while True:
            page = await self._read(once, tries, LISTS)
            if page is None:
                raise self._no_bucket(above)
            found += [str(entry["Key"]) for entry in page.get("Contents", ())]
            found += [str(entry["Prefix"]) for entry in page.get("CommonPrefixes", ())]
            if not page.get("IsTruncated"):
                return found
            where["ContinuationToken"] = page.get("NextContinuationToken")

    def _no_bucket(self, prefix: str) -> UnsupportedError:
        return UnsupportedError(f"listing s3://{self._bucket}/{prefix} failed with 404: there is no such bucket")

    async def _read(
        self,
        once: Callable[[Client, Limit], Awaitable[R]],
        tries: Tries,
        needs: str = READS,
        *,
        conditional: bool = False,
    ) -> R | None:
        """Repeat a request until its outcome is known. Return `None` if the object does not exist, or if a condition does not hold."""
        while True:
            try:
                async with self.time.limit(STANDSTILL) as limit:
                    return await once(await self._client(), limit)
            except FAILURES as error:
                failure = failure_of(error)
            # Our error is raised after the `except` block. Inside the block, the exception of the client would become its context.
            meaning = verdict(failure)
            if meaning is Verdict.REFUSED and (conditional or failure.status == 404):  # noqa: PLR2004 -- 404 Not Found
                return None
            if meaning not in {Verdict.UNKNOWN, Verdict.CONFLICT}:
                raise tries.refuse(failure, needs)
            await tries.pause(failure)

    # Writing

    async def put(self, key: str, body: Body, metadata: dict[str, str], if_match: str | None) -> str:
        """Write an object under a condition.

        Args:
            key: The key.
            body: The bytes.
            metadata: The metadata. Its item `WRITE_ID` must be the id of this write. An object with this id counts as written.
            if_match: The ETag that the present object must have. With `None`, there must be no
                object.

        Returns:
            The ETag of the new object.

        Raises:
            NotOursError: The condition was not met.
            UnavailableError: The outcome is still unknown at the time limit.
            UnsupportedError: The store refuses such a request.
        """
        tries = self.tries("writing", key, body.size)
        etag = None if if_match is None else unquoted(if_match) if self._unquoted else f'"{unquoted(if_match)}"'
        while True:
            try:
                written = await self._put_once(key, body, metadata, etag)
            except FAILURES as error:
                failure = failure_of(error)
            else:
                break
            meaning = verdict(failure)
            if meaning not in {Verdict.REFUSED, Verdict.CONFLICT, Verdict.UNKNOWN}:
                raise tries.refuse(failure, WRITES)
            found = await self._head(key, tries)
            what = after_look(meaning, found, metadata[WRITE_ID], etag)
            if what is Next.COMMITTED and found is not None:
                written = found.etag
                break
            if what is Next.REPEAT:
                await tries.pause(failure)
            elif what is Next.UNQUOTE and etag is not None:
                etag = unquoted(etag)
            else:
                raise NotOursError(found)
        if etag is not None:
            self._unquoted = etag == unquoted(etag)
        return written or await self._etag(key, metadata[WRITE_ID], tries)

    async def put_anyhow(self, key: str, metadata: dict[str, str], if_match: str | None) -> bool:
        """Write an empty object under a condition. Return whether the store reported a success.

        The result shows whether the store honours conditions. The content of the object has no meaning.
        """
        tries = self.tries("writing", key)
        while True:
            try:
                await self._put_once(key, Body.of(b""), metadata, if_match)
            except FAILURES as error:
                failure = failure_of(error)
            else:
                return True
            meaning = verdict(failure)
            if meaning in {Verdict.REFUSED, Verdict.CONFLICT}:
                return False
            if meaning is not Verdict.UNKNOWN:
                raise tries.refuse(failure, WRITES)
            await tries.pause(failure)

    async def _put_once(self, key: str, body: Body, metadata: dict[str, str], etag: str | None) -> str:
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        upload = body.content if isinstance(body.content, Upload) else None
        async with self.time.limit(STANDSTILL) as limit:
            client = await self._client()
            if upload is not None:
                upload.moved, upload.count = limit.moved, self._count
            response = await client.put_object(
                Bucket=self._bucket,
                Key=key,
                Body=body.content,
                ContentLength=body.size,
                ContentMD5=body.md5,
                ContentType="application/json",
                Metadata=metadata,
                **condition,
            )
        self._count(body.size - (0 if upload is None else upload.sent))
        return str(response.get("ETag") or "")

    def _count(self, size: int) -> None:
        self.sent += size

    async def _etag(self, key: str, write_id: str, tries: Tries) -> str:
        """Return the ETag of an object that was written. Some stores do not send the ETag with the answer to a PUT.

        If another write has replaced the object meanwhile, return a text that is the ETag of no object.
        """
        found = await self._head(key, tries)
        ours = found is not None and found.metadata.get(WRITE_ID) == write_id
        return found.etag if found is not None and ours else _REPLACED

    # Copying

    async def copy(self, source: str, target: str, etag: str) -> bool:
        """Copy an object within the store, on the condition that the object has this ETag.

        If the outcome is unknown, copy again. This does no harm, because both copies have the same bytes. If the store honours
        the condition, a request that arrives late copies the same bytes, too.

        Returns:
            Whether the object was copied. It was not copied if it has another ETag or does not exist.

        Raises:
            UnavailableError: The outcome is still unknown at the time limit.
            UnsupportedError: The store refuses such a request.
        """
        # Some stores compare the ETag with its quotation marks, and others without them.
        for condition in (f'"{unquoted(etag)}"', unquoted(etag)):

            async def once(client: Client, _: Limit, condition: str = condition) -> dict[str, Any]:
                place = {"Bucket": self._bucket, "Key": source}
                return await client.copy_object(
                    Bucket=self._bucket, Key=target, CopySource=place, CopySourceIfMatch=condition
                )

            if await self._read(once, self.tries("copying", source), COPIES, conditional=True) is not None:
                return True
        return False

    # Deleting

    async def check_deletes(self, key: str) -> None:
        """Try once to delete an object, which need not exist. Ignore every failure except a refusal.

        Raises:
            UnsupportedError: The store refuses deletions.
        """
        try:
            async with self.time.limit(STANDSTILL):
                failure = _refused(await self._delete_once(await self._client(), [key]))
        except FAILURES as error:
            failure = failure_of(error)
        if failure is not None and verdict(failure) in {Verdict.DENIED, Verdict.NOT_IMPLEMENTED}:
            raise self.tries("deleting", key).refuse(failure, DELETES)

    async def delete(self, keys: Iterable[str]) -> None:
        """Delete objects. A missing object is not an error.

        Raises:
            UnsupportedError: The store refuses deletions.
            StorageError: Some objects may still exist.
        """
        for part in _parts(list(keys)):

            async def once(client: Client, _: Limit, part: list[str] = part) -> dict[str, Any]:
                return await self._delete_once(client, part)

            tries = self.tries("deleting", part[0])
            failure = _refused(await self._read(once, tries, DELETES) or {})
            if failure is not None and verdict(failure) is Verdict.DENIED:
                raise tries.refuse(failure, DELETES)
            if failure is not None:
                raise UnavailableError(f"deleting s3://{self._bucket}/{part[0]} and others failed with {failure}")

    async def _delete_once(self, client: Client, keys: list[str]) -> dict[str, Any]:
        doomed = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        return await client.delete_objects(Bucket=self._bucket, Delete=doomed)


def _refused(done: dict[str, Any]) -> Failure | None:
    """Return the first failure in the answer to a deletion of many objects; `None` if there is none."""
    for error in done.get("Errors", ()):
        code = str(error.get("Code", ""))
        return Failure(403 if code == "AccessDenied" else 500, code)
    return None


def _parts(keys: list[str]) -> Iterator[list[str]]:
    return (keys[start : start + _MOST_DELETED_AT_ONCE] for start in range(0, len(keys), _MOST_DELETED_AT_ONCE))


async def _bytes_of(response: dict[str, Any], limit: Limit) -> bytes:
    """Return the body of an object."""
    parts: list[bytes] = []
    async with response["Body"] as body:
        async for part in body.iter_chunks(_CHUNK):
            parts.append(part)
            limit.moved()
    return b"".join(parts)


def _found(response: dict[str, Any]) -> ObjectInfo:
    metadata = {str(key).lower(): str(value) for key, value in response.get("Metadata", {}).items()}
    whole = str(response.get("ContentRange", "")).rpartition("/")[2]  # the response may have only a part of the object
    return ObjectInfo(unquoted(str(response.get("ETag", ""))), metadata, int(whole or response["ContentLength"]))
