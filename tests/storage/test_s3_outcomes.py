"""What each answer of a store means, row by row, and the names and bytes of what is kept there. Pure."""

from __future__ import annotations

import json

import pytest

from lab_state import CorruptionError
from lab_state._codec import decode_snapshot, encode_snapshot
from lab_state._entries import Json
from lab_state.storage.s3._format import (
    Names,
    Stamp,
    frame,
    stamp_in_body,
    stamp_in_metadata,
    stamped,
    unframe,
)
from lab_state.storage.s3._outcomes import (
    CERTIFICATE,
    MISSING_FILE,
    PROXY,
    TLS,
    WRITE_ID,
    WRITES,
    Failure,
    Next,
    ObjectInfo,
    Verdict,
    advice,
    after_look,
    unquoted,
    verdict,
)

OURS, THEIRS = "ours", "theirs"


@pytest.mark.parametrize(
    ("status", "code", "meaning"),
    [
        (412, "PreconditionFailed", Verdict.REFUSED),
        (412, "", Verdict.REFUSED),
        (304, "304", Verdict.REFUSED),
        (404, "NoSuchKey", Verdict.REFUSED),
        (404, "404", Verdict.REFUSED),
        (404, "NoSuchBucket", Verdict.MISSING_BUCKET),
        (409, "ConditionalRequestConflict", Verdict.CONFLICT),
        (409, "ConcurrentModification", Verdict.CONFLICT),
        (409, "OperationAborted", Verdict.CONFLICT),
        (500, "InternalError", Verdict.UNKNOWN),
        (500, "UnknownError", Verdict.UNKNOWN),
        (502, "", Verdict.UNKNOWN),
        (503, "SlowDown", Verdict.UNKNOWN),
        (503, "ServiceUnavailable", Verdict.UNKNOWN),
        (504, "", Verdict.UNKNOWN),
        (429, "TooManyRequests", Verdict.UNKNOWN),
        (408, "", Verdict.UNKNOWN),
        (400, "RequestTimeout", Verdict.UNKNOWN),
        (400, "SlowDown", Verdict.UNKNOWN),
        (400, "BadDigest", Verdict.UNKNOWN),
        (400, "IncompleteBody", Verdict.UNKNOWN),
        (400, "XAmzContentSHA256Mismatch", Verdict.UNKNOWN),
        (0, "EndpointConnectionError", Verdict.UNKNOWN),
        (0, "ReadTimeoutError", Verdict.UNKNOWN),
        (0, "ConnectionClosedError", Verdict.UNKNOWN),
        (0, "ClientPayloadError", Verdict.UNKNOWN),
        (0, "TimeoutError", Verdict.UNKNOWN),
        (501, "NotImplemented", Verdict.NOT_IMPLEMENTED),
        (501, "", Verdict.NOT_IMPLEMENTED),
        (400, "NotImplemented", Verdict.NOT_IMPLEMENTED),
        (403, "AccessDenied", Verdict.DENIED),
        (403, "403", Verdict.DENIED),
        (403, "RequestTimeTooSkewed", Verdict.DENIED),
        (400, "InvalidArgument", Verdict.DENIED),
        (400, "AuthorizationHeaderMalformed", Verdict.DENIED),
        (301, "PermanentRedirect", Verdict.DENIED),
        (405, "MethodNotAllowed", Verdict.DENIED),
        (0, "NoCredentialsError", Verdict.DENIED),
        (0, "ProfileNotFound", Verdict.DENIED),
        (0, "ParamValidationError", Verdict.DENIED),
        (0, CERTIFICATE, Verdict.DENIED),
        (0, TLS, Verdict.DENIED),
        (0, MISSING_FILE, Verdict.DENIED),
        (0, f"{PROXY}407", Verdict.DENIED),
        (0, f"{PROXY}502", Verdict.UNKNOWN),
        (0, "SSLError", Verdict.UNKNOWN),
    ],
)
def test_verdict(status: int, code: str, meaning: Verdict) -> None:
    """Each answer has one meaning, from its status and, where that is not enough, its code."""
    assert verdict(Failure(status, code)) is meaning


REFUSED, CONFLICT, UNKNOWN = Verdict.REFUSED, Verdict.CONFLICT, Verdict.UNKNOWN
Q, U, OTHER = '"e1"', "e1", '"e2"'


