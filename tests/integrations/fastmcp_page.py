"""FastMCP's page against FastMCP. `nox -s fastmcp` runs it, because the 60 packages are for no other test."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "fastmcp.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
KEY = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
CLIENT = {"redirect_uris": ["http://localhost:1234/callback"], "client_name": "a client"}


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the first program of the page under uvicorn; it is gone at the end."""
    (directory / "app.py").write_text(BLOCKS[0])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "uvicorn", "app:app", "--port", "0", "--app-dir", str(directory),
        cwd=directory,
        env={**os.environ, "MCP_KEY": KEY, "PYTHONUNBUFFERED": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def url_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    said = b""
    async for line in process.stdout:
        said += line
        if match := re.search(rb"unning on (http://127\.0\.0\.1:[1-9]\d*)", line):
            return match[1].decode()
    raise AssertionError(said.decode())


async def authorize(http: httpx2.AsyncClient, client: str) -> int:
    """Return the status of a registered client's request to log in."""
    asked = {
        "client_id": client,
        "redirect_uri": CLIENT["redirect_uris"][0],
        "response_type": "code",
        "code_challenge": "c" * 43,
        "code_challenge_method": "S256",
        "state": "s",
    }
    return (await http.get("/authorize", params=asked)).status_code


async def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of the page run one after the other, and the second client's answer comes from the cache."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for source in BLOCKS:
        code = compile(source, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        result: Any = eval(code, vars(module))
        if inspect.isawaitable(result):
            await result


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
async def test_a_registered_client_is_known_after_a_restart(tmp_path: Path, how: signal.Signals) -> None:
    """After any end of the server, a registered client may log in, and an unknown one may not."""
    async with served(tmp_path) as process, httpx2.AsyncClient(base_url=await url_of(process)) as http:
        answer = await http.post("/register", json=CLIENT)
        assert answer.status_code == 201, answer.text
        client = answer.json()["client_id"]
        assert await authorize(http, client) == 302
        process.send_signal(how)
        await process.wait()
    async with served(tmp_path) as process, httpx2.AsyncClient(base_url=await url_of(process)) as http:
        assert await authorize(http, client) == 302
        assert await authorize(http, "a stranger") == 400
        assert (await http.get("/health")).status_code == 200
    files = b"".join(path.read_bytes() for path in (tmp_path / "state/modules").iterdir())
    assert client.encode() in files
    assert b"/callback" not in files


async def test_a_second_process_is_told_who_has_the_state(tmp_path: Path) -> None:
    """A second process ends, and the last line of the traceback names the process that has the state."""
    async with served(tmp_path) as first:
        await url_of(first)
        async with served(tmp_path) as second:
            said, _ = await second.communicate()
    last = [line for line in said.decode().splitlines() if "LockedError: " in line][-1]
    assert f"mcp.lock is locked by pid {first.pid} " in last
