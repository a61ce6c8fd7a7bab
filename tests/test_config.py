"""`Config`: what is accepted, what is refused, and where it comes from."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from lab_state import Config, InvalidNameError, LabStateError


def make(**fields: Any) -> Config:
    return Config(**{"name": "a", **fields})


def test_the_defaults() -> None:
    """A flush a second, 8 seconds to stop, and none to wait for a lock."""
    config = Config(name="my-module")
    assert (config.name, config.flush_interval, config.stop_timeout) == ("my-module", 1.0, 8.0)
    assert config.lock_timeout == 0


@pytest.mark.parametrize("name", ["a", "A", "0", "my-module", "a.b_c-d", "a..", "0-", "x" * 128, "con", "a.json"])
def test_a_name_within_bounds(name: str) -> None:
    """A name has 1 to 128 letters, digits, dots, dashes and underscores, a letter or digit first."""
    assert Config(name=name).name == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", ".hidden", "-a", "_a", " a", "a ", "../x", "a/b", "/a", "a\\b", "C:a", "a b", "a\n", "\na"),
        *("a\0", "a\0b", "\ud800", "a\udfff", "é", "aé", "٣", "a*", "a?", "~", "%2e", "x" * 129, "x" * 100_000),
    ],
    ids=range(29),
)
def test_a_name_out_of_bounds(name: str) -> None:
    """A name that could leave the directory, or that no file system agrees on, is InvalidNameError."""
    with pytest.raises(InvalidNameError) as caught:
        Config(name=name)
    message = str(caught.value)
    assert message == (
        f"Config.name {name[:140]!r} is out of bounds: use 1 to 128 characters of A-Z a-z 0-9 . _ -, "
        "the first a letter or a digit"
    )
    assert len(message) < 300
    assert message.encode()


def test_a_name_error_is_a_value_error() -> None:
    """InvalidNameError is a ValueError and a LabStateError."""
    with pytest.raises(ValueError, match="out of bounds") as caught:
        Config(name="")
    assert isinstance(caught.value, LabStateError)


@pytest.mark.parametrize("name", [None, 1, b"a", ["a"]], ids=repr)
def test_a_name_of_another_type(name: Any) -> None:
    """A name that is no str is a TypeError."""
    with pytest.raises(TypeError, match=rf"^Config\.name must be a str, not {type(name).__name__}$"):
        Config(name=name)


@pytest.mark.parametrize("value", [0, 0.0, 0.001, 1, 60, 1e9, None], ids=repr)
def test_a_flush_interval_within_bounds(value: float | None) -> None:
    """A flush interval is any finite number of seconds from 0 on, or None."""
    assert make(flush_interval=value).flush_interval == value


@pytest.mark.parametrize("value", [0.001, 1, 8.0, 1e9], ids=repr)
def test_a_stop_timeout_within_bounds(value: float) -> None:
    """A stop timeout is any finite number of seconds above 0."""
    assert make(stop_timeout=value).stop_timeout == value


@pytest.mark.parametrize("value", [0, 0.0, 0.001, 30, 1e9, None], ids=repr)
def test_a_lock_timeout_within_bounds(value: float | None) -> None:
    """A lock timeout is any finite number of seconds from 0 on, or None."""
    assert make(lock_timeout=value).lock_timeout == value


@pytest.mark.parametrize("field", ["flush_interval", "stop_timeout", "lock_timeout", "owner_timeout"])
@pytest.mark.parametrize("value", [-1, -0.001, float("nan"), float("inf"), float("-inf"), 10**400], ids=range(6))
def test_seconds_out_of_bounds(field: str, value: float) -> None:
    """Seconds that are negative or not finite are a ValueError that names the field."""
    with pytest.raises(ValueError, match=rf"^Config\.{field} must be a finite number of seconds, 0 or more$"):
        make(**{field: value})


@pytest.mark.parametrize("field", ["flush_interval", "stop_timeout", "lock_timeout", "owner_timeout"])
@pytest.mark.parametrize("value", ["1", b"1", True, False, [1]], ids=repr)
def test_seconds_of_another_type(field: str, value: Any) -> None:
    """Seconds that are no number are a TypeError that names the field; a bool is no number."""
    with pytest.raises(TypeError, match=rf"^Config\.{field} must be a number of seconds, not {type(value).__name__}$"):
        make(**{field: value})


def test_a_stop_timeout_of_none() -> None:
    """A stop always has a bound."""
    with pytest.raises(TypeError, match=r"^Config\.stop_timeout must be a number of seconds, not NoneType$"):
        make(stop_timeout=None)


@pytest.mark.parametrize("value", [0, 0.0, -0.0], ids=repr)
def test_a_stop_timeout_of_nothing(value: float) -> None:
    """No time to stop is a ValueError."""
    with pytest.raises(
        ValueError, match=r"^Config\.stop_timeout must be above 0 seconds, or nothing could be written at stop$"
    ):
        make(stop_timeout=value)


# A shared state


def test_the_defaults_of_a_shared_state() -> None:
    """Each write waits until it is durable. Calls wait for an owner for 10 seconds."""
    config = Config("jobs", shared=True)
    assert (config.flush_interval, config.lock_timeout, config.owner_timeout) == (0, 0, 10)
    assert not Config("jobs").shared


def test_no_reader_sees_the_mark_of_a_default() -> None:
    """The value in force is in the field, in its copy and in its JSON."""
    for config in (Config("jobs"), Config("jobs", shared=True)):
        assert isinstance(config.flush_interval, float)
        assert msgspec.structs.replace(config) == config
        assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config
        assert msgspec.convert({"name": "jobs", "shared": config.shared}, Config) == config


@pytest.mark.parametrize("value", [1.0, 0.001, None], ids=repr)
def test_a_shared_state_has_no_other_flush_interval(value: float | None) -> None:
    """The error says why, and what to do in `structs.replace`, where the value in force is given by itself."""
    message = (
        f"Config.flush_interval must be 0 with shared=True, not {value!r}: a write of a shared state returns only when "
        "it is durable; leave flush_interval out, or pass flush_interval=0 to structs.replace()"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Config("jobs", shared=True, flush_interval=value)
    with pytest.raises(ValueError, match=re.escape(message)):
        msgspec.structs.replace(Config("jobs", flush_interval=value), shared=True)
    changed = msgspec.structs.replace(Config("jobs", flush_interval=value), shared=True, flush_interval=0)
    assert changed == Config("jobs", shared=True, flush_interval=0) == Config("jobs", shared=True)


@pytest.mark.parametrize("value", [0.5, 30, None], ids=repr)
def test_a_shared_state_does_not_wait_for_the_lock(value: float | None) -> None:
    """The error names the setting that counts."""
    with pytest.raises(
        ValueError, match=r"^Config\.lock_timeout must be 0 with shared=True.*owner_timeout says how long"
    ):
        Config("jobs", shared=True, lock_timeout=value)
    assert Config("jobs", shared=True, lock_timeout=0).shared


@pytest.mark.parametrize("value", [0.001, 1, 60.0, 1e9], ids=repr)
def test_an_owner_timeout_within_bounds(value: float) -> None:
    """It is any finite number of seconds above 0, and may be given for a state that is not shared."""
    assert make(owner_timeout=value).owner_timeout == make(owner_timeout=value, shared=True).owner_timeout == value


@pytest.mark.parametrize("value", [0, 0.0, -0.0], ids=repr)
def test_an_owner_timeout_of_nothing(value: float) -> None:
    """No time to wait is a ValueError."""
    with pytest.raises(
        ValueError, match=r"^Config\.owner_timeout must be above 0 seconds, or no call could wait for the owner$"
    ):
        make(owner_timeout=value)


@pytest.mark.parametrize("value", [1, 0, "yes", None], ids=repr)
def test_shared_is_a_bool(value: Any) -> None:
    """A number or a text is a TypeError."""
    with pytest.raises(TypeError, match=rf"^Config\.shared must be a bool, not {type(value).__name__}$"):
        make(shared=value)


def test_the_name_may_be_given_by_position() -> None:
    """`Config("jobs")` is `Config(name="jobs")`, and is checked in the same way."""
    assert Config("jobs", flush_interval=0) == Config(name="jobs", flush_interval=0)
    with pytest.raises(InvalidNameError):
        Config("../jobs")


def test_all_fields_but_the_name_are_given_by_name() -> None:
    """A second positional argument, an unknown field, a missing name and a name given twice are TypeErrors."""
    unchecked: Any = Config
    for arguments, fields in (
        (("a", 1.0), {}),
        (("a",), {"name": "a"}),
        ((), {"name": "a", "flush_intervall": 1}),
        ((), {}),
    ):
        with pytest.raises(TypeError):
            unchecked(*arguments, **fields)


def test_migrate() -> None:
    """`migrate` is `"auto"` or `"refuse"`."""
    assert (make().migrate, make(migrate="refuse").migrate) == ("auto", "refuse")
    with pytest.raises(ValueError, match=r'^Config\.migrate must be "auto" or "refuse"$'):
        make(migrate="never")
    with pytest.raises(TypeError, match=r"^Config\.migrate must be a str, not bool$"):
        make(migrate=True)


def test_a_config_shows_all_its_fields() -> None:
    """The representation of a config names each field, the name first, and can be evaluated."""
    shown = (
        "Config(name='jobs', flush_interval=1.0, stop_timeout=8.0, lock_timeout=0.0, shared=False, owner_timeout=10.0, "
        "migrate='auto')"
    )
    assert repr(Config("jobs")) == shown


@pytest.mark.parametrize("text", ["NAME=jobs\nFLUSH_INTERVAL=0\n", "name=jobs\nflush_interval=0.0\n"])
def test_a_config_from_an_environment_file(text: str) -> None:
    """The lines of an environment file, which are all text, make a config with `strict=False`."""
    fields = {key.lower(): value for key, _, value in (line.partition("=") for line in text.splitlines())}
    assert msgspec.convert(fields, Config, strict=False) == Config("jobs", flush_interval=0)


def test_a_config_does_not_change() -> None:
    """A config is frozen and hashable; a changed copy is checked too."""
    config: Any = make()
    with pytest.raises(AttributeError):
        config.name = "b"
    assert hash(config) == hash(make())
    assert msgspec.structs.replace(config, name="b") == Config(name="b")
    with pytest.raises(InvalidNameError):
        msgspec.structs.replace(config, name="../b")


def test_a_config_decodes_from_json() -> None:
    """A config is decoded from JSON, and encodes to it."""
    config = msgspec.json.decode(b'{"name":"my-module","flush_interval":0,"stop_timeout":2.5}', type=Config)
    assert config == Config(name="my-module", flush_interval=0, stop_timeout=2.5)
    assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config
    assert msgspec.convert({"name": "a", "flush_interval": None}, Config) == Config(name="a", flush_interval=None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{}", "missing required field `name`"),
        (b'{"name":"a","flush_intervall":5}', "unknown field `flush_intervall`"),
        (b'{"name":1}', "Expected `str`, got `int` - at `$.name`"),
        (b'{"name":"a","stop_timeout":null}', "Expected `float`, got `null` - at `$.stop_timeout`"),
        (b'{"name":"a","flush_interval":"1"}', "Expected `float | null`, got `str` - at `$.flush_interval`"),
        (b'{"name":"../a"}', "Config.name '../a' is out of bounds"),
        (b'{"name":"a","flush_interval":-1}', "Config.flush_interval must be a finite number of seconds, 0 or more"),
        (b'{"name":"a","lock_timeout":-1}', "Config.lock_timeout must be a finite number of seconds, 0 or more"),
        (b'{"name":"a","stop_timeout":0}', "Config.stop_timeout must be above 0 seconds"),
    ],
)
def test_a_bad_config_does_not_decode(data: bytes, message: str) -> None:
    """A misspelt field, a wrong type and a value out of bounds are errors when decoding too."""
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(data, type=Config)
    assert message in str(caught.value)
