"""What is peculiar to `S3Storage`: its arguments, bad input, the stores it refuses, and what it leaves in a bucket."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import error_of, in_child
from running import flusher_of
from s3_proxy import Hang, Proxy, Response, answers, lost
from s3_world import VIEW, Bucket, endpoint, given

from lab_state import (
    Config,
    CorruptionError,
    FencedError,
    FileStorage,
    InvalidNameError,
    LockedError,
    Manager,
    MemoryStorage,
    Recovery,
    S3Storage,
    StorageError,
    UnavailableError,
    UnsupportedError,
    copy_state,
    read_state,
)
from lab_state.storage import s3 as module
from lab_state.storage.s3._body import Upload
from lab_state.storage.s3._format import Names
from lab_state.storage.s3._threads import S3Threads
from lab_state.storage.s3._time import Time
from lab_state.testing import ManualClock

NAME = "peculiar"
JOURNAL = f"state/modules/{NAME}.journal/"
SNAPSHOT = f"state/modules/{NAME}.json"


# Arguments


@pytest.mark.parametrize("bucket", ["", "a", "a/../b c", "with space", "-a-", "ä-bucket", "x" * 3000])
def test_a_bad_bucket(bucket: str) -> None:
    """An invalid bucket name is refused by the constructor, before any request."""
    with pytest.raises(ValueError, match="is not the name of a bucket"):
        S3Storage(bucket)


@pytest.mark.parametrize("prefix", ["/a", "a/", "a//b", "/", "a/../b", "./a", "a\nb", "a\x00b", "p" * 600])
def test_a_bad_prefix(prefix: str) -> None:
    """A prefix has no empty part, no part of dots, only printable characters, and a bounded length."""
    with pytest.raises(ValueError, match="prefix"):
        S3Storage("bucket", prefix=prefix)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3.example:9000", "http or https"),
        ("ftp://s3.example", "http or https"),
        ("https://", "a host"),
        ("https://user:hidden@s3.example", "without credentials"),
        ("https://s3.example/?x=hidden", "without a query"),
        ("https://s3.example/#hidden", "without a query"),
        ("https://s3.example:port", "cannot be parsed"),
        ("https://[::1", "cannot be parsed"),
    ],
)
def test_a_bad_endpoint(url: str, words: str) -> None:
    """An endpoint is http or https with a host. The error does not quote a part that may be secret."""
    with pytest.raises(ValueError, match=words) as caught:
        S3Storage("bucket", endpoint_url=url)
    assert "hidden" not in str(caught.value)


def test_repr() -> None:
    """The text of a storage shows where the states are."""
    assert repr(S3Storage("bucket")) == "S3Storage('bucket', prefix='state/modules')"
    shown = repr(S3Storage("bucket", prefix="", endpoint_url="http://[::1]:9000"))
    assert shown == "S3Storage('bucket', prefix='', endpoint_url='http://[::1]:9000')"


# Imports


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_is_imported_before_it_is_opened() -> None:
    """Creating a storage, and a manager with it, does not import the client."""
    code = (
        "import sys; from lab_state import Manager, S3Storage; Manager('a', S3Storage('bucket'));"
        "print(sorted({'aiobotocore', 'botocore', 'aiohttp'} & {name.split('.')[0] for name in sys.modules}))"
    )
    assert run(code) == "[]"


MISSING = {
    "marked": "import sys; sys.modules['aiobotocore'] = None\n",
    "not found": "import sys; sys.path[:] = [p for p in sys.path if not p.endswith('site-packages')] + [NEEDED]\n",
    "refused": """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name == "aiobotocore":
            raise ImportError("no")

