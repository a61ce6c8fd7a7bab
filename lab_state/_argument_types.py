"""Checks of the Python types of arguments. A wrong type raises a `TypeError`. This module does no I/O.

A storage gets bytes, and knows no keys and no values. So these checks are apart from those in `_arguments`.
"""

from __future__ import annotations

import os


def check_text(argument: str, text: object) -> str:
    """Check an argument that must be a text, and return it as a plain `str`. `argument` is its name, for the message.

    Raises:
        TypeError: The argument is not a `str`.
    """
    if not isinstance(text, str):
        raise TypeError(f"{argument} must be a str, not {type(text).__name__}")
    return str.__str__(text)


def check_storage(storage: object, argument: str = "storage") -> None:
    """Check that an argument is a storage. `argument` is its name, for the message.

    Raises:
        TypeError: The argument is a class or a path, or has no method `open`.
    """
    if not _opens(storage):
        raise TypeError(f"{argument} must be an object such as FileStorage('directory'), not {kind_of(storage)}")


def check_cache(cache: object) -> None:
    """Check that an argument is a cache.

    Raises:
        TypeError: The argument is a class or a path, or has no method `open`.
    """
    if not _opens(cache):
        raise TypeError(f"cache must be an object such as RedisCache('redis://host'), not {kind_of(cache)}")


def check_clock(clock: object) -> None:
    """Check that an argument is a clock or `None`.

    Raises:
        TypeError: The argument is a class, or lacks a method of `Clock`.
    """
    if clock is not None and not has_calls(clock, "time", "monotonic", "call_later"):
        raise TypeError(f"clock must be an object such as lab_state.testing.ManualClock(), not {kind_of(clock)}")


def _opens(given: object) -> bool:
    # A `Path` has a method `open`, too, which could create or truncate a file.
    return has_calls(given, "open") and not isinstance(given, os.PathLike)


def has_calls(given: object, *names: str) -> bool:
    """Return whether an object has methods of these names. A class has none, because its methods need an object."""
    return not isinstance(given, type) and all(callable(getattr(given, name, None)) for name in names)


def kind_of(given: object) -> str:
    """Return the class of an argument, for a message. If the argument is a class itself, say so."""
    return f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
