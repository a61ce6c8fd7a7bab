"""Parse STATE: the place of a state, as a user writes it. This module does no I/O."""

from __future__ import annotations

import os
from typing import NamedTuple

from lab_state.config import Config

S3 = "s3://"


class Place(NamedTuple):
    """A place of states: a directory, or a prefix in a bucket.

    Attributes:
        directory: The path of the directory; empty for a bucket.
        bucket: The name of the bucket; empty for a directory.
        prefix: The prefix in the bucket, without a slash at either end.
    """

    directory: str
    bucket: str = ""
    prefix: str = ""

    def __str__(self) -> str:
        """Return the place as a user writes it."""
        if not self.bucket:
            return self.directory
        return f"{S3}{self.bucket}/{self.prefix}" if self.prefix else f"{S3}{self.bucket}"

    def state(self, name: str) -> str:
        """Return the STATE of a name at this place. `parse_state` removes one `.json` from its end."""
        name = f"{name}.json" if name.endswith(".json") else name
        return f"{self}/{name}" if self.bucket else os.path.join(self.directory, name)


class Target(NamedTuple):
    """A state: its place and its name."""

    place: Place
    name: str

    def __str__(self) -> str:
        """Return the state as a user writes it."""
        return self.place.state(self.name)


def parse_place(text: str) -> Place:
    """Return the place that a text names: a directory, or `s3://bucket` with or without a prefix.

    Raises:
        ValueError: The text names no place.
    """
    if text.startswith(S3):
        bucket, _, prefix = text.removeprefix(S3).partition("/")
        if not bucket:
            raise ValueError(f"{text!r} has no bucket: write s3://bucket/prefix")
        return Place("", bucket, prefix.strip("/"))
    if not text:
        raise ValueError("the directory is empty: write its path, or . for this directory")
    return Place(text)


def parse_state(text: str) -> Target:
    """Return the state that a text names: `directory/name`, the path of its `.json`, or `s3://bucket/prefix/name`.

    Raises:
        ValueError: The text names no state. It may be an `InvalidNameError`.
    """
    head, _, last = text.rpartition("/")
    if text.startswith(S3):
        if not head.removeprefix(S3.rstrip("/")).strip("/"):
            raise ValueError(f"{text!r} has no name of a state: write s3://bucket/prefix/name")
        return Target(parse_place(head), Config(name=last.removesuffix(".json")).name)
    if not last:
        raise ValueError(f"{text!r} has no name of a state: write directory/name")
    directory = head or ("/" if text.startswith("/") else ".")
    return Target(Place(directory), Config(name=last.removesuffix(".json")).name)


def split_moment(text: str) -> tuple[str, str | None]:
    """Return the STATE and the WHEN of `STATE@WHEN`. Without an `@` after the last slash, the WHEN is `None`."""
    head, slash, last = text.rpartition("/")
    name, at, when = last.partition("@")
    return f"{head}{slash}{name}", when if at else None
