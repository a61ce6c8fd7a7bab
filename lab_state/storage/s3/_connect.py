"""The client of an object store: its settings, and its creation without blocking the event loop.

Only this module imports aiobotocore. The module is imported before the first request to a store.
"""

# aiobotocore and botocore have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import functools
import io
import os
import socket
from typing import Any, Protocol, cast

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from aiohttp.abc import AbstractResolver, ResolveResult
from botocore.exceptions import BotoCoreError

from lab_state.exceptions import UnsupportedError
from lab_state.storage.s3._threads import S3Threads

STANDSTILL = 15.0
"""The seconds for which a request may make no progress. The wait for a connection is included."""

_ENDPOINT_VARIABLES = frozenset({"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"})


class Client(Protocol):
    """The methods of an aiobotocore client that lab_state uses."""

    async def put_object(self, **parameters: Any) -> dict[str, Any]: ...
    async def head_object(self, **parameters: Any) -> dict[str, Any]: ...
    async def get_object(self, **parameters: Any) -> dict[str, Any]: ...
    async def list_objects_v2(self, **parameters: Any) -> dict[str, Any]: ...
    async def copy_object(self, **parameters: Any) -> dict[str, Any]: ...
    async def delete_objects(self, **parameters: Any) -> dict[str, Any]: ...
    async def close(self) -> None: ...


class Resolver(AbstractResolver):
    """A resolver that looks up host names in a thread of the session.

    aiohttp would use the default executor of the event loop. But all threads of that executor may be
    waiting for the write that needs this connection. Then the lookup would never run.
    """

    def __init__(self, thread: S3Threads) -> None:
        self._thread = thread

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return all addresses of a host."""
        found = await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
        )
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=int(address[1]),
                family=kind,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        """Do nothing, because the thread belongs to the session."""


def client_config(given: Any, thread: S3Threads, *, custom_endpoint: bool) -> Any:
    """Return the settings of the client. The caller's settings replace our defaults. Required settings replace both.

    In the groups `s3` and `connector_args`, the caller's settings replace ours, too.
    """
    ours = AioConfig(connect_timeout=5, read_timeout=STANDSTILL, max_pool_connections=16)
    config: Any = ours if given is None else ours.merge(given)
    # The signature covers the Content-MD5 of each body. A signed SHA-256 of 100 MB would be computed on the event loop.
    s3: dict[str, Any] = {"payload_signing_enabled": False}
    if custom_endpoint:
        s3["addressing_style"] = "path"
    needed = AioConfig(
        s3={**s3, **(config.s3 or {})},
        # The client makes only one attempt, because only `Requests.put` can find out whether an attempt took effect.
        retries={"mode": "standard", "total_max_attempts": 1},
        connector_args={"resolver": Resolver(thread), **config.connector_args},
        warm_up_loader_caches=True,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return config.merge(needed)


@functools.cache
def _loader() -> Any:
    """Return the loader of botocore's description of S3. All sessions share it, because loading takes 0.1 s."""
    return get_session().get_component("data_loader")


def _new_session() -> Any:
    session = get_session()
    session.register_component("data_loader", _loader())
    return session


async def connect(
    session: Any, config: Any, endpoint_url: str | None, region_name: str | None, thread: S3Threads
) -> Client:
    """Return a new client, created without blocking the event loop.

    Raises:
        UnsupportedError: The settings are wrong.
        BotoCoreError: botocore has found the fault in the settings; see `FAILURES`.
    """
    custom = endpoint_url is not None or not _ENDPOINT_VARIABLES.isdisjoint(os.environ)
    settings = client_config(config, thread, custom_endpoint=custom)

    loop = asyncio.get_running_loop()
    new = await loop.run_in_executor(thread, _new_session) if session is None else session
    made: Any = None
    problem = ""
    try:
        made = await loop.run_in_executor(thread, _made, new, region_name, endpoint_url, settings)
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, BotoCoreError):
            raise
        problem = type(error).__name__
    if problem:  # the text of the error may contain a credential, such as one in AWS_ENDPOINT_URL
        raise UnsupportedError(
            f"no client could be made for S3 ({problem}): check the endpoint and the region, also in the environment and in "
            "~/.aws/config, and the arguments session and config of S3Storage"
        )
    made.meta.events.register("before-call.s3.PutObject", _expect_nothing)
    return cast("Client", made)


def _made(session: Any, region_name: str | None, endpoint_url: str | None, settings: Any) -> Any:
    """Return a new client. The call blocks, because botocore reads a dozen files.

    The client is created on a temporary event loop. It can be used on another event loop, because
    it is bound to the loop of its first request.
    """

    async def make() -> Any:
        context = session.create_client("s3", region_name=region_name, endpoint_url=endpoint_url, config=settings)
        return await context.__aenter__()

    return asyncio.run(make())


def _expect_nothing(params: dict[str, Any], **_: object) -> None:
    """Remove `Expect: 100-continue` for a small body. Sending the body takes less time than waiting for this answer."""
    if isinstance(params["body"], (bytes, io.BytesIO)):
        params["headers"].pop("Expect", None)
