"""The page of the command: each of its examples runs, and prints what the page shows."""

from __future__ import annotations

import asyncio
import re
import shlex
from pathlib import Path

from command import command

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
APPLICATION = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CHANGING = (
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


async def test_the_examples_print_what_the_page_shows(tmp_path: Path) -> None:
    """Each command of the page prints what stands below it."""
    (tmp_path / "prices.json").write_text('{"price/apple": 3, "price/pear": 4}')
    page = ROOT / "docs" / "command.md"
    (tmp_path / "app.py").write_text("".join(APPLICATION.findall(page.read_text())))
    shown = examples(page)
    assert len(shown) > 15
    for line, expected in shown:
        words, given = shlex.split(line), b""
        assert words[0] == "lab-state"
        if "<" in words:
            at = words.index("<")
            given, words = (tmp_path / words[at + 1]).read_bytes(), words[:at]
        done = await asyncio.to_thread(command, *words[1:], cwd=tmp_path, given=given)
        assert settled(done.out + done.err) == settled(expected), line
