"""What `S3Storage` tells of certificates, proxies and settings: what to do, at once, and no credential in any text."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import logging
import socket
import ssl
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiobotocore.config import AioConfig
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from s3_proxy import Proxy, answers
from s3_world import VIEW, Bucket, endpoint

from lab_state import S3Storage, StorageError, UnavailableError, UnsupportedError

NAME = "secrets"
SECRET = "SECRET-OF-A-TEST"

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]


def text_of(error: BaseException) -> str:
    """Return the traceback as a server prints it, and each error that is chained to this one, shown or not."""
    chained, each = "", error
    while (each := each.__cause__ or each.__context__) is not None:  # type: ignore[assignment]
        chained += repr(each)
    return "".join(traceback.format_exception(error)) + repr(error) + chained


@asynccontextmanager
async def listening(serve: Serve, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Run a server on a port of its own."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)  # type: ignore[arg-type]
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def certificate(directory: Path, *, host: str = "127.0.0.1", days: int = 2) -> ssl.SSLContext:
    """Write a self-signed certificate to `directory / "cert.pem"`; return the TLS settings of a server with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "store")])
    end = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(end - dt.timedelta(days=10))
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "cert.pem").write_bytes(pem)
    (directory / "both.pem").write_bytes(private + pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "both.pem")
    return context


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say nothing."""
    await reader.read(1)
    writer.close()


async def passed_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass everything to the store, and its answers back."""
    parts = urlsplit(endpoint())
    there, back = await asyncio.open_connection(parts.hostname, parts.port)

    async def copied(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        target.close()

    await asyncio.gather(copied(reader, back), copied(there, writer), return_exceptions=True)


@pytest.mark.parametrize(
    ("host", "days", "trusted", "words"),
    [
        ("127.0.0.1", 2, False, "self-signed certificate"),
        ("127.0.0.2", 2, True, "not valid for '127.0.0.1'"),
        ("127.0.0.1", -2, True, "expired"),
    ],
)
async def test_a_bad_certificate(  # noqa: PLR0917
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, days: int, words: str, *, trusted: bool
) -> None:
    """A certificate that is not accepted is an error at once, with the reason and the remedy."""
    context = certificate(tmp_path, host=host, days=days)
    if trusted:
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "cert.pem"))
    async with listening(silent, context) as port:
        storage = bucket.storage(f"https://127.0.0.1:{port}")
        with pytest.raises(UnsupportedError, match=f"{words}.*AWS_CA_BUNDLE"):
            await storage.open(NAME)
    assert storage._time.slept == []  # type: ignore[attr-defined]


async def test_a_good_certificate(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the file of the authority in `AWS_CA_BUNDLE`, as the message says, the state opens."""
    context = certificate(tmp_path)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "cert.pem"))
    async with listening(passed_on, context) as port:
        session = await bucket.storage(f"https://127.0.0.1:{port}").open(NAME)
        await session.commit(b"1", VIEW)
        await session.aclose()


async def test_a_ca_bundle_that_is_missing(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file that the settings name is an error at once."""
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(UnsupportedError, match="a file that the settings name"):
        await bucket.storage("https://127.0.0.1:1").open(NAME)


async def test_tls_where_there_is_none(bucket: Bucket) -> None:
    """An endpoint with https at a server without TLS is an error at once."""
    with pytest.raises(UnsupportedError, match="http or https"):
        await bucket.storage(endpoint().replace("http:", "https:")).open(NAME)


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (407, UnsupportedError, "the proxy refuses"),
        (403, UnsupportedError, "the proxy"),
        (502, UnavailableError, "502"),
    ],
)
async def test_a_password_of_a_proxy(
    bucket: Bucket, caplog: pytest.LogCaptureFixture, status: int, kind: type[StorageError], words: str
) -> None:
    """The error for a refusal of a proxy has its status. Its password is in no message, traceback or log line."""
    caplog.set_level(logging.DEBUG, "lab_state")

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d Whatever\r\nContent-Length: 0\r\n\r\n" % status)
        await writer.drain()
        writer.close()

    async with listening(refuse) as port:
        config = AioConfig(proxies={"https": f"http://me:{SECRET}@127.0.0.1:{port}"})
        with pytest.raises(kind, match=words) as caught:
            await bucket.storage("https://s3.invalid", config=config).open(NAME)
    assert SECRET not in text_of(caught.value) + caplog.text


