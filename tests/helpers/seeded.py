"""Bugs that a test puts into the library, as other text of a function. So the test proves that it can fail."""

from __future__ import annotations
import __future__

import contextlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest

Change = tuple[ModuleType | type, str, str, str]
"""The module or class of a function, its name, some text of it, and the text that takes its place."""


@contextlib.contextmanager
def put_in(changes: list[Change], names: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Replace functions during the block by what they would be with another text. `names` are more names that the text uses."""
    sources: dict[tuple[Any, str], str] = {}
    for owner, name, old, new in changes:
        source = sources.get((owner, name)) or inspect.getsource(getattr(owner, name))
        assert source.count(old) == 1, f"{old!r} is in {name} {source.count(old)} times: tell the bug anew"
        sources[owner, name] = source.replace(old, new)
    with pytest.MonkeyPatch.context() as patch:
        for (owner, name), source in sources.items():
            real = getattr(owner, name)
            module = inspect.getmodule(real)
            assert module is not None
            found: dict[str, Any] = {**vars(module), **(names or {})}
            flags = __future__.annotations.compiler_flag
            exec(compile(textwrap.dedent(source), f"<{name}, with a bug>", "exec", flags), found)
            for user in _users(owner, name, real):
                patch.setattr(user, name, found[name])
        yield


def _users(owner: ModuleType | type, name: str, real: object) -> list[Any]:
    """Return what has a function under its name: the class, or each module of the library."""
    if isinstance(owner, type):
        return [owner]
    modules = [module for key, module in list(sys.modules.items()) if key.startswith("lab_state")]
    return [module for module in modules if vars(module).get(name) is real]