sys.meta_path.insert(0, Refused())
""",
}


@pytest.mark.parametrize("how", MISSING)
def test_without_the_extra(how: str, tmp_path: Path) -> None:
    """If aiobotocore is missing, the constructor raises an ImportError that names the extra and the command."""
    for name in ("lab_state", "msgspec", "aiofiles"):
        (tmp_path / name).symlink_to(Path(str(importlib.import_module(name).__file__)).parent)
    code = MISSING[how].replace("NEEDED", repr(str(tmp_path))) + (
        "from lab_state import S3Storage\n"
        "try: S3Storage('bucket')\n"
        "except ImportError as error: print(error.name, error)"
    )
    assert run(code) == (
        "aiobotocore S3Storage needs the extra s3: pip install 'lab-state[s3]', "
        "or pip install '.[s3]' in a clone of lab_state"
    )


def test_an_extra_that_is_broken() -> None:
    """If aiobotocore cannot be imported, `start()` says what to install again."""
    code = (
        "import sys, asyncio; sys.modules['aiohttp'] = None\n"
        "from lab_state import Manager, S3Storage, UnsupportedError\n"
        "try: asyncio.run(Manager('a', S3Storage('bucket')).start())\n"
        "except UnsupportedError as error: print(error)"
    )
    said = run(code)
    assert "install it again with pip install 'lab-state[s3]', or pip install '.[s3]' in a clone of lab_state" in said


# Credentials and settings


async def test_a_session_of_the_callers(bucket: Bucket) -> None:
    """Credentials can come from an aiobotocore session, and settings from a configuration."""
    from aiobotocore.config import AioConfig  # noqa: PLC0415
    from aiobotocore.session import get_session  # noqa: PLC0415

    session = get_session()
    config = AioConfig(read_timeout=3, s3={"addressing_style": "path"}, connector_args={"keepalive_timeout": 1})
    storage = bucket.storage(session=session, config=config)
    opened = await storage.open(NAME)
    assert re.fullmatch(rf"<S3Session of \S+{re.escape(SNAPSHOT)}>", repr(opened))
    await opened.commit(b"1", VIEW)
    client = opened._store._connected
    settings = client.meta.config  # type: ignore[attr-defined]
    assert (settings.read_timeout, settings.retries["total_max_attempts"]) == (3, 1)
    assert settings.connector_args["keepalive_timeout"] == 1
    await opened.aclose()


async def test_bad_settings_of_the_environment(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings with which no client can be created are an error that names them, and nothing stays open."""
    storage = bucket.storage()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_PROFILE", "no-such-profile")
        with pytest.raises(UnsupportedError, match="no usable credentials"):
            await storage.open(NAME)
    session = await storage.open(NAME)
    await session.aclose()


def test_the_path_has_the_bucket_at_custom_endpoints_only() -> None:
    """On AWS the bucket is addressed as botocore does it. Bodies are never read to sign them."""
    from lab_state.storage.s3._connect import client_config  # noqa: PLC0415

    with S3Threads("test") as thread:

        async def configs() -> list[Any]:
            return [client_config(None, thread, custom_endpoint=custom).s3 for custom in (False, True)]

        aws, custom = asyncio.run(configs())
    assert aws == {"payload_signing_enabled": False}
    assert custom == {"payload_signing_enabled": False, "addressing_style": "path"}


async def test_a_limit_that_has_ended_starts_no_timer() -> None:
    """Progress that is reported after the block, as by an upload that is given up, does not cancel the task later."""
    clock = ManualClock()
    async with Time(clock).limit(1.0) as limit:
        pass
    limit.moved()
    clock.advance(2.0)
    await asyncio.sleep(0)


async def test_a_pause_is_by_the_clock() -> None:
    """A pause ends by the given clock. A cancelled pause leaves no timer behind."""
    clock = ManualClock()
    pauses = [asyncio.create_task(Time(clock).sleep(seconds)) for seconds in (1.0, 2.0)]
    await asyncio.sleep(0)
    pauses[1].cancel()
    clock.advance(1)
    await pauses[0]
    with pytest.raises(asyncio.CancelledError):
        await pauses[1]
    clock.advance(10)


