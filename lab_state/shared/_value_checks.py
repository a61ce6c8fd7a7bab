"""The check of the values of clients that have no schema, such as the command. The owner uses the types of its own schema. This module does no I/O."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable

from msgspec import Raw

from lab_state._batch import in_parts
from lab_state._entries import Value
from lab_state._following import stored_of
from lab_state.exceptions import InvalidValueError
from lab_state.shared._messages import Call, MakeChanges, Set, SetIfAbsent, SetMany

ValueCheck = Callable[[str, Value], object]
"""A function that checks a value before it is stored; see `CallCore`."""


class ValueChecks:
    """The clients that do not check their values, and the check for these values."""

    def __init__(self, check: ValueCheck | None) -> None:
        """Begin without a client. `check` is `None` if the schema has no types."""
        self._check = check
        self._clients: set[str] = set()

    def add(self, client: str) -> None:
        """Note a client that does not check its values."""
        self._clients.add(client)

    def forget(self, client: str) -> None:
        """Forget a client. A second call changes nothing."""
        self._clients.discard(client)

    def run(self, client: str | None, call: Call) -> None:
        """Check the values of a call, if its client does not check them.

        Raises:
            InvalidValueError: A value is not of its type.
        """
        if self._check is not None and client in self._clients:
            _run(self._check, _values_of(call))

    def run_in_steps(self, client: str | None, call: Call) -> Generator[None, None, InvalidValueError | None]:
        """Check the values of a call as `run` does, and yield between two steps. Return the error; `None` if there is none."""
        if self._check is None or client not in self._clients:
            return None
        try:
            for some in in_parts(_values_of(call)):
                _run(self._check, some)
                yield
        except InvalidValueError as error:
            return error
        return None


def _run(check: ValueCheck, values: Iterable[tuple[str, Raw]]) -> None:
    for key, raw in values:
        check(key, stored_of(raw))


def _values_of(call: Call) -> Iterable[tuple[str, Raw]]:
    """Return the keys and values that a call stores. An `incr` checks its value itself."""
    if isinstance(call, Set | SetIfAbsent):
        return [(call.key, call.value)]
    if isinstance(call, SetMany):
        return call.values.items()
    return call.changes.set.items() if isinstance(call, MakeChanges) else ()
