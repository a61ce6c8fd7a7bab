"""The Python and the redis-cli commands of docs/cache.md run."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mirrored import mirror_of

from lab_state import Config, Manager, MemoryStorage, RedisCache

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cache.md"


def _import_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_runner", ROOT / "tests" / "test_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = _import_runner()  # not on the event loop: it reads files


async def test_the_page_runs(redis_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's Python runs as it stands, with Redis where its environment says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    await runner.run(PAGE)


def output(command: str) -> str:
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout


async def test_redis_cli_reads_it(redis_server: Any, until: Any) -> None:
    """The redis-cli commands of the page print what it says."""
    beside = Path(redis_server.executable).with_name("redis-cli")
    cli = str(beside) if beside.exists() else shutil.which("redis-cli")
    assert cli is not None
    commands = re.search(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert commands is not None
    state = Manager(Config(name="jobs", flush_interval=0), MemoryStorage(), RedisCache(redis_server.url))
    async with state:
        await state.set("job/1", {"state": "waiting"})
        await until(lambda: mirror_of(state).revision == 1)
        said = []
        for line in commands[1].splitlines():
            command = line.replace("redis-cli", f"{cli} -p {redis_server.port}")
            said.append(await asyncio.to_thread(output, command))
    assert said[0] == '{"state":"waiting"}\n'
    assert said[1].startswith('{"format":1,"revision":1,"writer":"')
    assert said[2].splitlines()[0] == said[1].splitlines()[0]
    assert said[3] == "2\n"
