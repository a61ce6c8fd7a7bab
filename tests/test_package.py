"""The package as a whole: its names, its page on PyPI, what importing it costs, and which way its imports go."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from markdown_it import MarkdownIt

import lab_state
import lab_state.cache
import lab_state.exceptions
import lab_state.storage

PACKAGE = Path(inspect.getfile(lab_state)).parent

ROOT = Path(__file__).parents[1]
MAP = (ROOT / "docs" / "contributing.md").read_text()


def names_in(row: str) -> list[str]:
    """Return the modules that a row of the map names: `storage/_fs` is `storage._fs`, `storage/` is `storage`."""
    return [name.rstrip("/").replace("/", ".") for name in re.findall(r"`([^`]+)`", row)]


def layers_of(page: str) -> tuple[tuple[str, ...], ...]:
    """Return the layers of the map, from low to high."""
    layers: dict[int, list[str]] = {}
    for number, row in re.findall(r"^\| (\d+) \| (`[^|]+`) \|", page, re.MULTILINE):
        layers.setdefault(int(number), []).extend(names_in(row))
    assert list(layers) == list(range(1, len(layers) + 1)), "the layers of the map are in order, and none is left out"
    return tuple(map(tuple, layers.values()))


# From low to high. A room is a module, or a folder with all of its modules that have
# no layer of their own. A room imports only from lower layers. So no chain of imports is longer than the list.
LAYERS = layers_of(MAP)
MOST_LAYERS = 13

FILES = {"storage._fs", "storage._fs_read", "storage._fs_socket", "storage._directory", "storage._history_files"}
OPENS_AND_SYNCS = {
    "open",
    "fsync",
    "fdatasync",
    "replace",
    "rename",
    "renames",
    "truncate",
    "ftruncate",
    "pwrite",
    "write",
}


def module_names() -> list[str]:
    """Return every module, relative to the package: `storage._fs`; the package itself is `__init__`."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts))
    return found


MODULES = module_names()


def source_of(module: str) -> str:
    path = PACKAGE.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def imports_of(module: str) -> set[str]:
    """Return the modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source_of(module))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            # `from lab_state import _journal` means the module, not the package.
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            inside &= {f"lab_state.{name}" for name in MODULES}
            found |= inside or {str(node.module)}
    ours = {name for name in found if name.split(".")[0] == "lab_state"}
    return {name.removeprefix("lab_state").removeprefix(".") or "__init__" for name in ours}


def room_of(module: str) -> str:
    """Return the room that a module belongs to: its own, or that of the nearest folder around it."""
    named = {room for layer in LAYERS for room in layer}
    parts = module.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    found = [name for name in names if name in named]
    assert found, f"{module} has no layer: give it one in the map of docs/contributing.md"
    return found[0]


def layer_of(room: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if room in layer)


def calls_in(module: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(source_of(module))) if isinstance(node, ast.Call))


def run(code: str) -> Any:
    """Return what a fresh interpreter prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


# Names


@pytest.mark.parametrize("module", [lab_state, lab_state.cache, lab_state.storage], ids=lambda module: module.__name__)
def test_all_names_are_exported(module: ModuleType) -> None:
    """`__all__` has every public name, once, and nothing else."""
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert set(module.__all__) == public
    assert len(module.__all__) == len(set(module.__all__))


def test_all_errors_are_exported() -> None:
    """Every class of `exceptions` can be had from the package."""
    errors = {name for name, value in vars(lab_state.exceptions).items() if inspect.isclass(value)}
    assert errors <= set(lab_state.__all__)
    assert all(getattr(lab_state, name) is getattr(lab_state.exceptions, name) for name in errors)


def test_exports_are_grouped_and_sorted() -> None:
    """`__all__` is in groups, each under a comment and sorted."""
    listed = source_of("__init__").split("__all__ = [", 1)[1]
    groups = [re.findall(r'"(\w+)"', group) for group in re.split(r"\n    # [a-z, ]+\n", listed)[1:]]
    assert len(groups) >= 3
    assert all(group == sorted(group) and group for group in groups)
    assert list(itertools.chain(*groups)) == lab_state.__all__


def test_every_public_name_has_a_docstring() -> None:
    """Everything that the package exports says what it is."""
    assert [name for name in lab_state.__all__ if not getattr(lab_state, name).__doc__] == []


def test_star_import() -> None:
    """A star import gives every name of `__all__`, in a fresh interpreter, and no other."""
    code = "from lab_state import *\nimport json\nprint(json.dumps([n for n in dir() if not n.startswith('_')]))"
    assert sorted(run(code)) == sorted([*lab_state.__all__, "json"])