async def test_a_proxy_that_is_not_there(bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    """A proxy that does not answer is tried for half a minute. The error has the text of the system."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        config = AioConfig(proxies={"http": f"http://me:{SECRET}@127.0.0.1:{taken.getsockname()[1]}"})
        with pytest.raises(UnavailableError, match="Connection refused") as caught:
            await bucket.storage("http://s3.invalid", config=config).open(NAME)
    assert "waits for S3" in caplog.text
    assert SECRET not in text_of(caught.value) + caplog.text


async def test_a_host_that_is_not_known(bucket: Bucket) -> None:
    """A host without an address is tried for half a minute. The error says that."""
    with pytest.raises(UnavailableError, match="the name of the host is not known"):
        await bucket.storage("http://s3.invalid").open(NAME)


@pytest.mark.parametrize("url", [f"https://me:{SECRET}@", f"https://me:{SECRET}@127.0.0.1:1/x y", "http://"])
async def test_an_endpoint_of_the_environment(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The error for a bad endpoint in the environment does not quote it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    storage = S3Storage(bucket.name, region_name="us-east-1")
    storage._time = bucket.storage()._time
    with pytest.raises(StorageError) as caught:
        await storage.open(NAME)
    assert SECRET not in text_of(caught.value)


async def test_a_region_that_is_none(bucket: Bucket) -> None:
    """An invalid region is an error at once."""
    storage = S3Storage(bucket.name, endpoint_url=endpoint(), region_name="not a region")
    with pytest.raises(UnsupportedError, match="InvalidRegionError: the settings"):
        await storage.open(NAME)


async def test_settings_that_cannot_be_read(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged settings file is an error at once."""
    (tmp_path / "config").write_text(f"[default\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(UnsupportedError, match="settings") as caught:
        await bucket.storage(session=None).open(NAME)
    assert SECRET not in text_of(caught.value)


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (503, "SlowDown"), (412, "PreconditionFailed")])
async def test_no_exception_of_the_client_is_chained(bucket: Bucket, proxy: Proxy, status: int, code: str) -> None:
    """The cause and the context of an error are errors of ours or none, whatever the store answered."""
    session = await bucket.storage(proxy.url).open(NAME)
    proxy.plan("PUT", ".journal", answers(status, code), times=float("inf"))
    if status == 412:
        bucket.put(f"state/modules/{NAME}.journal/{2:020d}", b"", {"labstatewid": "theirs"})
    with pytest.raises(StorageError) as caught:
        await session.commit(b"1", VIEW)
    each: BaseException | None = caught.value
    while each is not None:
        assert type(each).__module__.startswith("lab_state")
        each = each.__cause__ or each.__context__
    await session.aclose()


@pytest.mark.parametrize(
    ("bucket_name", "arguments"),
    [
        (f"https://me:{SECRET}@host/bucket", {}),
        ("bucket", {"endpoint_url": f"https://me:{SECRET}@host"}),
        ("bucket", {"endpoint_url": f"https://me:1/{SECRET}@host"}),
        ("bucket", {"endpoint_url": f"https://me:1#{SECRET}@host"}),
        ("bucket", {"endpoint_url": f"https://me:1?{SECRET}@host"}),
    ],
)
def test_credentials_in_an_argument(bucket_name: str, arguments: dict[str, Any]) -> None:
    """A URL with a password in the wrong argument is refused without being quoted."""
    with pytest.raises(ValueError, match=r".") as caught:
        S3Storage(bucket_name, **arguments)
    assert SECRET not in text_of(caught.value)
