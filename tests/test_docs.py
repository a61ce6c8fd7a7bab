"""Every Python block of the README and of docs/ runs, in order, and the applications in docs/examples work."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
from aiohttp.test_utils import TestServer
from fastapi.testclient import TestClient
from s3_world import client, endpoint

from lab_state import FileStorage, read_state

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if "```python" in page.read_text())
# An import reads files: not on the event loop that the blocks run on.
for integration in ("aiohttp", "fastapi", "key_value", "litestar", "prometheus", "starlette"):
    importlib.import_module(f"lab_state.integrations.{integration}")
PAGES = [page for page in PAGES if page.parent.name not in {"how-to", "coming-from"}]  # tests/test_recipes.py runs them
PAGES.remove(ROOT / "docs" / "cache.md")  # tests/cache runs it, where there is a Redis
PAGES.remove(ROOT / "docs" / "fastmcp.md")  # `nox -s fastmcp` runs it
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def sources(page: Path) -> list[str]:
    """Return the blocks of a page, each with a blank line at its end."""
    return [f"{source}\n" for source in BLOCK.findall(page.read_text())]


def blocks(page: Path) -> list[CodeType]:
    """Return the blocks of a page, each compiled at its own line."""
    found = []
    for match in BLOCK.finditer(page.read_text()):
        line = page.read_text()[: match.start(1)].count("\n")
        code = compile(
            "\n" * line + match[1], str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
        )
        found.append(code)
    return found


async def run(page: Path) -> Any:
    """Run the blocks of a page, and return a module with the names that they define."""
    module = ModuleType("docs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "docs", module)  # where Litestar looks up what annotations name
        for code in blocks(page):
            result = eval(code, vars(module))
            if inspect.isawaitable(result):
                await result
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
async def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks run one after the other in an empty directory, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    if page.name == "s3.md":
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint())
        client().create_bucket(Bucket="my-bucket")
    await run(page)


@pytest.mark.parametrize("name", ["fastapi", "aiohttp"])
async def test_background_tasks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The background task of a page runs while the application does, uses the manager, and lets it stop."""
    monkeypatch.chdir(tmp_path)
    page = await run(ROOT / "docs" / f"{name}.md")
    if name == "fastapi":
        state, serving = page.pages, page.counted.router.lifespan_context(page.counted)
    else:
        state, serving = page.manager(page.counted), TestServer(page.counted)
    async with serving, state.watch("pages") as changes:
        if "pages" not in state:
            await anext(changes)
    view = await read_state("my-pages", FileStorage("state/modules"))
    assert await view.get("pages") > 0


async def test_readme_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The comments beside the README's prints are true."""
    monkeypatch.chdir(tmp_path)
    await run(ROOT / "README.md")
    assert capsys.readouterr().out.splitlines() == [
        "{'text': 'hi', 'to': ['world']}",
        "2026 None",
        "key 'ann': not a `User`: Object missing required field `seen` - at `$`",
        "Change(key='ann', kind='set', revision=4)",
    ]
    content = (tmp_path / "state/modules/my-module.json").read_text()
    assert content.startswith('{"greeting":{"text":"hi","to":["world"]},"visits":1,"$lab_state":{')


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="its asyncio REPL takes blocks from a terminal alone")
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_blocks_can_be_pasted(page: str, tmp_path: Path) -> None:
    """What a page says can be typed into `python -m asyncio` can: no blank line within a block, one behind it."""
    text = "".join(source for source in sources(ROOT / page) if "FastAPI" not in source)
    asked = subprocess.run(
        [sys.executable, "-m", "asyncio"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=60,
    )
    assert asked.returncode == 0
    assert "Error" not in asked.stderr.replace("TypeMismatchError", "").replace("InvalidValueError", "")
    assert "Traceback" not in asked.stderr


def test_readme_application_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's FastAPI application counts, and goes on counting after a restart."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}
    code = next(code for code in blocks(ROOT / "README.md") if "FastAPI" in code.co_names)
    exec(code, names)
    for expected in (1, 2, 3):
        with TestClient(names["app"]) as client:
            assert client.post("/visits/home").json() == expected