def test_the_version_is_that_of_the_project() -> None:
    """`lab_state.__version__` is the version in `pyproject.toml`, from which the distribution is built."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert lab_state.__version__ == project["version"]


# The page on PyPI


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """Return the metadata that the build writes into the wheel, from the build itself. It needs no network."""
    command = [sys.executable, "-m", "hatchling", "metadata"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def links_of(description: str) -> list[str]:
    """Return the targets of the links and images of a text in Markdown."""
    inline = [token for token in MarkdownIt().parse(description) if token.type == "inline"]
    parts = [part for token in inline for part in token.children or []]
    return [str(part.attrs[name]) for part in parts for name in ("href", "src") if name in part.attrs]


def relative(links: list[str]) -> list[str]:
    """Return the links that lead nowhere on PyPI."""
    return [link for link in links if not re.match(r"https://[\w.-]+/", link)]


def test_the_urls_of_the_project(metadata: dict[str, Any]) -> None:
    """PyPI shows links to the documentation, the repository, the changelog and the issues. The last two are parts of those."""
    urls = metadata["urls"]
    assert list(urls) == ["Documentation", "Repository", "Changelog", "Issues"]
    assert urls["Changelog"].startswith(f"{urls['Documentation']}/")
    assert urls["Issues"] == f"{urls['Repository']}/issues"


def test_the_description_has_no_relative_link(metadata: dict[str, Any]) -> None:
    """Each link and each image of the README is absolute on PyPI."""
    links = links_of(metadata["readme"]["text"])
    assert len(links) == len(links_of((ROOT / "README.md").read_text())) > 0
    assert relative(links) == []


def test_the_description_links_to_files_of_this_version(metadata: dict[str, Any]) -> None:
    """A link of the description leads to a page of docs/ on the site, or to a file in the repository at this version."""
    site = f"{metadata['urls']['Documentation']}/en/stable/"
    owner = metadata["urls"]["Repository"].removeprefix("https://github.com/")
    files = f"https://raw.githubusercontent.com/{owner}/v{lab_state.__version__}/"
    for link in links_of(metadata["readme"]["text"]):
        page = re.sub(r"\.html(#.*)?$", ".md", link.replace(site, "docs/"))
        assert (ROOT / page.replace(files, "")).is_file(), link


def test_a_relative_link_is_noticed() -> None:
    """Relative links and images are found in paragraphs, lists and references. Code has none."""
    text = "[a](b.md) ![c](d.svg) `[e](f)`\n\n* [g][h]\n* [i](https://x.org/j) [k](#l)\n\n[h]: LICENSE\n"
    assert relative(links_of(text)) == ["b.md", "d.svg", "LICENSE", "#l"]


# Imports


def test_importing_imports_nothing_optional() -> None:
    """`import lab_state` brings in no extra, no framework, and not what only tests need."""
    loaded = run("import lab_state, json, sys\nprint(json.dumps(sorted(sys.modules)))")
    assert "lab_state.manager" in loaded
    optional = {
        "aiobotocore",
        "aiohttp",
        "redis",
        "fastapi",
        "starlette",
        "litestar",
        "key_value",
        "prometheus_client",
        "pydantic",
        "anyio",
        "attrs",
        "click",
        "rich",
        "pytest",
    }
    assert optional & {name.split(".")[0] for name in loaded} == set()
    assert "lab_state.testing" not in loaded


@pytest.mark.parametrize("module", MODULES)
def test_every_module_can_be_imported_first(module: str) -> None:
    """Each module can be imported, and says what it is."""
    name = "lab_state" if module == "__init__" else f"lab_state.{module}"
    assert importlib.import_module(name).__doc__


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    """A module imports from its own folder and from the layers below, never from its own layer or from above."""
    room = room_of(module)
    rooms = {room_of(name) for name in imports_of(module)} - {room}
    assert {name for name in rooms if layer_of(name) >= layer_of(room)} == set()


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("storage")])
def test_a_storage_sees_no_key_and_no_value(module: str) -> None:
    """A storage gets bytes: it imports nothing that knows what is in them."""
    assert imports_of(module) & {"_arguments", "_codec", "_entries", "_state", "_types", "_values"} == set()


def test_the_chain_of_imports_is_short() -> None:
    """The layers are few, and with them the rooms of the longest chain of imports."""
    assert len(LAYERS) <= MOST_LAYERS


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("integrations.")])
def test_an_integration_imports_its_own_framework_alone(module: str) -> None:
    """Importing the module for one framework does not need another one."""
    frameworks = {"aiohttp", "fastapi", "key_value", "litestar", "prometheus_client", "starlette"}
    own = {
        module.removeprefix("integrations."),
        *{"fastapi": ["starlette"]}.get(module.removeprefix("integrations."), []),
    }
    own |= {"prometheus_client"} if module.endswith("prometheus") else set()
    blocked = sorted(frameworks - own)
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport lab_state.{module}\nprint('true')"
    assert run(code)


def test_imports_have_no_cycle() -> None:
    """Within a layer too, no module imports itself by way of another."""
    order = list(graphlib.TopologicalSorter({module: imports_of(module) for module in MODULES}).static_order())
    assert sorted(order) == sorted(MODULES)


def test_the_layers_name_rooms_that_exist() -> None:
    """No name is in two layers, and each is that of a module or a folder."""
    assert sorted(room for layer in LAYERS for room in layer) == sorted({room_of(module) for module in MODULES})


def test_the_map_names_each_module_once() -> None:
    """docs/contributing.md names every module: with its layer, or in the list of those in folders."""
    in_folders = re.findall(r"^\| (`[^|]+`) \|", MAP, re.MULTILINE)
    named = [name for layer in LAYERS for name in layer] + [name for row in in_folders for name in names_in(row)]
    assert sorted(named) == sorted(MODULES)


# Who may do what


@pytest.mark.parametrize("module", [module for module in MODULES if module not in FILES])
def test_only_fs_opens_and_syncs(module: str) -> None:
    """Only `storage/_fs.py` opens, writes, syncs or renames a file. Others read files, make directories and bind sockets."""
    found = []
    for call in calls_in(module):
        match call.func:
            case ast.Name("open"):
                found.append("open")
            case ast.Attribute(ast.Name("os" | "io" | "aiofiles" | "fcntl" as of), name) if (
                (of != "os" or name in OPENS_AND_SYNCS) and name != "BytesIO"  # no file, but memory
            ):
                found.append(f"{of}.{name}")
            case ast.Attribute(
                _, "read_bytes" | "read_text" | "write_bytes" | "write_text" | "unlink" | "mkdir" as name
            ):
                found.append(name)
            case _:
                pass
    for node in ast.walk(ast.parse(source_of(module))):
        if isinstance(node, ast.ImportFrom) and node.module in {"os", "io", "aiofiles", "fcntl", "shutil"}:
            found.extend(alias.name for alias in node.names)
    assert found == []


def test_fs_is_where_files_are_opened() -> None:
    """`storage/_fs.py` does open, sync and rename, so that the rule above is about something."""
    names = {call.func.attr for call in calls_in("storage._fs") if isinstance(call.func, ast.Attribute)}
    assert names >= {"open", "fsync", "fdatasync", "replace", "flock"}


def test_fs_read_changes_nothing() -> None:
    """`storage/_fs_read.py` has no call that changes a file, and no flag to open one with that would."""
    source = source_of("storage._fs_read")
    names = {call.func.attr for call in calls_in("storage._fs_read") if isinstance(call.func, ast.Attribute)}
    assert names & (OPENS_AND_SYNCS | {"flock", "unlink", "mkdir"}) == {"open"}
    assert set(re.findall(r"\bO_\w+", source)) == {"O_RDONLY", "O_NONBLOCK", "O_CLOEXEC"}


@pytest.mark.parametrize(
    "module",
    [module for module in MODULES if not module.startswith(("storage", "testing"))],
)
def test_only_the_flusher_writes_to_a_session(module: str) -> None:
    """Only `_flusher.py` commits and only `_checkpoints.py` checkpoints, so at most one of each is under way.

    `_copy.py` and `_restore.py` write one checkpoint, to a session that they open and close. `shared/_found.py` makes
    one commit, to settle what was loaded, before there is a flusher. So does `_migrations/_start.py`, for a migration.
    """
    names = {call.func.attr for call in calls_in(module) if isinstance(call.func, ast.Attribute)}
    allowed = {
        "_flusher": {"commit"},
        "_checkpoints": {"checkpoint"},
        "_copy": {"checkpoint"},
        "_restore": {"checkpoint"},
        "shared._found": {"commit"},
        "_migrations._start": {"commit"},
    }
    assert names & {"commit", "checkpoint"} == allowed.get(module, set())
