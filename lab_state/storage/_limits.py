"""The generations that a history deletes, by age and by size. This module does no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_MOST_FOR_EACH_ADDED = 2


class Held(NamedTuple):
    """A generation that the history keeps.

    Attributes:
        wall: The recorded time of its first revision, in milliseconds since 1970; 0 if it is not recorded.
        size: The number of its bytes.
    """

    wall: int
    size: int


class Limits(NamedTuple):
    """The arguments `history` and `history_bytes` of a storage.

    Attributes:
        length: The length of the history, in milliseconds.
        most_bytes: The largest number of bytes of all generations, without the one in use; `None` for no limit.
    """

    length: int
    most_bytes: int | None


def to_prune(kept: Sequence[Held], in_use: int, limits: Limits, now: int, added: int) -> int:
    """Return the number of generations to delete, from the oldest one on.

    A generation is deleted if the next generation is older than the length of the history. So each moment within this length
    can still be read. A generation is also deleted if all generations together have too many bytes. At most two generations
    are deleted for each one that was added. So a clock that was set forward by mistake does not empty the history.

    A time that is not recorded is not used. A time after `now` is not used either, because the clock was set back since then.
    The time of the next generation takes its place.

    Args:
        kept: The generations, the oldest first, without the one in use.
        in_use: The recorded time of the first revision of the generation in use, in milliseconds since 1970; 0 if it is not
            recorded.
        limits: The limits of the history.
        now: The time of the wall clock, in milliseconds since 1970.
        added: The number of generations that were added since the last call.
    """
    since = now - limits.length
    walls = [*(generation.wall for generation in kept), in_use]
    left = sum(generation.size for generation in kept)
    most = min(len(kept), _MOST_FOR_EACH_ADDED * added)
    for number in range(most):
        until = next((wall for wall in walls[number + 1 :] if 0 < wall <= now), now)
        is_old = until < since
        is_too_much = limits.most_bytes is not None and left > limits.most_bytes
        if not (is_old or is_too_much):
            return number
        left -= kept[number].size
    return most
