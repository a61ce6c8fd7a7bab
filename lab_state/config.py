"""`Config`: the settings of one manager, checked by the constructor."""

from __future__ import annotations

import math
import re
from typing import Literal, cast

import msgspec

from lab_state.exceptions import InvalidNameError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class _Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base of `Config`. It has the only field that may be passed by position."""

    name: str


class Config(_Named, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of one manager: `Config("jobs", flush_interval=0)`.

    Only `name` may be passed by position. `Config` is a `msgspec.Struct`. For example,
    `msgspec.yaml.decode(text, type=Config)` makes a `Config` from the text of a file, and
    `msgspec.convert(dictionary, Config)` makes a `Config` from a dict. A misspelt field is an error.

    Attributes:
        name: The name of the state, and of its file or object: 1 to 128 characters
            of `A-Z a-z 0-9 . _ -`, the first a letter or a digit.
        flush_interval: Seconds between background flushes, 0 or more. `0`: every
            call that changes something returns only when its change is durable.
            Concurrent callers share one write. `None`: there are no flushes in the
            background. `flush()`, `backup()` and `stop()` write the changes. With an
            interval above 1/16 s, a flush begins early when about 8 MiB are not flushed.
            The default is 1.0, and 0 in a shared state, which allows no other value.
        stop_timeout: Seconds without progress after which `stop()` gives up, above 0.
            While bytes are written or sent, `stop()` goes on, however large the state is.
            A flush that fails with `UnavailableError` is tried again, for this many seconds at most.
        lock_timeout: Seconds for which `start()` tries again while another writer
            holds the state, 0 or more. `None`: without a limit. `0`: `start()` raises
            `LockedError` at once. A server with a graceful reload starts the new process
            before the old one has ended. In that case, choose more seconds than the old
            process may need to end. In a shared state this must be 0, because its processes do not
            wait for the lock.
        shared: Whether several processes of this machine use the state. A shared state
            needs a `FileStorage`.
        owner_timeout: Seconds for which a call of a shared state waits for an owner, or for a sign of
            life of the owner, above 0. These calls are writes, `catch_up()`, `flush()`, `backup()` and `start()`. After this
            time, the call raises `UnavailableError`, and `start()` may raise `LockedError` instead.
            An owner gives one sign of life each second. So a running owner counts as silent after 2
            seconds at the earliest, even if this value is smaller.
        migrate: Whether `start()` migrates a state whose schema is older than that of the code; see `Schema`. With
            `"refuse"`, `start()` raises `SchemaError` instead. Then migrate the state with the command `lab-state migrate`.

    Raises:
        InvalidNameError: The name is not allowed. It becomes a file name. So a name that could
            lead out of the directory is refused.
        ValueError: Another field is out of bounds.
        TypeError: A field has the wrong type.
    """

    # `__post_init__` replaces `UNSET` by the default. So no reader of the field sees `UNSET`.
    flush_interval: float | None = cast("float | None", msgspec.UNSET)
    stop_timeout: float = 8.0
    lock_timeout: float | None = 0.0
    shared: bool = False
    owner_timeout: float = 10.0
    migrate: Literal["auto", "refuse"] = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Config.name must be a str, not {type(self.name).__name__}")
        if not _NAME.fullmatch(self.name):
            raise InvalidNameError(
                f"Config.name {self.name[:140]!r} is out of bounds: use 1 to 128 characters of "
                "A-Z a-z 0-9 . _ -, the first a letter or a digit"
            )
        if not isinstance(self.shared, bool):
            raise TypeError(f"Config.shared must be a bool, not {type(self.shared).__name__}")
        if self.flush_interval is cast("float | None", msgspec.UNSET):
            msgspec.structs.force_setattr(self, "flush_interval", 0.0 if self.shared else 1.0)
        if self.flush_interval is not None:
            _check_seconds("flush_interval", self.flush_interval)
        _check_seconds("stop_timeout", self.stop_timeout)
        if self.stop_timeout == 0:
            raise ValueError("Config.stop_timeout must be above 0 seconds, or nothing could be written at stop")
        if self.lock_timeout is not None:
            _check_seconds("lock_timeout", self.lock_timeout)
        _check_seconds("owner_timeout", self.owner_timeout)
        if self.owner_timeout == 0:
            raise ValueError("Config.owner_timeout must be above 0 seconds, or no call could wait for the owner")
        self._check_migrate()
        if self.shared:
            self._check_shared()

    def _check_migrate(self) -> None:
        if not isinstance(self.migrate, str):
            raise TypeError(f"Config.migrate must be a str, not {type(self.migrate).__name__}")
        if self.migrate not in {"auto", "refuse"}:
            raise ValueError('Config.migrate must be "auto" or "refuse"')

    def _check_shared(self) -> None:
        if self.flush_interval != 0:
            raise ValueError(
                f"Config.flush_interval must be 0 with shared=True, not {self.flush_interval!r}: a write of a shared state "
                "returns only when it is durable; leave flush_interval out, or pass flush_interval=0 to structs.replace()"
            )
        if self.lock_timeout != 0:
            raise ValueError(
                f"Config.lock_timeout must be 0 with shared=True, not {self.lock_timeout!r}: a process of a shared state "
                "does not wait for the lock; owner_timeout says how long it waits for an owner"
            )


def _check_seconds(field: str, value: float) -> None:
    """Check that the value of a field is a finite number of seconds, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"Config.{field} must be a number of seconds, not {type(value).__name__}")
    try:
        good = math.isfinite(value) and value >= 0
    except OverflowError:
        good = False
    if not good:
        raise ValueError(f"Config.{field} must be a finite number of seconds, 0 or more")
