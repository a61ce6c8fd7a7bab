"""What an answer of an object store means, and what to do next. Pure.

A conditional write carries an id of its own in the object's metadata. So whatever the
answer was, a look at the object tells whether the write is the one that is there: an
answer can be lost, and the HTTP client sends a request a second time, unasked, when a
kept-alive connection drops under it; the second one is then refused because of the
first.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Failure(NamedTuple):
    """An answer that is not a success.

    Attributes:
        status: The HTTP status; 0 when no answer came.
        code: The store's own word, such as `SlowDown`; the kind of exception when no answer came.
        detail: What more there is to tell. Never a text of the client's: it may hold a credential.
    """

    status: int
    code: str
    detail: str = ""

    def __str__(self) -> str:
        """As a message shows it."""
        shown = f"{self.status} {self.code}" if self.status else self.code
        return f"{shown} ({self.detail})" if self.detail else shown


CERTIFICATE = "CertificateError"
"""The code of a failure: the server's certificate was not accepted."""

TLS = "TLSError"
"""The code of a failure: the two sides do not agree on how to talk."""

MISSING_FILE = "FileNotFoundError"
"""The code of a failure: a file that the client's settings name."""

PROXY = "ProxyError"
"""The code of a failure, with the status that a proxy answered."""


class Verdict(Enum):
    """What a failure means."""

    REFUSED = "the condition did not hold"
    CONFLICT = "another write to the same key was under way"
    UNKNOWN = "it may or may not have been done; trying again can help"
    MISSING_BUCKET = "there is no such bucket"
    NOT_IMPLEMENTED = "the store does not know this request or this condition"
    DENIED = "trying again changes nothing"


class Next(Enum):
    """What follows a conditional write that was not plainly a success."""

    COMMITTED = "the object is ours"
    REPEAT = "send the same bytes with the same id again"
    UNQUOTE = "send it again with the ETag unquoted, which is how some stores compare it"
    LOST = "someone else's object is there"
    GONE = "there is no object any more"


class ObjectInfo(NamedTuple):
    """An object as HEAD or GET shows it."""

    etag: str
    metadata: dict[str, str]
    size: int


class NotOursError(Exception):
    """A conditional write was refused, and what is there is not ours.

    Attributes:
        found: What is there; `None` for nothing.
    """

    def __init__(self, found: ObjectInfo | None) -> None:
        super().__init__()
        self.found = found


WRITE_ID = "labstatewid"
"""The metadata key of a write's id; without separators, which some stores change."""

_REFUSED = frozenset({304, 412})
_PASSING_STATUS = frozenset({408, 429})
_PASSING_CODES = frozenset(
    {
        "BadDigest",  # the body was cut or changed on its way
        "BandwidthLimitExceeded",
        "IncompleteBody",
        "InternalError",
        "RequestLimitExceeded",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    }
)
_PROXY_REFUSES = frozenset({f"{PROXY}403", f"{PROXY}407"})
_FINAL_WITHOUT_ANSWER = frozenset(
    {
        *_PROXY_REFUSES,
        CERTIFICATE,
        MISSING_FILE,
        TLS,
        "ConfigNotFound",
        "ConfigParseError",
        "EndpointProviderError",
        "EndpointResolutionError",
        "InfiniteLoopConfigError",
        "InvalidChecksumConfigError",
        "InvalidConfigError",
        "InvalidDefaultsMode",
        "InvalidEndpointConfigurationError",
        "InvalidIMDSEndpointError",
        "InvalidIMDSEndpointModeError",
        "InvalidProxiesConfigError",
        "InvalidRegionError",
        "InvalidS3AddressingStyleError",
        "InvalidURL",
        "LoginRefreshRequired",
        "MissingDependencyException",
        "NoCredentialsError",
        "NoRegionError",
        "ParamValidationError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "RefreshWithMFAUnsupportedError",
        "SSOTokenLoadError",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
        "UnknownSignatureVersionError",
        "UnsupportedS3ArnError",
        "UnsupportedS3ConfigurationError",
        "UnsupportedSignatureVersionError",
    }
)


