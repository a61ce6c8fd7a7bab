"""`Ranges`: the base of the handles that read a state. It finds the keys of a range, for the calls of `Reads`."""

from __future__ import annotations

from lab_state._arguments import check_key, check_limit, check_prefix
from lab_state._core import CallCore
from lab_state._in_steps import Range
from lab_state._items import Iterates
from lab_state._order import bounds
from lab_state.exceptions import InvalidKeyError


class Ranges(Iterates):
    """The keys under one prefix, and the ranges of them that a call asks for."""

    __slots__ = ("_core", "_prefix")

    def __init__(self, core: CallCore, prefix: str) -> None:
        self._core = core
        self._prefix = prefix

    def _full(self, key: object) -> str:
        """Return a key with the prefix of this handle before it. Check that the key is a `str`, but not its length and characters."""
        if not isinstance(key, str):
            raise InvalidKeyError(f"a key must be a str, not {key.__class__.__name__}")
        return self._prefix + str.__str__(key)

    def _check_open(self) -> None:
        self._core.check_open()

    def _range(self, prefix: object, after: object, limit: int | None, *, reverse: bool) -> Range:
        """Return the range of the keys that a call is about to read; see `_checked_range`."""
        within = self._checked_range(prefix, after, limit, reverse=reverse)
        self._core.state.note_listing(self._under(prefix))
        return within

    def _checked_range(self, prefix: object, after: object, limit: int | None, *, reverse: bool) -> Range:
        """Return the range of the keys that a call asks for. Its bounds include the prefix of this handle.

        Raises:
            InvalidKeyError: `after` cannot be a key.
            TypeError: An argument has a wrong type.
            ValueError: `limit` is below 1.
        """
        if limit is not None:
            check_limit(limit)
        behind = None if after is None else check_key(self._full(after))
        low, high = bounds(self._under(prefix), behind, reverse=reverse)
        return Range(low, high, len(self._prefix), limit, reverse)

    def _names(self, within: Range) -> list[str]:
        """Return the keys of a range, in one step. They include the prefix of this handle."""
        return self._core.state.names(within.low, within.high, within.limit, reverse=within.reverse)

    def _cut(self, names: list[str]) -> list[str]:
        """Return keys without the prefix of this handle."""
        cut = len(self._prefix)
        return [name[cut:] for name in names] if cut else names

    def _keys(self, prefix: str) -> list[str]:
        """Return the keys that start with a prefix, without the prefix of this handle, in one step."""
        self._check_open()
        return self._cut(self._names(self._range(prefix, None, None, reverse=False)))

    def _under(self, prefix: object) -> str:
        """Return a prefix with the prefix of this handle before it."""
        return self._prefix + check_prefix(prefix)

    def _nested(self, name: str) -> str:
        """Return the prefix of the keys of a namespace; see `Manager.namespace` for the errors."""
        if not isinstance(name, str):
            raise TypeError(f"the name of a namespace must be a str, not {name.__class__.__name__}")
        prefix = check_key(f"{self._under(name)}/")
        if not name or name.endswith("/"):
            raise InvalidKeyError("a namespace needs a name of 1 character or more, without a slash at its end")
        return prefix
