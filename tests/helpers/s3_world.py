"""A store for the tests, and functions that read and write it without the storage."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, TypeVar

from aiobotocore.session import get_session

from lab_state import S3Storage
from lab_state._clock import Clock
from lab_state.storage._protocol import SnapshotSource
from lab_state.storage.s3._time import Time
from lab_state.testing import ManualClock

Case = TypeVar("Case")

ENDPOINT = "LAB_STATE_TEST_S3_ENDPOINT"
"""An environment variable that `nox -s s3-real` sets: the address of a real store. Its credentials are in the environment, too."""

THOROUGH = bool(os.environ.get("LAB_STATE_S3_THOROUGH"))
"""Whether all cases are tried. `nox -s s3-faults` and `nox -s s3-real` set it. Otherwise some of the faults and cancellations are tried."""

_numbers = itertools.count()


def some(cases: Iterable[Case], step: int) -> list[Case]:
    """Return each case if the run is thorough, otherwise one of `step` cases."""
    return list(cases)[:: 1 if THOROUGH else step]


@functools.cache
def endpoint() -> str:
    """Return the address of the store of this test run. If no store is given, start moto in another process."""
    if ENDPOINT in os.environ:
        return os.environ[ENDPOINT]
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "testaccess")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "testsecret")
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    # Moto runs in another process. That process ends when this process ends, because its pipe is then closed. For each
    # request, moto looks up its 170 directories in the file system, which takes a third of its time. Here it does this only once.
    code = (
        "import sys; from moto import backends as b; from moto.server import ThreadedMotoServer as S;"
        "names = list(b.list_of_moto_modules()); b.list_of_moto_modules = lambda: names;"
        "s = S(ip_address='127.0.0.1', port=0, verbose=False);"
        "s.start(); print(s.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    atexit.register(_end, server)
    assert server.stdout is not None
    return f"http://127.0.0.1:{int(server.stdout.readline())}"


def _end(server: subprocess.Popen[str]) -> None:
    server.kill()
    server.communicate()


@functools.cache
def client(url: str | None = None) -> Any:
    """Return a blocking client, which accesses the store without the storage."""
    import boto3  # noqa: PLC0415 -- 0.3 s
    from botocore.config import Config  # noqa: PLC0415

    url = url or endpoint()
    return boto3.client(
        "s3", endpoint_url=url, config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 0})
    )


@functools.cache
def session_of_all() -> Any:
    """Return one session for all clients. A client with its own session takes 10 ms more."""
    return get_session()


def given(*slices: bytes) -> SnapshotSource:
    """Return a snapshot source with these slices."""

    async def view() -> AsyncIterator[bytes]:
        for part in slices:
            yield part

    return view


VIEW = given(b"{}")


class QuickTime(Time):
    """A time for tests. A pause takes no real time, and advances the clock. A limit expires when a test advances the clock."""

    def __init__(self, manual: ManualClock | None = None) -> None:
        self.manual = manual or ManualClock()
        clock: Clock = self.manual
        super().__init__(clock)
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.manual.advance(seconds)


class Bucket:
    """A new bucket, and functions for its contents."""

    def __init__(self, *, versioned: bool = False) -> None:
        self.name = f"bucket-{os.getpid()}-{next(_numbers)}"
        self.s3 = client()
        self.s3.create_bucket(Bucket=self.name)
        if versioned:
            self.s3.put_bucket_versioning(Bucket=self.name, VersioningConfiguration={"Status": "Enabled"})
        self._metadata: dict[tuple[str, bytes], dict[str, str]] = {}

    def storage(self, url: str | None = None, **arguments: Any) -> S3Storage:
        """Return a storage in this bucket. `session=None` gives each client its own session."""
        arguments = {"session": session_of_all(), **arguments}
        storage = S3Storage(self.name, endpoint_url=url or endpoint(), region_name="us-east-1", **arguments)
        storage._time = QuickTime()
        return storage

    def keys(self, prefix: str = "") -> dict[str, int]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", ())}

    def get(self, key: str) -> tuple[bytes, dict[str, str]]:
        found = self.s3.get_object(Bucket=self.name, Key=key)
        return found["Body"].read(), found["Metadata"]

    def put(self, key: str, data: bytes, metadata: Mapping[str, str] | None = None) -> None:
        self.s3.put_object(Bucket=self.name, Key=key, Body=data, Metadata=dict(metadata or {}))

    def etag(self, key: str) -> str:
        """Return the ETag of an object without quotation marks; an empty text if there is none."""
        entries = self.s3.list_objects_v2(Bucket=self.name, Prefix=key, MaxKeys=1).get("Contents", ())
        return next((entry["ETag"].strip('"') for entry in entries if entry["Key"] == key), "")

    def delete(self, key: str) -> None:
        self.s3.delete_object(Bucket=self.name, Key=key)

    # The hooks of the conformance suite

    def read_raw(self, name: str) -> dict[str, bytes]:
        """Return the snapshot and the records. Fences and the probe are empty, so they are left out."""
        sizes = {**self.keys(f"state/modules/{name}.json"), **self.keys(f"state/modules/{name}.journal/")}
        found = {}
        for key, size in sizes.items():
            if size or key.endswith(".json"):
                found[key], metadata = self.get(key)
                self._metadata[key, found[key]] = metadata
        return found

    def write_raw(self, part: str, data: bytes | None) -> None:
        """Write an object. Keep its metadata, even if the object was deleted before and is restored now."""
        if data is None:
            self.delete(part)
            return
        metadata = self._metadata.get((part, data))
        if metadata is None:
            metadata = self.s3.head_object(Bucket=self.name, Key=part)["Metadata"]
        self.put(part, data, metadata)
