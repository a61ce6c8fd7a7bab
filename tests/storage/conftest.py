"""What the tests of `S3Storage` begin with."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from s3_proxy import Proxy
from s3_world import Bucket, endpoint


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """To the store, with faults on demand."""
    async with Proxy(endpoint()) as proxy:
        yield proxy