async def test_host_names_are_looked_up_in_a_thread_of_its_own(bucket: Bucket) -> None:
    """Host names are looked up without the default executor of the loop, whose threads may all wait for the write."""
    url = endpoint().replace("127.0.0.1", "localhost")
    used: list[object] = []
    loop = asyncio.get_running_loop()
    default = loop.run_in_executor

    def watched(executor: Any, function: Any, *arguments: Any) -> Any:
        used.append(executor)
        return default(executor, function, *arguments)

    from aiobotocore.config import AioConfig  # noqa: PLC0415

    config = AioConfig(connector_args={"keepalive_timeout": 0.0, "use_dns_cache": False})
    session = await bucket.storage(url, config=config).open(NAME)
    loop.run_in_executor = watched  # type: ignore[assignment,method-assign]
    await session.commit(b"1", VIEW)
    await session.checkpoint(given(b"x" * 3_000_000))
    await session.aclose()
    assert set(used) == {session._store.thread}


# Stores and buckets that will not do


async def test_no_bucket() -> None:
    """The error for a missing bucket says so."""
    storage = S3Storage("no-such-bucket-here", endpoint_url=endpoint(), region_name="us-east-1")
    with pytest.raises(UnsupportedError, match="no such bucket"):
        await storage.open(NAME)


