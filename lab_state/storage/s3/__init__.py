"""`S3Storage`: states in an object store, each with a snapshot and the records after it.

`_open` opens a state. `_session` makes commits and checkpoints. `_format` defines the names and the
bytes of the objects. `_outcomes` defines the meaning of each answer of the store.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from lab_state._argument_types import check_text, has_calls, kind_of
from lab_state._clock import SystemClock
from lab_state._periods import Seconds, check_history
from lab_state.exceptions import LockedError, UnsupportedError
from lab_state.storage._limits import Limits
from lab_state.storage.s3._format import Names
from lab_state.storage.s3._threads import S3Threads
from lab_state.storage.s3._time import Time

if TYPE_CHECKING:
    from lab_state.storage._protocol import Reading
    from lab_state.storage.s3._calls import S3Catalog, S3History
    from lab_state.storage.s3._client import Requests
    from lab_state.storage.s3._session import S3Session

R = TypeVar("R")


class _Closeable(Protocol):
    async def aclose(self) -> None: ...


C = TypeVar("C", bound=_Closeable)

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{1,2046}[A-Za-z0-9]")
_MOST_PREFIX_BYTES = 512


class _Claim:
    """The claim of this process on one state, until `release`."""

    _held: ClassVar[dict[tuple[str, ...], _Claim]] = {}

    def __init__(self, endpoint_url: str | None, names: Names) -> None:
        self.key = self.key_of(endpoint_url, names)
        self.pid = os.getpid()
        holder = self._held.get(self.key)
        if holder is not None and holder.pid == self.pid:  # a forked child inherits claims of its parent
            error = LockedError(
                f"{names.url(names.snapshot)} is open in this process already: stop its manager first; "
                "a state has one writer"
            )
            error.place = self.key
            raise error
        self._held[self.key] = self

    @staticmethod
    def key_of(endpoint_url: str | None, names: Names) -> tuple[str, ...]:
        """Return the place of a state; see `LockedError.place`."""
        return endpoint_url or "", names.bucket, names.snapshot

    def release(self) -> None:
        """Release the claim. A second call does nothing, even if this process has claimed the state again since then."""
        if self._held.get(self.key) is self:
            del self._held[self.key]


class S3Storage:
    """States in a bucket of S3, or of a compatible store with conditional writes.

    A change is durable when the store has acknowledged it. So it survives the loss of this
    machine. There is no lock. A manager that opens a state becomes its writer, and deposes a
    writer in another process: the next commit of that writer raises `FencedError`, and so does
    every later write. In one process, a state that is open cannot be opened again: `start()`
    raises `LockedError`.

    This class needs the extra: `pip install 'lab-state[s3]'`, or `pip install '.[s3]'` in a
    clone of lab_state.
    """

    def __init__(
        self,
        bucket: str,
        *,
        prefix: str = "state/modules",
        endpoint_url: str | None = None,
        region_name: str | None = None,
        session: Any = None,
        config: Any = None,
        history: Seconds | None = None,
        history_bytes: int | None = 1 << 30,
    ) -> None:
        """Check and keep the settings. The first call that needs the store imports the client.

        Args:
            bucket: The name of the bucket, which must exist.
            prefix: The first part of the names of all objects, before the name of a state. It has
                at most 512 bytes and no slash at either end. It may be empty.
            endpoint_url: The address of the store, such as `https://minio.example:9000`.
                With `None`, botocore looks for an address in the environment. If there is none,
                it uses the address of AWS. With an address, the bucket is part of the path of each
                URL, unless `config` has another `addressing_style`.
            region_name: The region of the bucket. With `None`, botocore looks for the region in the
                environment and in its configuration.
            session: An aiobotocore session that has the credentials. With `None`, botocore looks
                for credentials in the usual places.
            config: An aiobotocore `AioConfig`, for timeouts, proxies and similar settings.
                Its retries are ignored, because lab_state repeats requests itself.
            history: The time for which older snapshots and the changes between them are kept, in seconds
                or as a `timedelta`: above 0, and at most 10,000,000,000 seconds. With `None`, nothing is kept, and
                an existing history is not changed. The page "State in S3" says what a history costs.
            history_bytes: The largest number of bytes of the history, without the snapshot in use and the
                records after it. If the history is larger, its oldest part is deleted. With `None`, there is no limit.

        Raises:
            ImportError: The extra is missing: `pip install 'lab-state[s3]'`, or
                `pip install '.[s3]'` in a clone of lab_state.
            ValueError: An argument is out of bounds.
            TypeError: An argument has the wrong type.
        """
        _check_extra()
        length = check_history(history, history_bytes)
        self._limits = None if length is None else Limits(length, history_bytes)
        self._bucket = _checked_bucket(bucket)
        self._prefix = _checked_prefix(prefix)
        self._endpoint_url = None if endpoint_url is None else _checked_endpoint(endpoint_url)
        self._region_name = None if region_name is None else check_text("region_name", region_name)
        self._session = None if session is None else _checked_session(session)
        self._config = None if config is None else _checked_config(config)
        self._time = Time(SystemClock())

    def __repr__(self) -> str:
        """Return the class, the bucket, the prefix and the address. None of them is secret."""
        endpoint = "" if self._endpoint_url is None else f", endpoint_url={self._endpoint_url!r}"
        return f"S3Storage({self._bucket!r}, prefix={self._prefix!r}{endpoint})"

    async def open(self, name: str) -> S3Session:
        """Depose the present writer of the state, if there is one, and load the state; see `Storage.open`.

        A cancelled call leaves nothing open.

        Raises:
            LockedError: A manager or another call of this process has the state open.
            CorruptionError: The stored data are damaged. They were not changed.
            UnavailableError: For half a minute, requests failed, or other writers opened the state
                at the same time. Try again.
            UnsupportedError: A repetition does not help. For example, the extra cannot be imported,
                the store ignores conditions, the bucket is missing, or a permission is missing. The
                message has the cause.
        """
        return await self._opened(name, self._open_session)

    async def read(self, name: str) -> Reading:
        """Read the state without disturbing its writer; see `Storage.read`.

        Only the permissions `s3:GetObject` and `s3:ListBucket` are needed. `Reading.live` is
        `None`, because there is no lock that shows a writer.

        Raises:
            CorruptionError: The stored data are damaged, or a record is missing.
            UnavailableError: For half a minute, requests failed, or the state was replaced faster
                than it could be read. Try again.
            UnsupportedError: A repetition does not help. For example, there is no state of this
                name, the extra cannot be imported, the bucket is missing, or a permission is
                missing. The message has the cause.
        """
        return await self._run(name, _read_objects)

    def _history(self) -> S3History:
        from lab_state.storage.s3._calls import S3History  # noqa: PLC0415 -- few programs need it

        return S3History(self._run, self._opened, self.open)

    def _catalog(self) -> S3Catalog:
        from lab_state.storage.s3._calls import S3Catalog  # noqa: PLC0415 -- few programs need it

        return S3Catalog(
            self._run,
            self._opened,
            lambda name: Names.of(self._bucket, self._prefix, name),
            keeps=self._limits is not None,
        )

    async def _run(self, name: str, work: Callable[[Requests, Names], Awaitable[R]]) -> R:
        """Call a function with new connections to the store, and with the names of a state."""
        # This is a separate task. So it is ended completely, even if the caller is cancelled a second time.
        working = asyncio.create_task(self._work(Names.of(self._bucket, self._prefix, name), work))
        try:
            return await asyncio.shield(working)
        except BaseException:
            working.cancel()
            await asyncio.shield(asyncio.create_task(_end(working)))
            raise

    async def _work(self, names: Names, work: Callable[[Requests, Names], Awaitable[R]]) -> R:
        thread = S3Threads(names.name)
        try:
            store = await self._requests(thread)
            try:
                return await work(store, names)
            finally:
                await store.aclose()
        finally:
            thread.shutdown(wait=False)

    async def _opened(self, name: str, opening: Callable[[Requests, Names, Callable[[], None]], Awaitable[C]]) -> C:
        """Claim a state, and call a function that opens it with new connections."""
        # The opening is a separate task. So it is undone completely, even if the caller is cancelled a second time.
        task = asyncio.create_task(self._open_claimed(Names.of(self._bucket, self._prefix, name), opening))
        try:
            return await asyncio.shield(task)
        except BaseException:
            task.cancel()
            await asyncio.shield(asyncio.create_task(_let_go(task)))
            raise

    async def _open_claimed(
        self, names: Names, opening: Callable[[Requests, Names, Callable[[], None]], Awaitable[C]]
    ) -> C:
        claim = _Claim(self._endpoint_url, names)
        try:
            return await self._open_in(S3Threads(names.name), names, opening, claim)
        except BaseException:
            claim.release()
            raise

    async def _open_in(
        self,
        thread: S3Threads,
        names: Names,
        opening: Callable[[Requests, Names, Callable[[], None]], Awaitable[C]],
        claim: _Claim,
    ) -> C:
        def let_go() -> None:
            thread.shutdown(wait=False)
            claim.release()

        try:
            store = await self._requests(thread)
            try:
                opened = await opening(store, names, let_go)
            except BaseException:
                await store.aclose()
                raise
        except BaseException:
            thread.shutdown(wait=False)
            raise
        store.is_opening = False
        return opened

    async def _open_session(self, store: Requests, names: Names, let_go: Callable[[], None]) -> S3Session:
        from lab_state.storage.s3._open import open_state  # noqa: PLC0415 -- it needs an extra
        from lab_state.storage.s3._session import S3Session  # noqa: PLC0415 -- it needs an extra

        session = S3Session(store, names, await open_state(store, names), let_go, self._limits)
        session.place = _Claim.key_of(self._endpoint_url, names)
        return session

    async def _requests(self, thread: S3Threads) -> Requests:
        await asyncio.get_running_loop().run_in_executor(thread, _import)
        from lab_state.storage.s3._client import Requests  # noqa: PLC0415 -- it needs an extra
        from lab_state.storage.s3._connect import connect  # noqa: PLC0415 -- it needs an extra

        def connecting() -> Any:
            return connect(self._session, self._config, self._endpoint_url, self._region_name, thread)

        return Requests(self._bucket, connecting, thread, self._time)


async def _read_objects(store: Requests, names: Names) -> Reading:
    from lab_state.storage.s3._read import read_objects  # noqa: PLC0415 -- it needs an extra

    return await read_objects(store, names)


async def _end(task: asyncio.Task[Any]) -> None:
    """Wait until a cancelled task has ended, and ignore its outcome."""
    await asyncio.wait({task})
    _ = task.cancelled() or task.exception()  # otherwise asyncio would log the exception as never retrieved


async def _let_go(opening: asyncio.Task[C]) -> None:
    """Wait for the end of a cancelled opening. If it opened a state, close it."""
    await asyncio.wait({opening})
    if not opening.cancelled() and opening.exception() is None:
        await opening.result().aclose()


def _check_extra() -> None:
    """Check that aiobotocore is installed, without importing it. The import would take 0.3 s.

    Raises:
        ImportError: aiobotocore is missing.
    """
    try:
        is_missing = importlib.util.find_spec("aiobotocore") is None
    except ImportError:
        is_missing = True
    if is_missing:
        raise ImportError(
            "S3Storage needs the extra s3: pip install 'lab-state[s3]', or pip install '.[s3]' in a clone of lab_state",
            name="aiobotocore",
        )


def _import() -> None:
    """Import the client. This runs in a thread, because the import takes 0.3 s."""
    try:
        importlib.import_module("lab_state.storage.s3._client")
    except ImportError as error:
        raise UnsupportedError(
            "the extra s3 cannot be imported: install it again with pip install 'lab-state[s3]', "
            f"or pip install '.[s3]' in a clone of lab_state ({error})"
        ) from error


def _checked_bucket(bucket: str) -> str:
    bucket = check_text("bucket", bucket)
    if not _BUCKET.fullmatch(bucket):
        shown = "this" if "@" in bucket else repr(bucket)  # the text may be a URL with a password in it
        raise ValueError(f"{shown} is not the name of a bucket: it needs 3 to 63 letters, digits, dots and hyphens")
    return bucket


def _checked_prefix(prefix: str) -> str:
    prefix = check_text("prefix", prefix)
    parts = prefix.split("/")
    if prefix and ("" in parts or "." in parts or ".." in parts or not prefix.isprintable()):
        raise ValueError(
            f"the prefix {prefix!r} must be like 'state/modules': printable, and between the slashes no part is empty, '.' or '..'"
        )
    if len(prefix.encode()) > _MOST_PREFIX_BYTES:
        raise ValueError(f"the prefix must have at most {_MOST_PREFIX_BYTES} bytes")
    return prefix


def _checked_endpoint(url: str) -> str:
    from urllib.parse import urlsplit  # noqa: PLC0415 -- it takes 2 % of `import lab_state`, and few programs need it

    url = check_text("endpoint_url", url)
    wanted = "endpoint_url must be like 'https://s3.example:9000'"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError(f"{wanted}: this one cannot be parsed") from None
    if "@" in url:
        raise ValueError(f"{wanted}, without credentials in it: set credentials as for any AWS client")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{wanted}: with http or https, and a host")
    if parts.query or parts.fragment:
        raise ValueError(f"{wanted}, without a query or a fragment")
    return url


def _checked_session(session: Any) -> Any:
    if not has_calls(session, "create_client"):
        raise TypeError(f"session must be a session of aiobotocore, not {kind_of(session)}")
    return session


def _checked_config(config: Any) -> Any:
    if not has_calls(config, "merge"):
        raise TypeError(f"config must be an AioConfig of aiobotocore, not {kind_of(config)}")
    return config
