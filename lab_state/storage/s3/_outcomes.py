"""The meaning of an answer of an object store, and the next step. This module does no I/O.

Each conditional write has an id, in the metadata of the object. The id is new for each write. Only a
copy of an object has the id of that object, or an id made from its ETag. So the object shows
whether the write took effect, even if the answer does not show this. The id is needed in two cases.
First, an answer can be lost. Second, if a kept-alive connection breaks, the HTTP client can repeat a
request by itself. The store then refuses the second request, because the first one has taken effect.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Failure(NamedTuple):
    """An answer that is not a success, or no answer.

    Attributes:
        status: The HTTP status; 0 if no answer came.
        code: The error code of the store, such as `SlowDown`. If no answer came, it is one of the
            constants below, or the name of the class of the exception.
        detail: More about the failure. It is never copied from the text of an exception, because that text may
            contain a credential.
    """

    status: int
    code: str
    detail: str = ""

    def __str__(self) -> str:
        """Return the text for a message."""
        shown = f"{self.status} {self.code}" if self.status else self.code
        return f"{shown} ({self.detail})" if self.detail else shown


CERTIFICATE = "CertificateError"
"""The code of a failure: the certificate of the server was not accepted."""

TLS = "TLSError"
"""The code of a failure: the two sides did not agree on a TLS protocol."""

MISSING_FILE = "FileNotFoundError"
"""The code of a failure: a file in the settings of the client is missing."""

PROXY = "ProxyError"
"""The beginning of the code of a failure of a proxy. The status from the proxy follows, as in `ProxyError403`."""


class Verdict(Enum):
    """The meaning of a failure."""

    REFUSED = "the condition did not hold, or there is no such object"
    CONFLICT = "another write to the same key was under way"
    UNKNOWN = "the request may have taken effect or not; a repetition can help"
    MISSING_BUCKET = "there is no such bucket"
    NOT_IMPLEMENTED = "the store does not know this request or this condition"
    DENIED = "a repetition does not help"


class Next(Enum):
    """The next step after a conditional write that did not clearly succeed."""

    COMMITTED = "the object is ours"
    REPEAT = "send the same bytes with the same id again"
    UNQUOTE = "send the request again with the ETag unquoted, because some stores compare unquoted ETags"
    LOST = "another writer's object is there"
    GONE = "the object no longer exists"


class ObjectInfo(NamedTuple):
    """The ETag, metadata and size of an object, from HEAD or GET."""

    etag: str
    metadata: dict[str, str]
    size: int


class NotOursError(Exception):
    """A conditional write was refused, and this write did not create the present object.

    Attributes:
        found: The present object; `None` if there is no object.
    """

    def __init__(self, found: ObjectInfo | None) -> None:
        super().__init__()
        self.found = found


WRITE_ID = "labstatewid"
"""The metadata key for the id of a write. It has no hyphen or underscore, because some stores change these."""

NO_ETAG = f'"{"0" * 32}"'
"""An ETag that no object has."""

_REFUSED = frozenset({304, 412})
_PASSING_STATUS = frozenset({408, 429})
_PASSING_CODES = frozenset(
    {
        "BadDigest",  # the body was cut or changed during the transfer
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


def verdict(failure: Failure) -> Verdict:  # noqa: PLR0911 -- one for each meaning
    """Return the meaning of a failure. A condition of the request makes no difference."""
    status, code, _ = failure
    if status == 0:
        return Verdict.DENIED if code in _FINAL_WITHOUT_ANSWER else Verdict.UNKNOWN
    if code == "NoSuchBucket":
        return Verdict.MISSING_BUCKET
    if status == 501 or code == "NotImplemented":  # noqa: PLR2004 -- 501 Not Implemented
        return Verdict.NOT_IMPLEMENTED
    if status in _REFUSED or status == 404:  # noqa: PLR2004 -- 404 Not Found
        return Verdict.REFUSED
    if status == 409:  # noqa: PLR2004 -- 409 Conflict, with any code
        return Verdict.CONFLICT
    if status >= 500 or status in _PASSING_STATUS or code in _PASSING_CODES:  # noqa: PLR2004 -- 5xx
        return Verdict.UNKNOWN
    return Verdict.DENIED


def after_look(answer: Verdict, found: ObjectInfo | None, write_id: str, if_match: str | None) -> Next:
    """Return the next step after a conditional write. It depends on the object that is there now.

    Args:
        answer: The meaning of the answer: `REFUSED`, `CONFLICT` or `UNKNOWN`.
        found: The object under the key; `None` if there is no object.
        write_id: The id of the write.
        if_match: The ETag in the condition of the write, as it was sent. `None` if the condition
            was that no object exists.
    """
    if found is not None and found.metadata.get(WRITE_ID) == write_id:
        return Next.COMMITTED
    if answer is not Verdict.REFUSED:
        return Next.REPEAT
    if found is None:
        # If the condition had no ETag, an object at this key caused the refusal. This object was deleted since then. It was
        # not a fence, because a writer never deletes a fence. A record is deleted only after a snapshot that covers its number.
        # So the deleted object was ours.
        return Next.REPEAT if if_match is None else Next.GONE
    if if_match is not None and if_match != unquoted(if_match) and unquoted(found.etag) == unquoted(if_match):
        return Next.UNQUOTE
    return Next.LOST


def unquoted(etag: str) -> str:
    """Return an ETag without its quotation marks."""
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
    "s3:GetObject on the objects, or s3:ListBucket on the bucket; without s3:ListBucket the store does not report a "
    "missing object as missing"
)
"""The permissions that a GET or a HEAD needs. The next constants name the permissions for other requests."""

LISTS = "s3:ListBucket on the bucket"
WRITES = "s3:PutObject on the objects, and s3:GetObject to replace one"
COPIES = "s3:GetObject and s3:PutObject on the objects, also those of the history"
DELETES = "s3:DeleteObject on the objects"

_ADVICE = {
    CERTIFICATE: (
        "its certificate is not accepted: correct the host in the endpoint, renew the certificate, or name the file of "
        "the authority that signed it in AWS_CA_BUNDLE"
    ),
    TLS: "one side does not use TLS, or uses another version of it: check whether the endpoint is http or https",
    MISSING_FILE: (
        "a file that the settings name is missing, such as that of AWS_CA_BUNDLE: put the file there, or correct the setting"
    ),
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it",
}


def advice(failure: Failure, needs: str) -> str:  # noqa: PLR0911 -- one for each cause
    """Return the advice for the operator, for a failure that a repetition does not fix.

    `needs` is the permission that the request needs.
    """
    status, code, _ = failure
    kind = verdict(failure)
    if kind is Verdict.MISSING_BUCKET:
        return "there is no such bucket: create it, or correct its name or the endpoint"
    if kind is Verdict.NOT_IMPLEMENTED:
        return (
            "the store does not know this request or its condition: use one with conditional writes, which keep two "
            "writers apart, and with the deletion of several objects"
        )
    if code in _ADVICE:
        return _ADVICE[code]
    if code in _PROXY_REFUSES:
        return "the proxy refuses the connection: correct its address or its credentials, or let it allow the host"
    if code in _REGION or status in {301, 307}:
        return "the bucket is in another region: pass region_name to S3Storage"
    if code in _NO_CREDENTIALS:
        return "no usable credentials were found: set them as for any AWS client, or pass a session to S3Storage"
    if code in _BAD_CREDENTIALS:
        return "the store does not accept these credentials: renew or correct them"
    if status == 403:  # noqa: PLR2004 -- 403 Forbidden
        return f"permission is missing: {needs}"
    if status == 0:
        return (
            "the settings of the client are wrong: check the environment, ~/.aws/config, and the arguments of S3Storage"
        )
    return "the store refuses this request, and a repetition would not change that"
