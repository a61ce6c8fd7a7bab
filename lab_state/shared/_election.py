"""The election: a process looks for its role in a shared state. It takes the lock, or connects to the holder of the lock.

The section "Election" of `docs/design/shared.md` has the steps.
"""

from __future__ import annotations

from lab_state._clock import Clock, sleep
from lab_state.exceptions import LockedError, StorageError
from lab_state.shared._messages import PROTOCOL
from lab_state.storage._claim import Claim, SharedFiles
from lab_state.storage._fs_socket import OwnSocket
from lab_state.storage._lock import LockHolder

_SOON, _SOON_FOR = 0.001, 0.1
"""After the end of an owner, a process with a copy tries again every `_SOON` seconds, for `_SOON_FOR` seconds."""

_LATER = 0.01
"""After the end of an owner, a process without a copy waits for this number of seconds. So processes with a copy can take the lock first."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.05
"""The first and the longest pause between two attempts in all other cases, in seconds. Each pause is twice as long as the pause before, up
to the longest pause.
"""

_BELIEVED_AFTER = 0.5
"""A lock file may name an owner that cannot be followed. A start fails for this reason only if the content of the file has
been the same for this number of seconds. Before that, the content may be that of an earlier holder.
"""

_BELIEVED_ATTEMPTS = 3
"""The content of the lock file must also have been the same in this many attempts."""


class Election:
    """One search of a process for its role. It begins at the start of a manager, or when a connection to an owner has ended.

    Attributes:
        why: The reason why this process has no role yet. If another process holds the lock, this text names that process.
    """

    def __init__(self, files: SharedFiles, name: str, clock: Clock, owner_timeout: float) -> None:
        """Begin the search. Its time limit starts now.

        Args:
            files: The files of the storage.
            name: The name of the state.
            clock: The clock of the manager.
            owner_timeout: See `Config`.
        """
        self.why: str = "no process has taken the state over yet"
        self._files = files
        self._name = name
        self._clock = clock
        self._owner_timeout = owner_timeout
        self._since = clock.monotonic()
        self._pause = 0.0
        self._doubts = Doubts(clock)

    def ended(self, *, greeted: bool, has_copy: bool) -> None:
        """Note that the connection that `role` returned has ended.

        Args:
            greeted: Whether an owner has answered on this connection. If so, the time limit and the pauses begin again.
            has_copy: Whether this process has a copy.
        """
        if greeted:
            self._since = self._clock.monotonic()
            self._pause = 0.0 if has_copy else _LATER
        else:
            self._wait_longer(has_copy=has_copy)

    async def role(self, *, has_copy: bool) -> Claim | OwnSocket:
        """Take the lock, or connect to its holder. Try both again until one of them succeeds.

        Return the claim, or the connected socket.

        Args:
            has_copy: Whether this process has a copy. Without one, the search has a time limit: `owner_timeout`.

        Raises:
            LockedError: The holder of the lock does not share the state. Or for `owner_timeout` seconds, no connection could be
                made, or each connection ended before an owner answered. The error is raised only without a copy. A holder
                that accepts the connection and stays silent does not lead to this error; see `Follower.limit_silence`.
            UnsupportedError: The files or the socket cannot be used. Without a copy, this is also raised if the holder
                runs on another machine.
            UnavailableError: The files or the socket cannot be used at present.
        """
        while True:
            if self._pause:
                await sleep(self._clock, self._pause)
            try:
                return await self._files.claim(self._name, PROTOCOL)
            except LockedError as error:
                locked = error
            self.why = f"{locked}, and that process has not answered"
            if not has_copy and self._clock.monotonic() - self._since >= self._owner_timeout:
                remedy = "wait until that process has started or ended, or stop it"
                unanswered = f"{locked}, and no process has answered for {self._owner_timeout:g} s: {remedy}"
                raise _placed(LockedError(unanswered), locked)
            if (connected := await self._files.connect(self._name)) is not None:
                return connected
            holder = await self._files.holder(self._name)
            refusal = None if holder is None else self._files.refusal(self._name, holder)
            self._doubts.add(None if refusal is None else holder)
            if refusal is not None and not has_copy and self._doubts.are_over:
                raise _placed(refusal, locked)
            self._wait_longer(has_copy=has_copy)

    def _wait_longer(self, *, has_copy: bool) -> None:
        if has_copy and self._clock.monotonic() - self._since < _SOON_FOR:
            self._pause = _SOON
        else:
            self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)


def _placed(error: StorageError, locked: LockedError) -> StorageError:
    """Set the place of the state if the error is a `LockedError`. Return the error."""
    if isinstance(error, LockedError):
        error.place = locked.place
    return error


class Doubts:
    """The last content of the lock file in one search, if it names an owner that cannot be followed.

    Such a content may be that of an earlier holder.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen: LockHolder | None = None
        self._since = 0.0
        self._times = 0

    def add(self, seen: LockHolder | None) -> None:
        """Note the content of the lock file in an attempt; `None` if it names an owner that can be followed, or no owner."""
        if seen is None or seen != self._seen:
            self._seen, self._since, self._times = seen, self._clock.monotonic(), 0
        self._times += 1

    @property
    def are_over(self) -> bool:
        """Whether the content was the same in enough attempts, and for enough time. Then it counts as that of the present holder."""
        return (
            self._seen is not None
            and self._times >= _BELIEVED_ATTEMPTS
            and self._clock.monotonic() - self._since >= _BELIEVED_AFTER
        )