async def test_no_network(bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    """If no server answers, an opening warns every 10 s, gives up after half a minute, and leaves nothing open."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        storage = bucket.storage(f"http://127.0.0.1:{taken.getsockname()[1]}")
        for _ in range(2):
            caplog.clear()
            with pytest.raises(UnavailableError, match="EndpointConnectionError"):
                await storage.open(NAME)
            told = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "lab_state"]
            assert [level for level, _ in told] == ["WARNING"] * 3
            assert re.search(r"waits for S3: .* failed 2 times, last with EndpointConnectionError", told[0][1])


@pytest.mark.parametrize(
    ("method", "part", "status", "code", "words"),
    [
        ("PUT", ".probe", 403, "AccessDenied", "permission is missing"),
        ("HEAD", ".json", 403, "403", "s3:ListBucket"),
        ("GET", "list-type", 403, "AccessDenied", "s3:ListBucket"),
        ("GET", "list-type", 404, "NoSuchBucket", "no such bucket"),
        ("GET", "list-type", 404, "NoSuchKey", "no such bucket"),
        ("GET", ".json", 403, "AccessDenied", "s3:GetObject"),
        ("PUT", ".journal", 403, "AccessDenied", "s3:PutObject"),
        ("PUT", ".probe", 403, "RequestTimeTooSkewed", "clock"),
        ("PUT", ".probe", 400, "AuthorizationHeaderMalformed", "region_name"),
        ("PUT", ".probe", 301, "PermanentRedirect", "region_name"),
        ("PUT", ".probe", 501, "NotImplemented", "conditional writes"),
        ("PUT", ".probe", 400, "NotImplemented", "conditional writes"),
        ("PUT", ".probe", 404, "NoSuchBucket", "create it"),
    ],
)
async def test_a_store_that_refuses(  # noqa: PLR0917
    bucket: Bucket, proxy: Proxy, method: str, part: str, status: int, code: str, words: str
) -> None:
    """A refusal at any step of an opening is an error at once, with the remedy, and nothing stays open."""
    proxy.plan(method, part, answers(status, code), times=2)
    storage = bucket.storage(proxy.url)
    with pytest.raises(UnsupportedError, match=words):
        await storage.open(NAME)
    proxy.end_plans()
    session = await storage.open(NAME)
    await session.aclose()


async def test_a_probe_is_repeated(bucket: Bucket, proxy: Proxy) -> None:
    """The check of the conditions is repeated if the network fails."""
    proxy.plan("PUT", ".probe", lost, times=3)
    session = await bucket.storage(proxy.url).open(NAME)
    await session.aclose()


@pytest.mark.parametrize("header", ["if-match", "if-none-match"])
async def test_a_store_that_ignores_conditions(bucket: Bucket, proxy: Proxy, header: str) -> None:
    """A store that writes although the condition is not met is refused before anything else is written."""

    async def ignore(request: Any, forward: Any) -> Any:
        response = await forward(request)
        return Response(200, {"etag": '"written"'}) if header in request.headers else response

    proxy.plan("PUT", "/", ignore, times=float("inf"))
    with pytest.raises(UnsupportedError, match="ignores"):
        await bucket.storage(proxy.url).open(NAME)
    assert set(bucket.keys()) == {f"state/modules/{NAME}.probe"}


@contextlib.contextmanager
def rclone(directory: Path) -> Iterator[str]:
    """Run an S3 server that ignores conditions."""
    binary = shutil.which("rclone", path=str(Path(sys.executable).parent))
    assert binary, "rclone comes with the test group"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (directory / "bucket").mkdir()
    command = [
        binary,
        "serve",
        "s3",
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        "testaccess,testsecret",
        str(directory),
    ]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as server:
        try:
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                    break
                assert server.poll() is None
                time.sleep(0.02)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


async def test_rclone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real server that ignores conditions is refused."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testaccess")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecret")
    with rclone(tmp_path) as url, pytest.raises(UnsupportedError, match="ignores"):
        await S3Storage("bucket", endpoint_url=url, region_name="us-east-1").open(NAME)
    assert not (tmp_path / "bucket" / SNAPSHOT).exists()


async def test_a_versioned_bucket() -> None:
    """A bucket with versioning works. If the store then ignores conditions, it is refused."""
    bucket = Bucket(versioned=True)
    try:
        session = await bucket.storage().open(NAME)
    except UnsupportedError as refused:
        assert "versioning" in str(refused)  # noqa: PT017
        return
    await session.commit(b"1", VIEW)
    await session.checkpoint(given(b"snapshot"))
    await session.commit(b"2", VIEW)
    await session.aclose()
    again = await bucket.storage().open(NAME)
    assert again.recovery == Recovery(b"snapshot", (b"2",), unsettled=False, dropped_bytes=0)
    await again.aclose()


# What is there


async def test_what_is_left_in_the_bucket(bucket: Bucket) -> None:
    """A clean stop leaves one JSON object, the fence and the probe.

    The stamp is in the snapshot and in its metadata.
    """
    async with Manager(NAME, bucket.storage()) as state:
        await state.set_many({"a": 1, "b": [1, 2]})
    assert set(bucket.keys()) == {SNAPSHOT, f"{JOURNAL}{1:020d}", f"state/modules/{NAME}.probe"}
    data, metadata = bucket.get(SNAPSHOT)
    content = json.loads(data)
    assert (content["a"], content["b"]) == (1, [1, 2])
    assert (content["$lab_state"]["seq"], content["$lab_state"]["fence"]) == (2, 1)
    assert (metadata["labstateseq"], metadata["labstatefence"]) == ("2", "1")
    assert len(metadata["labstatewid"]) == 32


async def test_without_a_prefix(bucket: Bucket) -> None:
    """With an empty prefix the keys start with the name."""
    async with Manager(NAME, bucket.storage(prefix="")) as state:
        await state.set("a", 1)
    assert f"{NAME}.json" in set(bucket.keys())


PLAIN = b'{"visits": 3, "user": {"name": "ann"}}'


async def test_a_plain_file_is_imported(bucket: Bucket) -> None:
    """A JSON object of another program is loaded at revision 0. The first checkpoint replaces it."""
    bucket.put(SNAPSHOT, PLAIN)
    for expected in (3, 4, 5):
        async with Manager(NAME, bucket.storage()) as state:
            assert await state.get("visits") == expected
            await state.incr("visits")
            assert await state.get("user") == {"name": "ann"}


async def test_a_plain_file_keeps_its_records(bucket: Bucket) -> None:
    """Records committed after an imported file, before a checkpoint, are loaded after a crash."""
    bucket.put(SNAPSHOT, PLAIN)
    session = await bucket.storage().open(NAME)
    await session.commit(b"1", VIEW)
    await session.aclose()
    again = await bucket.storage().open(NAME)
    assert again.recovery[:2] == (PLAIN, (b"1",))
    await again.aclose()


async def test_a_file_edited_by_hand(bucket: Bucket) -> None:
    """After a clean stop, a snapshot without our member that replaces ours is loaded."""
    for number in range(3):
        async with Manager(NAME, bucket.storage()) as state:
            await state.set("visits", number)
    bucket.put(SNAPSHOT, PLAIN)
    async with Manager(NAME, bucket.storage()) as state:
        assert await state.get("visits") == 3
        await state.set("visits", 4)
    async with Manager(NAME, bucket.storage()) as state:
        assert await state.get("visits") == 4


async def test_a_file_put_there_beside_records_that_are_not_its_own(bucket: Bucket) -> None:
    """A hand-made snapshot is refused if there are records of the old one: they name another snapshot."""
    async with Manager(NAME, bucket.storage()) as state:
        await state.set("a", 1)
    session = await bucket.storage().open(NAME)
    await session.commit(b'{"from":1,"to":2,"clear":false,"set":{"a":2},"delete":[],"expires":{}}', VIEW)
    await session.aclose()
    bucket.put(SNAPSHOT, PLAIN)
    with pytest.raises(CorruptionError, match="follows is not the present one"):
        await Manager(NAME, bucket.storage()).start()


async def test_an_edit_beside_records_that_are_older(bucket: Bucket) -> None:
    """A snapshot that was edited while there were records is refused: the edit and the first record have the same revision."""
    config = Config(NAME, flush_interval=0)
    async with Manager(config, bucket.storage()) as state:
        await state.set("a", 1)
    state = Manager(config, bucket.storage())
    await state.start()
    await state.set("b", 2)
    await state.set("c", 3)
    await flusher_of(state).abort().aclose()
    data, metadata = bucket.get(SNAPSHOT)
    edited = data[: data.rfind(b',"crc32"')].replace(b'"a":1', b'"a":9') + b"}}"
    bucket.put(SNAPSHOT, edited, metadata)
    for read in (Manager(config, bucket.storage()).start(), read_state(NAME, bucket.storage())):
        with pytest.raises(
            CorruptionError, match="was edited, but there are records that were written before the edit"
        ):
            await read
    bucket.put(SNAPSHOT, data, metadata)
    assert await (await read_state(NAME, bucket.storage())).get_all() == {"a": 1, "b": 2, "c": 3}


async def test_records_after_an_edit(bucket: Bucket) -> None:
    """Records that were written after the edit of a snapshot are loaded."""
    config = Config(NAME, flush_interval=0)
    async with Manager(config, bucket.storage()) as state:
        await state.set("a", 1)
    data, metadata = bucket.get(SNAPSHOT)
    bucket.put(SNAPSHOT, data[: data.rfind(b',"crc32"')].replace(b'"a":1', b'"a":9') + b"}}", metadata)
    session = await bucket.storage().open(NAME)
    await session.commit(b'{"from":2,"to":3,"clear":false,"set":{"b":2},"delete":[],"expires":{}}', VIEW)
    await session.aclose()
    assert await (await read_state(NAME, bucket.storage())).get_all() == {"a": 9, "b": 2}


async def test_a_copy_that_lost_its_metadata(bucket: Bucket) -> None:
    """A snapshot restored without its metadata has the number that it covers in its own member."""
    for number in range(3):
        async with Manager(NAME, bucket.storage()) as state:
            await state.set("visits", number)
    bucket.put(SNAPSHOT, bucket.get(SNAPSHOT)[0])
    async with Manager(NAME, bucket.storage()) as state:
        assert await state.get("visits") == 2


async def test_metadata_of_another_snapshot(bucket: Bucket) -> None:
    """Metadata and contents that disagree are damage."""
    async with Manager(NAME, bucket.storage()) as state:
        await state.set("visits", 1)
    data, metadata = bucket.get(SNAPSHOT)
    bucket.put(SNAPSHOT, data, {**metadata, "labstateseq": "1"})
    with pytest.raises(CorruptionError, match="metadata"):
        await Manager(NAME, bucket.storage()).start()


async def test_a_deleted_snapshot_is_not_empty(bucket: Bucket) -> None:
    """Fences of several starts without a snapshot are damage, not a new state."""
    for number in range(2):
        async with Manager(NAME, bucket.storage()) as state:
            await state.set("visits", number)
    bucket.delete(SNAPSHOT)
    with pytest.raises(CorruptionError, match="missing"):
        await Manager(NAME, bucket.storage()).start()


async def test_a_foreign_object_under_the_name(bucket: Bucket) -> None:
    """An object that is not a JSON object is refused and not changed."""
    bucket.put(SNAPSHOT, b"\x89PNG")
    with pytest.raises(CorruptionError, match="not a JSON object"):
        await Manager(NAME, bucket.storage()).start()
    assert bucket.get(SNAPSHOT)[0] == b"\x89PNG"


# One process


async def test_another_address_is_another_claim(bucket: Bucket, proxy: Proxy) -> None:
    """Within a process a state is locked by its address and key, until its session has ended."""
    session = await bucket.storage().open(NAME)
    with pytest.raises(LockedError, match="in this process"):
        await bucket.storage().open(NAME)
    other = await bucket.storage().open("other")
    await other.aclose()
    rival = await bucket.storage(proxy.url).open(NAME)
    with pytest.raises(FencedError):
        await session.commit(b"1", VIEW)
    await rival.aclose()
    await session.aclose()


async def test_a_claim_of_a_parent_is_not_held(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked child does not hold the claims of its parent."""
    names = Names.of(bucket.name, "", NAME)
    claim = module._Claim(None, names)
    monkeypatch.setattr(claim, "pid", -1)
    child = module._Claim(None, names)
    claim.release()
    with pytest.raises(LockedError):
        module._Claim(None, names)
    child.release()


async def test_a_session_is_refused_in_a_child(bucket: Bucket) -> None:
    """A forked child writes nothing with the session of its parent, which goes on."""
    session = await bucket.storage().open(NAME)
    await session.commit(b"1", VIEW)
    calls = {"commit": lambda: session.commit(b"2", VIEW), "checkpoint": lambda: session.checkpoint(VIEW)}
    refusals = await in_child(lambda: {name: error_of(call) for name, call in calls.items()})
    for error, message in refusals.values():
        assert error == "UnsupportedError"
        assert "belongs to the parent of this forked process" in message
    await session.commit(b"2", VIEW)
    await session.aclose()


def test_a_session_whose_loop_was_closed(bucket: Bucket) -> None:
    """If the event loop of a manager was closed, another loop can stop it, and unflushed changes are written."""
    manager = Manager(Config(name=NAME, flush_interval=None), bucket.storage())

    async def begin() -> None:
        await manager.start()
        await manager.set("a", 1)
        await manager.flush()
        await manager.set("b", 2)
        running = flusher_of(manager)._session
        await running._store._connected.close()  # type: ignore[attr-defined]

    async def look() -> dict[str, Any]:
        async with Manager(NAME, bucket.storage()) as state:
            return await state.get_all()

    asyncio.run(begin())
    asyncio.run(manager.stop())
    assert asyncio.run(look()) == {"a": 1, "b": 2}


async def test_closing_waits_for_what_is_under_way(bucket: Bucket, proxy: Proxy) -> None:
    """A commit whose caller was cancelled ends before the state is released."""
    session = await bucket.storage(proxy.url).open(NAME)
    proxy.plan("PUT", JOURNAL, hang := Hang())
    committing = asyncio.create_task(session.commit(b"1", VIEW))
    await hang.reached.wait()
    committing.cancel()
    closing = asyncio.create_task(session.aclose())
    await asyncio.sleep(0)
    with pytest.raises(UnsupportedError, match="closed"):
        await session.commit(b"2", VIEW)
    with pytest.raises(LockedError):
        await bucket.storage(proxy.url).open(NAME)
    hang.released.set()
    await closing
    again = await bucket.storage().open(NAME)
    assert again.recovery.records == (b"1",)
    await again.aclose()


async def test_a_commit_begun_before_the_close_ends_well(bucket: Bucket) -> None:
    """Closing waits for a commit that was started, even if nothing was sent yet."""
    session = await bucket.storage().open(NAME)
    committing = asyncio.create_task(session.commit(b"1" * 300_000, VIEW))  # long enough to be framed in a thread
    await asyncio.sleep(0)
    await session.aclose()
    await committing
    again = await bucket.storage().open(NAME)
    await again.aclose()
    assert again.recovery.records == (b"1" * 300_000,)


async def test_a_checkpoint_begun_before_the_close_ends_well(bucket: Bucket) -> None:
    """Closing waits for a checkpoint that is still spooling, and then releases the state."""
    session = await bucket.storage().open(NAME)
    reached, released = asyncio.Event(), asyncio.Event()

    async def slices() -> AsyncIterator[bytes]:
        yield b"{"
        reached.set()
        await released.wait()
        yield b"}"

    checkpointing = asyncio.create_task(session.checkpoint(slices))
    await reached.wait()
    closing = asyncio.create_task(session.aclose())
    await asyncio.sleep(0)
    with pytest.raises(LockedError):
        await bucket.storage().open(NAME)
    released.set()
    await checkpointing
    await closing
    again = await bucket.storage().open(NAME)
    await again.aclose()
    assert again.recovery.snapshot == b"{}"


async def test_an_open_that_is_cancelled_at_its_end(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """If an opening is cancelled when the session exists, the session is closed before the caller continues."""
    storage = bucket.storage()
    begun = storage._open_session

    async def cancelled_after(*arguments: Any) -> Any:
        session = await begun(*arguments)
        outer.cancel()
        return session

    monkeypatch.setattr(storage, "_open_session", cancelled_after)
    outer = asyncio.create_task(storage.open(NAME))
    with pytest.raises(asyncio.CancelledError):
        await outer
    monkeypatch.undo()
    session = await storage.open(NAME)
    await session.aclose()


async def test_a_checkpoint_that_is_cancelled_is_waited_for(bucket: Bucket, proxy: Proxy) -> None:
    """A snapshot that is being sent when its caller is cancelled is sent completely before the next one."""
    session = await bucket.storage(proxy.url).open(NAME)
    proxy.plan("PUT", SNAPSHOT, hang := Hang())
    checkpointing = asyncio.create_task(session.checkpoint(given(b"first")))
    await hang.reached.wait()
    checkpointing.cancel()
    second = asyncio.create_task(session.checkpoint(given(b"second")))
    await asyncio.sleep(0)
    hang.released.set()
    await second
    await session.aclose()
    assert bucket.get(SNAPSHOT)[0] == b"second"


async def test_a_snapshot_beyond_one_put(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot larger than one PUT can send is refused; commits go on."""
    monkeypatch.setattr("lab_state.storage.s3._session._MOST_SNAPSHOT_BYTES", 10)
    session = await bucket.storage().open(NAME)
    with pytest.raises(UnsupportedError, match="5 GiB"):
        await session.checkpoint(given(b"x" * 11))
    await session.commit(b"1", VIEW)
    await session.aclose()


async def test_no_room_for_temporary_files(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a directory for temporary files a large snapshot fails, and commits work."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.writelines", full)
    session = await bucket.storage().open(NAME)
    with pytest.raises(UnavailableError, match="No space left"):
        await session.checkpoint(given(b"x"))
    await session.commit(b"1", VIEW)
    await session.aclose()


def test_an_upload_is_not_read() -> None:
    """Only aiohttp sends an upload, by iterating. `read` exists because botocore looks for it."""
    with pytest.raises(NotImplementedError):
        Upload.read(Upload.__new__(Upload))


# Moving a state


async def test_a_state_moves_from_disk_to_s3_and_back(bucket: Bucket, tmp_path: Path) -> None:
    """`copy_state` copies everything at the same revision, reports progress, and does not change the source."""
    disk, back = FileStorage(tmp_path / "a"), FileStorage(tmp_path / "b")
    manager = Manager(Config(name=NAME, flush_interval=None), disk)
    await manager.start()
    for number in range(2500):
        await manager.set(f"key {number}", {"n": number})
    await manager.set("scalar", "x")
    await manager.set("expiring", 1, ttl=1_000_000)
    await manager.stop()
    seen: list[tuple[str, int]] = []
    assert await copy_state(NAME, disk, bucket.storage(), progress=lambda *step: seen.append(step)) == 2502
    assert [step for step, _ in seen[:1] + seen[-2:]] == ["read", "written", "verified"]
    assert all(size > 0 for _, size in seen)
    session = await bucket.storage().open(NAME)  # with a record behind the snapshot
    await session.commit(b'{"from":2502,"to":2503,"clear":false,"set":{"late":1},"delete":[],"expires":{}}', VIEW)
    await session.aclose()
    assert await copy_state(NAME, bucket.storage(), back) == 2503
    async with Manager(NAME, back) as state:
        assert (await state.get("late"), await state.get("key 7"), state.revision) == (1, {"n": 7}, 2503)
        assert 999_000 < (await state.expires_in("expiring") or 0) <= 1_000_000
    async with Manager(NAME, disk) as state:
        assert (len(state), state.revision) == (2502, 2502)


async def test_a_copy_never_overwrites(tmp_path: Path) -> None:
    """A target that has a state is refused, as are a source without one and a bad name. All locks are released."""
    source, target = FileStorage(tmp_path), MemoryStorage()
    with pytest.raises(UnsupportedError, match="there is no state"):
        await copy_state(NAME, source, target)
    async with Manager(NAME, source) as state:
        await state.set("a", 1)
    async with Manager(NAME, target) as state:
        await state.set("b", 1)
    with pytest.raises(UnsupportedError, match="already"):
        await copy_state(NAME, source, target)
    with pytest.raises(InvalidNameError):
        await copy_state("../x", source, target)
    async with Manager(NAME, target) as state:
        assert await state.get_all() == {"b": 1}


async def test_a_copy_is_read_back(tmp_path: Path) -> None:
    """A target that does not keep what was written is noticed."""

    class Forgetful(MemoryStorage):
        async def open(self, name: str) -> Any:
            session = await super().open(name)
            place = self.places[name]
            if place.snapshot is not None:
                session.recovery = session.recovery._replace(snapshot=b'{"a":2}')
            return session

    source = FileStorage(tmp_path)
    async with Manager(NAME, source) as state:
        await state.set("a", 1)
    with pytest.raises(StorageError, match="differs from the source"):
        await copy_state(NAME, source, Forgetful())


async def test_a_second_start_says_where_the_first_was(bucket: Bucket) -> None:
    """Two storage objects for the same bucket are one place: the message of the second start names the first one."""
    async with Manager(NAME, bucket.storage()):
        with pytest.raises(LockedError, match=r"the first one was started at .*test_s3\.py:\d+, in test_a_second"):
            await Manager(NAME, bucket.storage()).start()
