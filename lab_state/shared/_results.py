"""The results of calls, kept until their client has acknowledged them. This module does no I/O.

`ResultTable` has the results that records contained. After the table was loaded, only records change it. So it is the
same in each process at the same revision. `PendingResults` has the results of an owner that are not durable yet.
A record contains them in its member `calls`::

    {"<client>":[17,{"18":true,"19":7}],"<other client>":null}

The first item is the acknowledgement of the client: the number up to which the client needs no more answers. The second
item has the results of the calls of this client, by number. `null` means that the client is forgotten. In a
snapshot, each result has its revision as well::

    {"<client>":[17,{"18":[43,true]}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NamedTuple, TypeAlias

import msgspec
from msgspec import Raw

ClientId: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Number: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]

RecordCalls: TypeAlias = dict[ClientId, tuple[_Count, dict[_Number, Raw]] | None]
"""The member `calls` of a record."""

SnapshotCalls: TypeAlias = dict[ClientId, tuple[_Count, dict[_Number, tuple[_Count, Raw]]]]
"""The member `calls` of a snapshot."""


class Result(NamedTuple):
    """The result of a call that changed something, as JSON, and the revision of its answer."""

    revision: int
    value: bytes


class _Client:
    __slots__ = ("acknowledged", "results")

    def __init__(self) -> None:
        self.acknowledged = 0
        self.results: dict[int, Result] = {}

    def acknowledge(self, number: int) -> None:
        self.acknowledged = max(self.acknowledged, number)
        for old in [old for old in self.results if old <= self.acknowledged]:
            del self.results[old]


class ResultTable:
    """The results that records contained, without those that their client has acknowledged."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}

    def __contains__(self, client: str) -> bool:
        """Return whether a record or a snapshot has named a client, and no later record has forgotten it."""
        return client in self._clients

    @property
    def acknowledged(self) -> dict[str, int]:
        """The acknowledgement of each client."""
        return {name: client.acknowledged for name, client in self._clients.items()}

    def find(self, client: str, number: int) -> Result | None:
        """Return the result of a call; `None` if the table has none."""
        entry = self._clients.get(client)
        return None if entry is None else entry.results.get(number)

    def apply(self, calls: RecordCalls, revision: int) -> None:
        """Apply the member `calls` of a record, whose last revision is `revision`."""
        for name, told in calls.items():
            if told is None:
                self._clients.pop(name, None)
                continue
            entry = self._clients.setdefault(name, _Client())
            acknowledged, results = told
            for number, value in results.items():
                # `bytes` makes a copy, because `value` would keep the whole record in memory.
                entry.results[number] = Result(revision, bytes(value))
            entry.acknowledge(acknowledged)

    def snapshot(self) -> SnapshotCalls:
        """Return the member `calls` of a snapshot. Later records do not change the returned dict."""
        return {
            name: (
                client.acknowledged,
                {number: (result.revision, Raw(result.value)) for number, result in client.results.items()},
            )
            for name, client in self._clients.items()
        }

    def load(self, calls: SnapshotCalls) -> None:
        """Replace the table by the member `calls` of a snapshot."""
        self._clients = {}
        for name, (acknowledged, results) in calls.items():
            entry = self._clients[name] = _Client()
            for number, (revision, value) in results.items():
                entry.results[number] = Result(revision, bytes(value))
            entry.acknowledge(acknowledged)


class Applied(NamedTuple):
    """The result of an executed call whose change is not durable yet. `at` is the revision of this change."""

    at: int
    value: bytes


_Results: TypeAlias = dict[str, dict[int, Applied] | None]


class PendingResults:
    """The results of an owner that are not durable yet: the results in the record under way, and newer results."""

    def __init__(self) -> None:
        self._new: _Results = {}
        self._under_way: _Results = {}

    def __contains__(self, client: str) -> bool:
        """Return whether there is a result of a client that is not durable."""
        return bool(self._new.get(client) or self._under_way.get(client))

    def __bool__(self) -> bool:
        """Return whether the next record needs the member `calls`."""
        return bool(self._new)

    def add(self, client: str, number: int, value: bytes, at: int) -> None:
        """Keep the result of a call. The change of the call has the revision `at`."""
        results = self._new.get(client)
        if results is None:
            results = self._new[client] = {}
        results[number] = Applied(at, value)

    def find(self, client: str, number: int) -> Applied | None:
        """Return the result of a call that is not durable yet; `None` if there is none."""
        for results in (self._new.get(client), self._under_way.get(client)):
            if results is not None and number in results:
                return results[number]
        return None

    def forget(self, client: str) -> None:
        """Note for the next record that a client is forgotten. Drop the results of the client that are not in the record under way."""
        self._new[client] = None

    def take(self, acknowledged: Mapping[str, int]) -> RecordCalls:
        """Take the results for a record, and return its member `calls`. Call `settle` or `put_back` after the commit.

        Args:
            acknowledged: The latest acknowledgement of each client. Results up to it are left out.
        """
        self._under_way, self._new = self._new, {}
        calls: RecordCalls = {}
        for name, results in self._under_way.items():
            upto = acknowledged.get(name, 0)
            calls[name] = (
                None
                if results is None
                else (upto, {number: Raw(result.value) for number, result in results.items() if number > upto})
            )
        return calls

    def settle(self) -> None:
        """Note that the record is durable. By now its results are in the `ResultTable`."""
        self._under_way = {}

    def put_back(self) -> None:
        """Put back the results of a failed commit. A client that was forgotten meanwhile stays forgotten. A second call does nothing."""
        older, self._under_way = self._under_way, {}
        for name, results in older.items():
            if name not in self._new:
                self._new[name] = results
            elif (newer := self._new[name]) is not None and results is not None:
                self._new[name] = {**results, **newer}


def needs_forgetting(client: str, table: ResultTable, pending: PendingResults) -> bool:
    """Return whether a record must forget a client: the client is in the table, or has results that are not durable."""
    return client in table or client in pending
