"""The meaning of the client's exceptions. The text of an exception is not used, because it may contain a credential."""

# aiobotocore and botocore have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError

from lab_state.storage.s3._outcomes import CERTIFICATE, MISSING_FILE, PROXY, TLS, Failure

_TLS_REASONS = frozenset(
    {
        "HTTP_REQUEST",
        "NO_PROTOCOLS_AVAILABLE",
        "NO_SHARED_CIPHER",
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_HANDSHAKE_FAILURE",
        "TLSV13_ALERT_CERTIFICATE_REQUIRED",
        "TLSV1_ALERT_PROTOCOL_VERSION",
        "TLSV1_ALERT_UNKNOWN_CA",
        "UNSUPPORTED_PROTOCOL",
        "WRONG_VERSION_NUMBER",
    }
)
"""The errors of OpenSSL that a repetition of the request does not fix."""

FAILURES = (ClientError, BotoCoreError, aiohttp.ClientError, TimeoutError, OSError)
"""The client's exceptions for a failed request."""


def failure_of(error: Exception) -> Failure:
    """Return the meaning of an exception of the client. The result contains neither the request nor the address, because they may be secret."""
    if isinstance(error, ClientError):
        response: dict[str, Any] = error.response
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return Failure(int(status), str(response.get("Error", {}).get("Code", "")))
    causes = list(_causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        # The exception of aiohttp has no `verify_message`.
        reasons = (str(getattr(cause, "verify_message", "")).rstrip(".") for cause in causes)
        return Failure(0, CERTIFICATE, next(filter(None, reasons), ""))
    detail = ""
    for cause in causes:
        if (reason := getattr(cause, "reason", None)) in _TLS_REASONS:  # an `ssl.SSLError`, or the exception of aiohttp
            return Failure(0, TLS, str(reason))
        if isinstance(cause, aiohttp.ClientHttpProxyError):
            return Failure(0, f"{PROXY}{cause.status}")
        if isinstance(cause, FileNotFoundError):
            return Failure(0, MISSING_FILE)
        if isinstance(cause, socket.gaierror):
            detail = "the name of the host is not known"
        elif isinstance(cause, OSError) and cause.errno and not isinstance(cause, ssl.SSLError):
            detail = detail or os.strerror(cause.errno)
    return Failure(0, type(error).__name__, detail)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes. botocore and aiohttp keep them in various attributes."""
    left: list[Any] = [error]
    seen: list[Any] = []
    while left:
        this = left.pop(0)
        if not isinstance(this, BaseException) or this in seen:
            continue
        seen.append(this)
        yield this
        left += [this.__cause__, this.__context__, getattr(this, "os_error", None)]
        left.append(getattr(this, "kwargs", {}).get("error"))
