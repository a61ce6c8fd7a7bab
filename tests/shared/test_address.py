"""The path of the socket of a shared state."""

from __future__ import annotations

import hashlib
import string

import pytest

from lab_state.shared._address import LONGEST_PATH, Address, address_of


def test_the_plain_name() -> None:
    """The socket of a state stands beside its other files."""
    address = address_of("/srv/state", "visits")
    assert address == Address("/srv/state", "visits.sock")
    assert (address.path, address.is_direct) == ("/srv/state/visits.sock", True)


@pytest.mark.parametrize(("length", "is_direct"), [(95, True), (96, False)])
def test_a_long_directory(length: int, *, is_direct: bool) -> None:
    """A path of more than 107 bytes is not direct. The path through a descriptor does not depend on the directory."""
    address = address_of("/" + "d" * (length - 1), "visits")
    assert len(address.path) == length + len("/visits.sock")
    assert address.is_direct is is_direct is (len(address.path) <= LONGEST_PATH)
    assert address.through(7) == "/proc/self/fd/7/visits.sock"


def test_a_directory_of_long_characters() -> None:
    """The bytes of a path count, not its characters."""
    assert not address_of("/" + "ä" * 60, "visits").is_direct


@pytest.mark.parametrize("name", ["n" * 77, "n" * 78, "n" * 128], ids=len)
def test_a_long_name(name: str) -> None:
    """A name of more than 77 bytes gives a short name of 31 bytes. Each name can be reached through each descriptor."""
    address = address_of("/srv", name)
    digest = hashlib.sha256(name.encode()).hexdigest()
    assert address.socket_name == (f"{name}.sock" if len(name) <= 77 else f"lab-state-{digest[:16]}.sock")
    assert len(address.through(2**31 - 1)) <= LONGEST_PATH
    assert len(f"lab-state-{digest[:16]}.sock") == 31


def test_the_directory_has_no_effect_on_the_name() -> None:
    """Processes that see the directory under different paths find the same socket."""
    for name in ("visits", "n" * 77, "n" * 78):
        assert address_of("/s", name).socket_name == address_of("/" + "d" * 200, name).socket_name


def test_short_names_differ() -> None:
    """Two long names that differ in one character have different sockets."""
    names = {address_of("/srv", "n" * 99 + char).socket_name for char in string.ascii_lowercase}
    assert len(names) == len(string.ascii_lowercase)