def verdict(failure: Failure) -> Verdict:  # noqa: PLR0911 -- a row of the table each
    """What a failure means, whether the request had a condition or not."""
    status, code, _ = failure
    if status == 0:
        return Verdict.DENIED if code in _FINAL_WITHOUT_ANSWER else Verdict.UNKNOWN
    if code == "NoSuchBucket":
        return Verdict.MISSING_BUCKET
    if status == 501 or code == "NotImplemented":  # noqa: PLR2004 -- 501 Not Implemented
        return Verdict.NOT_IMPLEMENTED
    if status in _REFUSED or status == 404:  # noqa: PLR2004 -- 404 Not Found
        return Verdict.REFUSED
    if status == 409:  # noqa: PLR2004 -- 409 Conflict, under whatever name
        return Verdict.CONFLICT
    if status >= 500 or status in _PASSING_STATUS or code in _PASSING_CODES:  # noqa: PLR2004 -- 5xx
        return Verdict.UNKNOWN
    return Verdict.DENIED


def after_look(answer: Verdict, found: ObjectInfo | None, write_id: str, if_match: str | None) -> Next:
    """What to do after a conditional write, knowing what is under its key now.

    Args:
        answer: What the answer meant: `REFUSED`, `CONFLICT` or `UNKNOWN`.
        found: What is there; `None` for nothing.
        write_id: The write's id.
        if_match: The ETag that it asked for, as it was sent; `None` when it asked for no object.
    """
    if found is not None and found.metadata.get(WRITE_ID) == write_id:
        return Next.COMMITTED
    if answer is not Verdict.REFUSED:
        return Next.REPEAT
    if found is None:
        # Without an ETag: what was in the way is gone again. Only a snapshot that covers
        # this number has it deleted, and fences are never deleted, so it was ours.
        return Next.REPEAT if if_match is None else Next.GONE
    if if_match is not None and if_match != unquoted(if_match) and unquoted(found.etag) == unquoted(if_match):
        return Next.UNQUOTE
    return Next.LOST


def unquoted(etag: str) -> str:
    """An ETag without its quotation marks."""
    return etag.strip('"')


_REGION = frozenset(
    {
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "PermanentRedirect",
        "TemporaryRedirect",
    }
)
_NO_CREDENTIALS = frozenset(
    {
        "LoginRefreshRequired",
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "RefreshWithMFAUnsupportedError",
        "SSOTokenLoadError",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
    }
)
_BAD_CREDENTIALS = frozenset({"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"})


READS = (
    "s3:GetObject on the objects, or s3:ListBucket on the bucket, without which the store does not say that an object "
    "is not there"
)
"""The permission that a GET or a HEAD needs; and so on."""

LISTS = "s3:ListBucket on the bucket"
WRITES = "s3:PutObject on the objects, and s3:GetObject to replace one"
DELETES = "s3:DeleteObject on the objects"

_ADVICE = {
    CERTIFICATE: (
        "its certificate is not accepted: correct the host in the endpoint, or renew the certificate, or name the file of "
        "the authority that signed it in AWS_CA_BUNDLE"
    ),
    TLS: "one side speaks TLS and the other does not, or another version of it: see whether the endpoint is http or https",
    MISSING_FILE: "a file that the settings name is not there, such as the one in AWS_CA_BUNDLE",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it",
}


def advice(failure: Failure, needs: str) -> str:  # noqa: PLR0911 -- a cause each
    """Return what the operator has to do about a failure that trying again does not mend.

    `needs` is the permission for what was tried.
    """
    status, code, _ = failure
    kind = verdict(failure)
    if kind is Verdict.MISSING_BUCKET:
        return "there is no such bucket: create it, or correct its name or the endpoint"
    if kind is Verdict.NOT_IMPLEMENTED:
        return "the store has no conditional writes, which keep two writers apart: use one that has"
    if code in _ADVICE:
        return _ADVICE[code]
    if code in _PROXY_REFUSES:
        return "the proxy refuses the connection: correct its address or its credentials, or let the host pass"
    if code in _REGION or status in {301, 307}:
        return "the bucket is in another region: give S3Storage its region_name"
    if code in _NO_CREDENTIALS:
        return "no usable credentials were found: set them as for any AWS client, or give S3Storage a session"
    if code in _BAD_CREDENTIALS:
        return "the store does not accept these credentials: renew or correct them"
    if status == 403:  # noqa: PLR2004 -- 403 Forbidden
        return f"permission is missing: {needs}"
    if status == 0:
        return "the settings of the client are wrong: see the environment, ~/.aws/config, and what S3Storage was given"
    return "the store refuses this request, and trying again would not change that"
