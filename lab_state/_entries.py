"""The types of stored values, the changes of one commit, and maps in layers. This module does no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from itertools import islice
from typing import Literal, NamedTuple, NewType, Protocol, TypeAlias

from msgspec import Raw, Struct

Json = NewType("Json", bytes)
"""The bytes of one JSON value in UTF-8.

A manager checks the bytes before it makes a `Json`. So if several `Json` are joined with commas, the
decoder finds exactly as many values. A copy that follows an owner may contain invalid bytes; see
`_following.stored_of`.
"""

Value: TypeAlias = str | int | float | bool | Json | Raw | None
"""A scalar, or the JSON of a value.

The JSON is a `Json` if the value was set, and a `Raw` if the value was loaded. A `Raw` is a part of
the loaded buffer. A `Raw` has exactly one value as well, because the parser has found where the value ends.
A loaded scalar is a `Raw`, too. A read may replace it by the scalar, and a checkpoint may replace a
`Raw` by a `Json`.
"""

SCALARS = frozenset({str, int, float, bool, type(None)})
"""The classes of values that are stored unchanged."""

JSON_CLASSES = frozenset({bytes, Raw})
"""The classes of stored values that are JSON, and have to be decoded."""


def size_of(stored: Value) -> int:
    """Return the approximate size of a value as JSON, in bytes. A character of a `str` counts as one byte."""
    if isinstance(stored, Raw):
        return memoryview(stored).nbytes
    return len(stored) if isinstance(stored, bytes | str) else 8


class Expiring(Struct, frozen=True, gc=False):
    """A value with its expiry. When `State.now` has reached `at`, in milliseconds since 1970, the key no longer exists.

    The garbage collector does not track an `Expiring`. Before Python 3.14, a tracked value would make the dict of
    the state tracked as well. Then each full collection would visit every key.
    """

    value: Value
    at: int


class Absent(Enum):
    """The reasons why a key has no value."""

    MISSING = "missing"
    DELETED = "deleted"
    EXPIRED = "expired"


MISSING: Literal[Absent.MISSING] = Absent.MISSING
DELETED: Literal[Absent.DELETED] = Absent.DELETED
EXPIRED: Literal[Absent.EXPIRED] = Absent.EXPIRED

Stored: TypeAlias = Value | Expiring
"""A value as it is stored."""

StoredOrGone: TypeAlias = Stored | Literal[Absent.DELETED, Absent.EXPIRED]
"""The effect of a change on one key: its new value, or the reason why there is none."""


class Versions(NamedTuple):
    """The versions of a state, as its last writer set them.

    Attributes:
        schema: The version of the schema of the values, 1 or more.
        readable_by: The oldest version of the code that can read the values.
    """

    schema: int
    readable_by: int


FIRST_VERSIONS = Versions(1, 1)
"""The versions of a state that stores no versions."""


class ChangeSet(NamedTuple):
    """The changes that one commit makes durable.

    Attributes:
        start: The revision before the first change.
        end: The revision of the last change.
        cleared: Whether all keys were deleted before `changes`.
        changes: The last effect on each key that changed.
        since: The time of the oldest change, in seconds of `State.monotonic`.
        time: The result of `State.now` when the changes were taken; 0 if no key expires.
        wall: The time of the wall clock when the changes were taken, in milliseconds since 1970.
        versions: The new versions of the state; `None` if they have not changed.
    """

    start: int
    end: int
    cleared: bool
    changes: dict[str, StoredOrGone]
    since: float
    time: int = 0
    wall: int = 0
    versions: Versions | None = None


class Readable(Protocol):
    """A map that can lie below a layer."""

    def __getitem__(self, key: str, /) -> Stored: ...
    def __contains__(self, key: object, /) -> bool: ...
    def __len__(self) -> int: ...
    def items(self) -> Iterable[tuple[str, Stored]]: ...


class Layer:
    """A map on top of another one. A write changes `top`, and not the map below, `base`."""

    __slots__ = ("base", "top")

    def __init__(self, base: Readable, top: dict[str, StoredOrGone]) -> None:
        self.base: Readable = base
        self.top: dict[str, StoredOrGone] = top

    def __getitem__(self, key: str) -> Stored:
        value = self.top.get(key, MISSING)
        if value is MISSING:
            return self.base[key]
        if isinstance(value, Absent):
            raise KeyError(key)
        return value

    def __len__(self) -> int:
        raise NotImplementedError

    def __contains__(self, key: object) -> bool:
        value = self.top.get(key, MISSING)  # type: ignore[call-overload]  # any object may be looked up
        return key in self.base if value is MISSING else not isinstance(value, Absent)

    def __iter__(self) -> Iterator[str]:
        return (key for key, _ in self.items())

    def items(self) -> Iterator[tuple[str, Stored]]:
        for key, stored in self.base.items():
            if key not in self.top:
                yield key, stored
        for key, value in self.top.items():
            if not isinstance(value, Absent):
                yield key, value

    def __setitem__(self, key: str, stored: Stored) -> None:
        self.top[key] = stored

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self.top[key] = DELETED


class Overlay(Layer):
    """A layer over a map, the view. Later the writes of the layer are merged into the view."""

    __slots__ = ("_left", "_size", "view")

    def __init__(
        self,
        view: dict[str, Stored] | Overlay,
        top: dict[str, StoredOrGone] | None = None,
        size: int | None = None,
    ) -> None:
        """Put a layer over `view`. `top` has the first writes. `size` is the number of keys after these writes."""
        super().__init__(view, {} if top is None else top)
        self.view: dict[str, Stored] | Overlay = view
        self._size = len(view) if size is None else size
        self._left: int | None = None

    def __len__(self) -> int:
        return self._size

    def __setitem__(self, key: str, stored: Stored) -> None:
        # This repeats `__contains__`, because another call would make each `set` during a checkpoint slower.
        top = self.top
        value = top.get(key, MISSING)
        if (key not in self.base) if value is MISSING else (value.__class__ is Absent):
            self._size += 1
        top[key] = stored

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._size -= 1

    def rest_on(self, view: dict[str, Stored]) -> None:
        """Put this layer directly on `view`, because the layer between both was merged into `view`."""
        self.base = self.view = view

    def fold(self, most: int) -> bool:
        """Move writes into the view, and return whether any are left.

        One call moves `most` writes, or twice as many as were added since the last call, if that is more. So the
        layer shrinks even while writes come fast.
        """
        came = 0 if self._left is None else len(self.top) - self._left
        view = self.view
        some = list(islice(reversed(self.top.items()), max(most, 2 * came)))
        for key, value in some:
            if not isinstance(value, Absent):
                view[key] = value
            elif key in view:
                del view[key]
        for _ in some:  # this comes last, so that an error above, such as a `MemoryError`, loses no write
            self.top.popitem()
        self._left = len(self.top)
        return bool(self.top)


class Staged(Overlay):
    """A layer with the writes of one large change. It is merged into the map below in steps.

    The map below is a dict, or an `Overlay` over a view that is in use.
    """

    __slots__ = ()