@pytest.mark.parametrize(
    ("answer", "write_id", "etag", "if_match", "what"),
    [
        # Whatever the answer was, ours is ours.
        (REFUSED, OURS, OTHER, None, Next.COMMITTED),
        (REFUSED, OURS, OTHER, Q, Next.COMMITTED),
        (CONFLICT, OURS, OTHER, None, Next.COMMITTED),
        (UNKNOWN, OURS, OTHER, Q, Next.COMMITTED),
        # An answer that decides nothing, and nothing of ours there: again.
        (CONFLICT, THEIRS, OTHER, None, Next.REPEAT),
        (CONFLICT, None, "", Q, Next.REPEAT),
        (UNKNOWN, THEIRS, OTHER, None, Next.REPEAT),
        (UNKNOWN, THEIRS, Q, Q, Next.REPEAT),
        (UNKNOWN, None, "", None, Next.REPEAT),
        # Refused, and an object of another writer is there.
        (REFUSED, THEIRS, OTHER, None, Next.LOST),
        (REFUSED, THEIRS, OTHER, Q, Next.LOST),
        (REFUSED, "", OTHER, Q, Next.LOST),
        # Refused, but the ETag is the one asked for: the store compares it without quotes.
        (REFUSED, THEIRS, Q, Q, Next.UNQUOTE),
        (REFUSED, THEIRS, U, Q, Next.UNQUOTE),
        (REFUSED, THEIRS, Q, U, Next.LOST),
        # Refused, and nothing is there.
        (REFUSED, None, "", None, Next.REPEAT),
        (REFUSED, None, "", Q, Next.GONE),
    ],
)
def test_after_look(answer: Verdict, write_id: str | None, etag: str, if_match: str | None, what: Next) -> None:
    """After an answer that was not a success, the object under the key decides."""
    found = None if write_id is None else ObjectInfo(etag, {WRITE_ID: write_id} if write_id else {}, 1)
    assert after_look(answer, found, OURS, if_match) is what


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "NoSuchBucket", "create it"),
        (501, "NotImplemented", "conditional writes"),
        (301, "PermanentRedirect", "region_name"),
        (301, "301", "region_name"),
        (400, "AuthorizationHeaderMalformed", "region_name"),
        (403, "RequestTimeTooSkewed", "clock"),
        (0, "NoCredentialsError", "no usable credentials"),
        (403, "InvalidAccessKeyId", "renew or correct"),
        (400, "ExpiredToken", "renew or correct"),
        (403, "AccessDenied", "s3:PutObject"),
        (400, "InvalidArgument", "refuses"),
        (0, CERTIFICATE, "AWS_CA_BUNDLE"),
        (0, TLS, "http or https"),
        (0, MISSING_FILE, "a file that the settings name"),
        (0, f"{PROXY}407", "the proxy refuses"),
        (0, f"{PROXY}403", "the proxy refuses"),
        (0, "ConfigParseError", "settings"),
    ],
)
def test_advice(status: int, code: str, words: str) -> None:
    """An error that a repetition does not fix says what to do."""
    assert words in advice(Failure(status, code), WRITES)


def test_failures_read_well() -> None:
    """A message has the status and the code of the store, or the class of the exception."""
    assert (str(Failure(503, "SlowDown")), str(Failure(0, "ReadTimeoutError"))) == ("503 SlowDown", "ReadTimeoutError")
    assert (unquoted('"a"'), unquoted("a")) == ("a", "a")


def test_names() -> None:
    """Numbers have twenty digits, so the store lists them in order. Other keys have no number."""
    names = Names.of("bucket", "some/prefix", "name")
    assert names.snapshot == "some/prefix/name.json"
    assert names.record(42) == "some/prefix/name.journal/00000000000000000042"
    assert names.number(names.record(42)) == 42
    assert [names.number(key) for key in (names.journal + "readme", names.snapshot, names.journal + "1" * 21)] == [
        None
    ] * 3
    assert Names.of("bucket", "", "name").url("name.json") == "s3://bucket/name.json"


def test_every_flipped_bit_of_a_record_is_noticed() -> None:
    """A record that is damaged, cut, or under another number or name, is refused."""
    body = frame("name", 7, b'{"from":1}')
    assert unframe("name", 7, body, "path") == b'{"from":1}'
    damaged = [bytes([*body[:at], body[at] ^ 1 << bit, *body[at + 1 :]]) for at in range(len(body)) for bit in range(8)]
    for name, number, data in [("other", 7, body), ("name", 8, body), *(("name", 7, bad) for bad in damaged)]:
        with pytest.raises(CorruptionError):
            unframe(name, number, data, "path")
    for cut in range(len(body)):
        with pytest.raises(CorruptionError):
            unframe("name", 7, body[:cut], "path")
    with pytest.raises(CorruptionError):
        unframe("name", 7, body + body, "path")


def test_a_stamp_leaves_a_snapshot_valid() -> None:
    """With its stamp a snapshot still decodes, its checksum covers the stamp, and the stamp can be read."""
    *slices, last = encode_snapshot({"a": 1, "b": Json(b"[1]")}, 5, 0, copy_loaded=False)
    data = b"".join(slices) + stamped(last, Stamp(9, 4))
    assert decode_snapshot(data, "path").revision == 5
    member = json.loads(data)["$lab_state"]
    assert (member["seq"], member["fence"], list(member)[-1]) == (9, 4, "crc32")
    assert stamp_in_body(data, "path") == Stamp(9, 4)
    for at in range(len(data)):
        damaged = bytes([*data[:at], data[at] ^ 1, *data[at + 1 :]])
        with pytest.raises(CorruptionError):
            if stamp_in_body(damaged, "path") is None:
                decode_snapshot(damaged, "path")


@pytest.mark.parametrize("data", [b"", b"{}", b'{"a":1}', b"x" * 500, b'{"crc32":"00000000"}'])
def test_what_is_no_snapshot_of_ours_has_no_stamp(data: bytes) -> None:
    """Bytes that do not end as a snapshot of ours are not changed."""
    assert stamped(data, Stamp(1, 1)) == data
    assert stamp_in_body(data, "path") is None


def test_stamp_in_metadata() -> None:
    """The metadata have a stamp or none. Half a stamp is damage."""
    assert stamp_in_metadata(Stamp(3, 2).metadata(), "path") == Stamp(3, 2)
    assert stamp_in_metadata({"other": "1"}, "path") is None
    for metadata in (
        {"labstateseq": "3"},
        {"labstateseq": "x", "labstatefence": "2"},
        {"labstateseq": "-1", "labstatefence": "2"},
    ):
        with pytest.raises(CorruptionError, match="metadata"):
            stamp_in_metadata(metadata, "path")
