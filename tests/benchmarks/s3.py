"""The figures of `S3Storage`, as ratios within one run: against moto's server in another process, or a real store.

Run with `nox -s s3-bench`; `-- --real` against Ceph's gateway, `-- --quick` for a tenth of the keys.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import statistics
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from measure import VALUE, Results, compare, flusher_of, resident, stall
from plots import stall_text
from s3_world import Bucket, endpoint

from lab_state import Config, Manager, S3Storage

SET_AT_ONCE = 10_000
MB = 1024 * 1024


async def main(count: int) -> None:
    results = Results()
    bucket = Bucket()
    storage = S3Storage(bucket.name, endpoint_url=endpoint(), region_name="us-east-1")
    async with Manager(Config(name="big", flush_interval=None), storage) as state:
        for first in range(0, count, SET_AT_ONCE):
            await state.set_many({f"key-{number:07}": VALUE for number in range(first, first + SET_AT_ONCE)})
        await state.flush()
        flusher = flusher_of(state)
        await flusher.checkpoints.ended()
        gc.collect()
        gc.freeze()
        await commits(results, state, bucket)
        await checkpoints(results, state, count)
        gc.unfreeze()


async def commits(results: Results, state: Manager, bucket: Bucket) -> None:
    """Measure one durable change, against one PUT of as many bytes by a client with the same settings."""
    client: Any = flusher_of(state)._session._store._connected  # type: ignore[attr-defined]
    sent: list[int] = []

    def count_bytes(request: Any, **_: object) -> None:
        headers = sum(len(name) + len(str(value)) + 4 for name, value in request.headers.items())
        sent.append(len(request.method) + len(request.url) + headers + int(request.headers["Content-Length"]))

    client.meta.events.register("before-send.s3", count_bytes)
    await state.set("key-0000007", VALUE)
    await state.flush()
    client.meta.events.unregister("before-send.s3", count_bytes)
    results.add(
        "bytes sent for one change, headers and all", f"{sum(sent)} in {len(sent)}", "<= 4096", met=sum(sent) <= 4096
    )

    numbers = itertools.count()
    record = b"x" * min(size for key, size in bucket.keys("state/modules/big.journal/").items() if size)
    settings = AioConfig(s3={"addressing_style": "path", "payload_signing_enabled": False})
    async with get_session().create_client(
        "s3", endpoint_url=endpoint(), region_name="us-east-1", config=settings
    ) as bare:

        async def ours() -> None:
            await state.set("key-0000007", next(numbers))
            await state.flush()
            await flusher_of(state).checkpoints.ended()  # one in 64, and no part of a commit

        async def theirs() -> None:
            await bare.put_object(Bucket=bucket.name, Key=f"bare/{next(numbers):09}", Body=record, IfNoneMatch="*")

        for work in (ours, theirs):
            await work()
        ratio, our, their = await compare(ours, theirs, 40)
    results.add(
        "one change made durable / a bare PUT of as many bytes",
        f"{ratio:.2f} ({our * 1e3:.1f} / {their * 1e3:.1f} ms)",
        "<= 2",
        met=ratio <= 2,
    )


async def checkpoints(results: Results, state: Manager, count: int) -> None:
    """Measure the loop's longest stall while a snapshot is made and uploaded, and the memory that it takes."""
    flusher = flusher_of(state)
    gaps, above = [], []
    for number in range(7):
        await state.set("key-0000007", number)
        await state.flush()
        await flusher.checkpoints.ended()
        highest = asyncio.create_task(highest_memory())
        before = resident()
        gc.disable()  # a collection of a million keys is not the checkpoint's
        gaps.append(await stall(flusher.checkpoints.write(wait=True)))
        highest.cancel()
        gc.enable()
        above.append(max(highest_seen) - before)
    size = flusher.snapshot_bytes / 1e6
    gap = statistics.median(gaps)
    told = f"{stall_text(gap)} ({stall_text(min(gaps))} to {stall_text(max(gaps))})"
    results.add(
        f"loop stall while a snapshot of {size:.0f} MB ({count:,} keys) goes up", told, "<= 10 ms", met=gap <= 0.010
    )
    results.add(
        "memory above the state meanwhile", f"{max(above) / MB:.0f} MiB", "<= 64 MiB", met=max(above) <= 64 * MB
    )


highest_seen: list[int] = []


async def highest_memory() -> None:
    highest_seen[:] = [resident()]
    while True:
        await asyncio.sleep(0.05)
        highest_seen.append(resident())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the keys")
    endpoint()
    asyncio.run(main(100_000 if parser.parse_args().quick else 1_000_000))
