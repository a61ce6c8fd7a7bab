"""A logger that does not raise errors of the handlers, filters and formatters of the application. Only interrupts are raised."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Protocol


class Logs(Protocol):
    """The methods that a logger must have. Each is called with the complete message as its only argument.

    There is one exception: a `logging.Logger` also gets the argument `stacklevel`.
    """

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
    """Check that an object is a logger. A `Manager` does this when it is made, before there is a failure to log.

    Raises:
        TypeError: The object is a class, or lacks a method of `Logs`.
    """
    missing = [name for name in ("info", "warning", "error") if not callable(getattr(logger, name, None))]
    if isinstance(logger, type) or missing:
        what = "a class" if isinstance(logger, type) else f"{type(logger).__name__}, which has no {missing[0]}()"
        raise TypeError(f"logger must be a logger such as logging.getLogger('app'), not {what}")


class Log:
    """A logger that passes messages to the logger of the application, and never raises an error.

    If the logger of the application raises an error, the message goes to `logging.lastResort`, which
    prints WARNING and ERROR to stderr. The class of the error is added to the message.
    """

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter[Any] | Logs) -> None:
        self._logger: Any = logger

    def debug(self, message: str, *args: object) -> None:
        """Log at level DEBUG, if the logger has a method for it."""
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
        # A logger of another library may refuse the argument `stacklevel`, or store it with the message.
        caller = {"stacklevel": 3} if isinstance(self._logger, logging.Logger) else {}
        text = message
        try:
            text = _complete(message, args)
            getattr(self._logger, level)(text, **caller)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as problem:  # noqa: BLE001 -- an error of a logger must not reach the caller
            with contextlib.suppress(Exception):
                _last_resort(level, f"{text} (the logger raised {type(problem).__name__})")


def _complete(message: str, args: tuple[object, ...]) -> str:
    """Insert the arguments into the message, because not every logger does. Escape lone surrogates for UTF-8."""
    return (message % args).encode(errors="backslashreplace").decode()


def _last_resort(level: str, text: str) -> None:
    number = logging.getLevelNamesMapping()[level.upper()]
    if logging.lastResort is not None and number >= logging.lastResort.level:
        logging.lastResort.handle(logging.LogRecord("lab_state", number, __file__, 0, text, (), None))
