"""Checks of the arguments of calls. This module does no I/O.

A wrong Python type raises a `TypeError`. Wrong content raises a `ValueError`, often an
`Invalid...Error`. For keys and values there is another rule: a bad key always raises an
`InvalidKeyError`, and a bad value always an `InvalidValueError`, even if its Python type is wrong. Keys
and values often come from outside the program. So a program can handle all bad keys with one `except`
clause, and all bad values with another.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable
from datetime import timedelta
from typing import Any, Literal, TypeAlias, cast

from lab_state._periods import LONGEST_TTL, Seconds
from lab_state.exceptions import InvalidKeyError, InvalidValueError

RESERVED = "$lab_state"
"""The name of the member of a snapshot that has the data of lab_state. No key may have this name."""

MAX_KEY_LENGTH = 1024
"""The largest number of characters in a key."""


def check_key(key: object) -> str:
    """Check a key, and return it as a plain `str`.

    Raises:
        InvalidKeyError: The key is not a `str`, is empty or too long, has a NUL or a lone surrogate, or is reserved.
    """
    if not isinstance(key, str):
        raise InvalidKeyError(f"a key must be a str, not {type(key).__name__}")
    if not 0 < len(key) <= MAX_KEY_LENGTH:
        raise InvalidKeyError(f"a key must have 1 to {MAX_KEY_LENGTH} characters, this one has {len(key)}")
    if "\0" in key:
        raise InvalidKeyError(f"the key {key!r} has a NUL character; leave it out")
    if key == RESERVED:
        raise InvalidKeyError(
            f"the key {RESERVED!r} is reserved for lab_state's own member of a snapshot; use another key"
        )
    if not key.isascii():
        try:
            key.encode()
        except UnicodeEncodeError:
            raise InvalidKeyError(f"the key {key!r} has a lone surrogate, which UTF-8 cannot hold") from None
    return str.__str__(key)


def check_keys(keys: Collection[str]) -> None:
    """Check several plain `str`s as `check_key` does. For a hundred keys, this takes a tenth of the time.

    Raises:
        InvalidKeyError: One of the strings cannot be a key.
    """
    together = "".join(keys)
    lengths = {*map(len, keys)}
    are_valid = together.isascii() and "\0" not in together and RESERVED not in keys
    if not are_valid or 0 in lengths or max(lengths, default=0) > MAX_KEY_LENGTH:
        for key in keys:
            check_key(key)


def check_prefix(prefix: object) -> str:
    """Check a prefix of keys, and return it as a plain `str`.

    Raises:
        TypeError: The prefix is not a `str`.
    """
    if not isinstance(prefix, str):
        raise TypeError(f"a prefix must be a str, not {type(prefix).__name__}")
    return str.__str__(prefix)


OnMismatch: TypeAlias = Literal["raise", "skip"]
"""The effect of a value that is not of the requested type on a call with many keys."""


def check_on_mismatch(on_mismatch: object) -> bool:
    """Return whether a call leaves out values that are not of the requested type.

    Raises:
        TypeError: The argument is not a `str`.
        ValueError: The argument is neither `"raise"` nor `"skip"`.
    """
    if not isinstance(on_mismatch, str):
        raise TypeError(f"on_mismatch must be a str, not {type(on_mismatch).__name__}")
    if on_mismatch not in {"raise", "skip"}:
        raise ValueError('on_mismatch must be "raise" or "skip"')
    return on_mismatch == "skip"


def check_limit(limit: object, *, or_none: bool = True) -> None:
    """Check a `limit` other than `None`: the largest number of keys that a call returns.

    Args:
        limit: The limit.
        or_none: Whether the call also takes `None`, for the message.

    Raises:
        TypeError: The limit is not an `int`.
        ValueError: The limit is below 1.
    """
    if isinstance(limit, bool) or not isinstance(limit, int):
        also = ", or None for all keys" if or_none else ""
        raise TypeError(f"limit must be an int of 1 or more{also}, not {type(limit).__name__}")
    if limit < 1:
        raise ValueError(f"limit must be 1 or more, not {limit}{'; None returns all keys' if or_none else ''}")


def milliseconds(ttl: Seconds) -> int:
    """Check a time to live, and return it in whole milliseconds, rounded up.

    Raises:
        InvalidValueError: The time is not above 0, or is longer than `LONGEST_TTL`.
        TypeError: The time is not an `int`, a `float` or a `timedelta`. A `bool` is refused, too.
    """
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"ttl must be a number of seconds or a timedelta, not {type(ttl).__name__}")
    if not 0 < seconds <= LONGEST_TTL:
        raise InvalidValueError(
            f"ttl must be above 0 and at most {LONGEST_TTL} seconds; to delete a key use delete(), "
            "for a key that never expires pass ttl=None"
        )
    return math.ceil(seconds * 1000)


def check_timeout(timeout: object) -> float:
    """Check a timeout, and return it in seconds; infinity for `None`.

    Raises:
        TypeError: The timeout is not an `int`, a `float` or `None`. A `bool` is refused, too.
        ValueError: The timeout is negative or not finite.
    """
    if timeout is None:
        return math.inf
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout must be a number of seconds or None, not {type(timeout).__name__}")
    try:
        seconds = float(timeout)
    except OverflowError:
        seconds = math.inf
    if not 0 <= seconds < math.inf:
        raise ValueError("timeout must be a finite number of seconds, 0 or more; None waits without a limit")
    return seconds


def check_revision(revision: object) -> None:
    """Check that a revision is an `int`. Its range is not checked here.

    Raises:
        TypeError: The revision is not an `int`. A `bool` is refused, too.
    """
    if isinstance(revision, bool) or not isinstance(revision, int):
        raise TypeError(f"a revision must be an int, such as the result of set(), not {type(revision).__name__}")


def check_default(default: object) -> None:
    """Refuse a class as a default, because the caller probably means it as the type.

    `get(key, User)` would return the value undecoded as a dict. For a missing key it would return the class `User`.

    Raises:
        TypeError: The default is a class.
    """
    if isinstance(default, type):
        raise TypeError(f"the default is a class; to decode the value as this class, pass type={default.__name__}")


def as_text(key: Any) -> Any:
    """Return a key as a plain `str`, and any other object unchanged.

    A subclass of `str` may override `+`. For example, `Markup` escapes a prefix that is put before it.
    """
    return str.__str__(key) if isinstance(key, str) else key


def many_keys(keys: object) -> Iterable[str]:
    """Check that an argument is iterable, and is not one `str`. Return it. The keys in it are not checked here.

    Raises:
        TypeError: The argument is not iterable. Or it is one `str`, whose characters would be used as keys.
    """
    if isinstance(keys, str) or not isinstance(keys, Iterable):
        given = "one str" if isinstance(keys, str) else type(keys).__name__
        raise TypeError(f"several keys were expected, such as a list of str, not {given}")
    return cast("Iterable[str]", keys)


def check_callable(call: str, fn: object, advice: str = "") -> None:
    """Check that `fn` can be called. `call` is the name of the method that got `fn`, and `advice` is the end of the message.

    Raises:
        TypeError: `fn` cannot be called.
    """
    if not callable(fn):
        raise TypeError(f"{call}() needs a function, not {type(fn).__name__}{advice}")


def name_of(fn: object) -> str:
    """Return the name of a function, for a message. If it has no name, return the name of its class in quotes."""
    return getattr(fn, "__qualname__", None) or repr(type(fn).__qualname__)


def plain_result(call: str, fn: object, result: object) -> object:
    """Check the result of `fn`, and return it. `call` is the name of the method that got `fn`, for the message.

    Raises:
        InvalidValueError: The result is an awaitable. Probably `fn` is an async function.
    """
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise InvalidValueError(
            f"{name_of(fn)} given to {call}() must be a plain function, not async: a change with an await in it is not atomic"
        )
    return result
