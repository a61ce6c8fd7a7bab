"""The path of the socket of a shared state. This module does no I/O.

A path in `sockaddr_un` has at most 107 bytes. If the path of the socket is longer, a process opens the
directory, and reaches the socket through the descriptor of the directory. If the name of the socket is
too long for this, too, the socket gets a short name.
"""

from __future__ import annotations

import os
from typing import NamedTuple

LONGEST_PATH = 107
"""The number of bytes of the longest path in `sockaddr_un`, without the NUL at its end."""

_LONGEST_NAME = LONGEST_PATH - len("/proc/self/fd/") - 10 - len("/")
"""The number of bytes of the longest name of a socket that is reached through a descriptor. The number of a descriptor has at most 10 digits."""


class Address(NamedTuple):
    """The place of a socket.

    Attributes:
        directory: The absolute path of the directory, without symbolic links.
        socket_name: The name of the socket in the directory.
    """

    directory: str
    socket_name: str

    @property
    def path(self) -> str:
        """The path of the socket. It may be too long for `sockaddr_un`."""
        return os.path.join(self.directory, self.socket_name)

    @property
    def is_direct(self) -> bool:
        """Whether `path` fits into `sockaddr_un`."""
        return len(os.fsencode(self.path)) <= LONGEST_PATH

    def through(self, descriptor: int) -> str:
        """Return the path through a descriptor of the directory, which this process has open. It fits into `sockaddr_un`."""
        return f"/proc/self/fd/{descriptor}/{self.socket_name}"


def address_of(directory: str, name: str) -> Address:
    """Return the address of the socket of a state.

    The name of the socket depends only on the name of the state. It is `<name>.sock`, or
    `lab-state-<hash>.sock` if that would be too long. So processes that see the directory under different paths find the same socket.

    Args:
        directory: The absolute path of the directory, without symbolic links.
        name: The name of the state.
    """
    plain = f"{name}.sock"
    if len(os.fsencode(plain)) <= _LONGEST_NAME:
        return Address(directory, plain)
    import hashlib  # noqa: PLC0415 -- it loads OpenSSL, and few states have such a long name

    digest = hashlib.sha256(name.encode()).hexdigest()
    return Address(directory, f"lab-state-{digest[:16]}.sock")
