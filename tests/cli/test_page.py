"""The page of the command: each of its examples runs, and prints what the page shows."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from time import time

from command import command, start
from commanded import World, script

from lab_state import Config, FileStorage, Manager
from lab_state.cli._app import cli
from lab_state.testing import ManualClock

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
APPLICATION = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CHANGING = (
    (re.compile(r"^(?:ok|LOOK) +(directory|file system|room): .*$", re.MULTILINE), r"\1"),
    (re.compile(r"^(?:ok|LOOK) +(\S+): owner .*$", re.MULTILINE), r"\1"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z"), "TIME"),
    (re.compile(r'"(wall|expires|next|first_wall|last_wall)":\d{13}'), r'"\1":0'),
    (re.compile(r"\b\d+\.\d{3} s\b"), "SECONDS"),
    (re.compile(r"\b\d+s\b"), "AGE"),
    (re.compile(r" +"), " "),
    (re.compile(r"\bpid \d+ on [\w.:?-]+, since [\d:T+-]+"), "HOLDER"),
)


def examples(page: Path) -> list[tuple[str, str]]:
    """Return the commands of a page, each with the output that the page shows."""
    found = []
    for block in BLOCK.findall(page.read_text()):
        for part in block.removeprefix("$ ").split("\n$ "):
            line, _, shown = part.partition("\n")
            found.append((line, shown))
    return found


def settled(text: str) -> str:
    """Return an output without what differs from run to run."""
    for pattern, word in CHANGING:
        text = pattern.sub(word, text)
    return text.strip()


@asynccontextmanager
async def program(directory: Path) -> AsyncGenerator[Manager]:
    """Run the program of the page, which has `live/shop` open."""
    async with Manager(Config(name="shop", flush_interval=0), FileStorage(directory / "live")) as state:
        await state.set_many({"stock/apple": 12, "stock/pear": {"n": 3}})
        await state.set("cart/ann", ["apple"], ttl=3600)
        yield state


async def watched(words: list[str], directory: Path, state: Manager) -> str:
    """Run `watch` until it has printed one change, which the program makes meanwhile. Return what the terminal would show."""
    run = await asyncio.to_thread(start, *words, cwd=directory)
    said = await asyncio.to_thread(run.stderr.readline)
    await state.set("stock/apple", 11)
    said += await asyncio.to_thread(run.stdout.readline)
    run.kill(signal.SIGINT)
    done = await asyncio.to_thread(run.wait)
    assert (done.code, done.out, done.err) == (130, "", "")
    return f"{said.decode()}^C"


async def test_the_examples_print_what_the_page_shows(tmp_path: Path) -> None:
    """Each command of the page prints what stands below it."""
    async with program(tmp_path) as state:
        await run_examples(tmp_path, state)


async def run_examples(tmp_path: Path, state: Manager) -> None:
    (tmp_path / "prices.json").write_text('{"price/apple": 3, "price/pear": 4}')
    page = ROOT / "docs" / "command.md"
    (tmp_path / "app.py").write_text("".join(APPLICATION.findall(page.read_text())))
    shown = examples(page)
    assert {name for line, _ in shown for name in shlex.split(line) if name in cli.commands} == set(cli.commands) - {
        "inspect"
    }
    for line, expected in shown:
        words, given, env = shlex.split(line), b"", dict[str, str]()
        if words[0] != "lab-state":
            name, _, value = words.pop(0).partition("=")
            env[name] = value
        assert words[0] == "lab-state"
        if "<" in words:
            at = words.index("<")
            given, words = (tmp_path / words[at + 1]).read_bytes(), words[:at]
        if words[1] == "watch":
            assert settled(await watched(words[1:], tmp_path, state)) == settled(expected)
            continue
        done = await asyncio.to_thread(command, *words[1:], cwd=tmp_path, given=given, env=env)
        assert settled(done.out + done.err) == settled(expected), line


async def test_each_question_of_an_operator_is_answered(tmp_path: Path) -> None:
    """Each command that docs/operations.md gives for a question answers it as it stands, while the program runs."""
    section = (
        (ROOT / "docs" / "operations.md").read_text().partition("## Questions from a shell")[2].partition("\n## ")[0]
    )
    lines = set(re.findall("`lab-state (.+?)`", section)) - {"restore", "watch state/shop"}  # others try out these two
    config, storage = Config(name="shop", flush_interval=0), FileStorage(tmp_path / "state", history=86400)
    answers: dict[str, str] = {}
    async with Manager(config, storage, clock=ManualClock(time() - 7200)) as state:
        await state.set_many({"stock/apple": 12, "stock/pear": 3})
        (tmp_path / "backups").mkdir()
        await state.backup(tmp_path / "backups" / "shop.json")
        await state.set("stock/apple", 11)
        for line in lines:
            done = await asyncio.to_thread(command, *shlex.split(line), cwd=tmp_path)
            assert (done.code, done.err) == (int(line.startswith("diff")), ""), (line, done)
            answers[line] = done.out
    assert len(answers) == 9
    assert f"pid {os.getpid()} " in answers["ls state"]
    assert answers["get state/shop stock/apple"] == answers["--at 1h get state/shop stock/apple"] == "11\n"
    assert answers["diff backups/shop.json state/shop"] == "~ stock/apple  12 -> 11\n"
    assert len(answers["history state/shop stock/apple"].splitlines()) == 2


MOMENT = {"live", "revision", "durable_revision", "wall"}
ROW = re.compile(r"^\| (`(?:[^|]|\n)+?`) \| (.+) \|$", re.MULTILINE)


def documented() -> dict[str, set[str]]:
    """Return the members that the table of the page gives for each output."""
    page = (ROOT / "docs" / "command.md").read_text()
    table = page.partition("| output | members |")[2].partition("\n\n")[0]
    found: dict[str, set[str]] = {}
    for outputs, members in ROW.findall(table):
        names = set(re.findall(r"`([a-z_]+)`", re.split(r"[:;]", members)[0])) - {"null"}
        if "and the moment" in members:
            names |= MOMENT
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", outputs), names)
    return found


async def test_the_page_has_all_members_of_each_json(tmp_path: Path) -> None:
    """Each output has the documented members and no other. An object begins with its format. Each output is tried, except for `watch`."""
    world = World("stopped", tmp_path)
    (tmp_path / "app.py").write_text(SCHEMAS)
    async with Manager("shop", FileStorage(tmp_path / "state", history=1000)) as state:
        await state.set_many({"stock/apple": 12, "stock/pear": 3})
    env = {"EDITOR": script(tmp_path / "editor", 'echo 7 > "$1"')}
    shop, line = world.state, '{"key":"a","value":1}\n'
    runs = {
        "get --json": (shop, "stock/apple"),
        "keys --json": (shop,),
        "keys --nl": (shop,),
        "keys --tree --nl": (shop,),
        "dump --nl": (shop,),
        "stats --json": (shop,),
        "verify --json": (shop,),
        "backup --json": (shop, "backup.json"),
        "set --json": (shop, "stock/apple", "13"),
        "edit --json": (shop, "stock/pear"),
        "diff --nl": ("backup.json", shop),
        "delete --json": (shop, "stock/pear"),
        "load --json": (shop, "--nl"),
        "ls --nl": (world.place,),
        "history --json": (shop,),
        "history --nl": (shop,),
        "history KEY --nl": (shop, "a"),
        "tail --nl": (shop, "--since", "r0"),
        "copy --json": (shop, "other/shop"),
        "restore --dry-run --json": (shop, "--at", "r2", "--into", "shop"),
        "restore --json": (shop, "--at", "r2", "--into", "shop"),
        "repair --json": (shop,),
        "doctor --json": (shop,),
        "migrate --dry-run --json": ("app:schema", shop),
        "check --nl": ("app:typed", shop),
        "migrate --json": ("app:schema", shop),
    }
    pages = documented()
    assert pages.keys() == runs.keys() | {"watch --nl"}
    for name, arguments in runs.items():
        words = [word for word in name.split() if word != "KEY"]
        done = await world.run(words[0], *words[1:], *arguments, given=line, env=env)
        assert done.code in {0, 1}, (name, done)
        members = pages[name]
        if "--json" in words:
            found: dict[str, object] = done.json
            assert next(iter(found.items())) == ("format", 1), name
            assert found.keys() - {"format"} == members, name
        elif members:
            seen = set().union(*(line.keys() for line in done.lines))
            assert seen == members, (name, done)
        else:
            assert all(isinstance(json.loads(line), str) for line in done.out.splitlines()), name


SCHEMAS = """
from lab_state import Schema
schema = Schema(2)
@schema.migration(to=2)
def nothing(draft):
    draft.set("b", 1)
typed = Schema(1, types={"stock/": str})
"""
