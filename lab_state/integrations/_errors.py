"""The responses of a web application to errors of lab_state. They are the same in each framework."""

from __future__ import annotations

import logging
from typing import NamedTuple

import msgspec

from lab_state._log import Log
from lab_state.exceptions import ConflictError, InvalidKeyError, InvalidValueError, LabStateError, StorageError

ANSWERED = (StorageError, ConflictError, InvalidKeyError, InvalidValueError)
"""The errors for which `answer_to` has a response. The application handles all others."""

_log = Log(logging.getLogger("lab_state"))


class Answer(NamedTuple):
    """An HTTP response, and the code and reason with which a WebSocket is closed."""

    status: int
    body: bytes
    headers: dict[str, str]
    close_code: int
    close_reason: str


def check_retry_after(seconds: int) -> int:
    """Check a value for `Retry-After`.

    Raises:
        TypeError: The value is not a whole number.
        ValueError: The value is below 0.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int):
        raise TypeError(f"retry_after must be a whole number of seconds, not {type(seconds).__name__}")
    if seconds < 0:
        raise ValueError("retry_after must be 0 seconds or more")
    return seconds


def answer_to(error: Exception, asked: str, retry_after: int) -> Answer:
    """Return the response to an error of `ANSWERED`, and log one line about it: a WARNING for 503, DEBUG for 422.

    The message of a storage error may have file paths. So it is in the log, and not in the
    response. The log does not contain the URL, because a client may write anything into it.

    Args:
        error: The error.
        asked: The method of the request, or `WebSocket`, for the log.
        retry_after: The number of seconds after which a client may try again.
    """
    assert isinstance(error, LabStateError)
    problem = f"{type(error).__name__}: {error}"
    if isinstance(error, StorageError | ConflictError):
        _log.warning("%s answered with 503: %s", asked, problem)
        body = msgspec.json.encode({"detail": "the state is not available at present; try again later"})
        return Answer(503, body, {"Retry-After": str(retry_after)}, 1013, "try again later")
    _log.debug("%s answered with 422: %s", asked, problem)
    body = msgspec.json.encode({"detail": str(error)})
    return Answer(422, body, {}, 1008, type(error).__name__)
