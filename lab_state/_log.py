"""A logger that never raises. Handlers, filters and formatters of the application may raise."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Protocol


class Logs(Protocol):
    """The methods that a logger of any library needs. Each takes a complete message."""

    def info(self, message: str, /) -> object:
        """Log at level INFO."""
        ...

    def warning(self, message: str, /) -> object:
        """Log at level WARNING."""
        ...

    def error(self, message: str, /) -> object:
        """Log at level ERROR."""
        ...


def check_logger(logger: object) -> None:
    """Refuse an object that is no logger, before there is a failure to log.

    Raises:
        TypeError: It is a class, or a method of a logger is missing.
    """
    missing = [name for name in ("info", "warning", "error") if not callable(getattr(logger, name, None))]
    if isinstance(logger, type) or missing:
        what = "a class" if isinstance(logger, type) else f"{type(logger).__name__}, which has no {missing[0]}()"
        raise TypeError(f"logger must be a logger such as logging.getLogger('app'), not {what}")


class Log:
    """A logger that passes messages to another one, and swallows its errors.

    If the other logger raises, the message goes to `logging.lastResort`, which prints WARNING
    and ERROR to stderr.
    """

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter[Any] | Logs) -> None:
        self._logger: Any = logger

    def debug(self, message: str, *args: object) -> None:
        """Log at level DEBUG, if the logger has that level."""
        if hasattr(self._logger, "debug"):
            self._tell("debug", message, args)

    def info(self, message: str, *args: object) -> None:
        """Log at level INFO."""
        self._tell("info", message, args)

    def warning(self, message: str, *args: object) -> None:
        """Log at level WARNING."""
        self._tell("warning", message, args)

    def error(self, message: str, *args: object) -> None:
        """Log at level ERROR."""
        self._tell("error", message, args)

    def _tell(self, level: str, message: str, args: tuple[object, ...]) -> None:
        # A logger of another library may refuse `stacklevel`, or store it with the message.
        caller = {"stacklevel": 3} if isinstance(self._logger, logging.Logger) else {}
        text = message
        try:
            text = _complete(message, args)
            getattr(self._logger, level)(text, **caller)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as problem:  # noqa: BLE001 -- no error of a logger concerns the caller
            with contextlib.suppress(Exception):
                _last_resort(level, f"{text} (the logger raised {type(problem).__name__})")


def _complete(message: str, args: tuple[object, ...]) -> str:
    """Fill in the arguments, since not every logger knows `%s`, and escape characters that UTF-8 cannot hold."""
    return (message % args).encode(errors="backslashreplace").decode()


def _last_resort(level: str, text: str) -> None:
    number = logging.getLevelNamesMapping()[level.upper()]
    if logging.lastResort is not None and number >= logging.lastResort.level:
        logging.lastResort.handle(logging.LogRecord("lab_state", number, __file__, 0, text, (), None))
