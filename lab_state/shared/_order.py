"""The order and the numbers that are allowed for the messages on one connection. This module does no I/O.

Each side has one object of this module for each connection. The object checks each message before
the side handles the message.
"""

from __future__ import annotations

from lab_state.shared._frames import BadMessageError
from lab_state.shared._messages import (
    Bye,
    Call,
    Expiries,
    FromClient,
    FromOwner,
    Hello,
    Life,
    No,
    Question,
    Starting,
    Welcome,
)

SPAN = 1024
"""The size of the window. The number of a call is at most this much above the acknowledgement."""


class ClientOrder:
    """The order of a client's messages, which the owner checks.

    Attributes:
        acknowledged: The highest acknowledgement so far.
    """

    def __init__(self) -> None:
        self.acknowledged: int = 0
        self._last = 0
        self._has_hello = self._has_bye = False

    def resume(self, acknowledged: int) -> None:
        """Raise the acknowledgement to the one that this client sent on earlier connections. It is never lowered."""
        self.acknowledged = max(self.acknowledged, acknowledged)

    def check(self, message: FromClient) -> None:
        """Check the next message.

        Raises:
            BadMessageError: The message is not allowed at this point.
        """
        if isinstance(message, Hello) is self._has_hello:
            raise BadMessageError("a second hello" if self._has_hello else "a first message that is not a hello")
        if self._has_bye:
            raise BadMessageError("a message after the farewell")
        if isinstance(message, Hello):
            self._has_hello = True
        elif isinstance(message, Life | Bye):
            self._has_bye = isinstance(message, Bye)
            self._acknowledge(message.number)
        elif not isinstance(message, Question | Expiries):
            self._check_call(message)

    def check_call(self, call: Call) -> None:
        """Check the next message, which is a call. This does the same as `check`, and is faster.

        Raises:
            BadMessageError: The call is not allowed at this point.
        """
        if self._has_bye or not self._has_hello:
            self.check(call)
        self._check_call(call)

    def _check_call(self, call: Call) -> None:
        number, acknowledged = call.n, call.ack
        if number <= self._last:
            raise BadMessageError(f"the number {number} is not above {self._last}, the number of the previous call")
        if not acknowledged < number <= acknowledged + SPAN:
            raise BadMessageError(f"the number {number} is not 1 to {SPAN} above the acknowledgement {acknowledged}")
        self._acknowledge(acknowledged)
        self._last = number

    def _acknowledge(self, number: int) -> None:
        if number < self.acknowledged:
            raise BadMessageError(f"the acknowledgement {number} is below an earlier one")
        self.acknowledged = number


class OwnerOrder:
    """The order of an owner's messages, which a client checks.

    Attributes:
        has_welcome: Whether the owner has sent a `Welcome`. It admits the client only if its `known` is True.
    """

    def __init__(self) -> None:
        self.has_welcome: bool = False
        self._time = 0
        self._is_over = False

    def check(self, time: int, message: FromOwner) -> None:
        """Check the next message, and its time.

        Raises:
            BadMessageError: The message is not allowed at this point.
        """
        if self._is_over:
            raise BadMessageError("a message after a refusal or a farewell")
        if time < self._time:
            raise BadMessageError("a time before that of the previous message")
        is_greeting = isinstance(message, Starting | Welcome | No)
        if is_greeting is self.has_welcome:
            raise BadMessageError(
                "an answer to the hello after the welcome" if self.has_welcome else "a message before the welcome"
            )
        self._time = time
        self.has_welcome = self.has_welcome or isinstance(message, Welcome)
        self._is_over = isinstance(message, No | Bye)
