"""The pages of docs/ as one site: its links, its menus, its reference, and what a search finds."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CODE = re.compile(r"^(`{3,})(?!\{toctree\}).*?^\1$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
MENU = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"^\.\. (?:auto)?(?:class|function|data):: (\S+)$", re.MULTILINE)
DEPTH = 3
"""Headings of this level and above have an anchor: `myst_heading_anchors` of docs/conf.py."""
PUBLIC = [
    "lab_state",
    "lab_state.cache",
    "lab_state.storage",
    "lab_state.testing",
    *(
        f"lab_state.integrations.{name}"
        for name in ("aiohttp", "fastapi", "key_value", "litestar", "prometheus", "starlette")
    ),
]
SEARCHES = {
    "multiple workers": "workers.md",
    "flask": "threads.md",
    "pagination": "handles.md",
    "backup": "how-to/backup.md",
    "migration": "errors.md",
    "expire": "expiry.md",
    "cron": "workers.md",
    "retries": "how-to/job-queue.md",
    "background task": "fastapi.md",
    "schema": "errors.md",
    "upgrade": "errors.md",
    "performance": "benchmarks.md",
    "license": "index.md",
    "type hint": "handles.md",
    "unit test": "testing.md",
    "counter": "tutorial.md",
}
"""What a newcomer searches for, and the page that answers."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and Sphinx make them."""
    seen: Counter[str] = Counter()
    found = set()
    text = re.sub(r"^(`{3,}).*?^\1$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for marks, title in HEADING.findall(text):
        title = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        if len(marks) <= DEPTH:
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(page: Path) -> list[str]:
    """Return the links of a page that lead to no file, or to no heading of that file."""
    found = []
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        there = target.is_file() and (not anchor or anchor in anchors_of(target))
        if not there:
            found.append(link)
    return found


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name_of)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    """A link to a page, a heading or an image names one that is there."""
    assert broken(page) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    """A link to a missing page, heading or image is found; a link within code is none."""
    page = tmp_path / "page.md"
    page.write_text("# One `two`\n[a](#one-two) [b](#three) [c](no.md) ![d](no.svg) [e](page.md#four) `[f](no.md)`\n")
    assert broken(page) == ["#three", "no.md", "no.svg", "page.md#four"]


def test_the_tutorial_is_the_first_link_of_the_readme() -> None:
    """A newcomer who follows the first link of the README begins with the tutorial, there and in its list of links."""
    text = (ROOT / "README.md").read_text()
    assert LINK.findall(CODE.sub("", text))[0] == "docs/tutorial.md"
    assert LINK.findall(text.split("## More\n")[1])[0] == "docs/tutorial.md"


def entries_of(page: Path) -> list[Path]:
    """Return the pages in the menus of a page."""
    lines = [line.strip() for menu in MENU.findall(page.read_text()) for line in menu.splitlines()]
    entries = [re.sub(r".*<(.+)>", r"\1", line) for line in lines if line and not line.startswith(":")]
    return [(page.parent / f"{entry}.md").resolve() for entry in entries]


def test_each_page_is_in_one_menu() -> None:
    """Every page is in exactly one menu, and a menu has no other entry. Only the first page is in none."""
    entries = [entry for page in PAGES for entry in entries_of(page)]
    assert sorted(entries) == sorted(page for page in PAGES if page != DOCS / "index.md")


def test_the_menus_of_the_first_page() -> None:
    """The sidebar has these captions, in this order."""
    captions = re.findall(r"^:caption: (.+)$", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert captions == ["Tutorial", "How-to", "Coming from", "Reference", "Design"]


def canonical(name: str) -> str:
    """Return the name under which a class or a function was defined: a name may be exported by several modules."""
    module, _, attribute = name.rpartition(".")
    value: Any = getattr(importlib.import_module(module), attribute)
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    return name


def test_each_public_name_is_on_one_reference_page() -> None:
    """Every public name is on exactly one page of the reference, once, and the reference has no other."""
    public = {
        canonical(f"{module}.{name}") for module in PUBLIC for name in importlib.import_module(module).__all__
    } | {"lab_state.__version__"}
    pages = [*sorted((DOCS / "reference").glob("*.md")), DOCS / "errors.md"]
    documented = [canonical(name) for page in pages for name in NAMED.findall(page.read_text())]
    assert sorted(documented) == sorted(public)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "reference"], ids=name_of)
def test_other_pages_define_no_name(page: Path) -> None:
    """Only the reference describes names, so that a link to a name has one target."""
    assert page.name == "errors.md" or NAMED.findall(page.read_text()) == []


@pytest.mark.parametrize(("words", "page"), SEARCHES.items())
def test_a_search_finds_the_page_that_answers(words: str, page: str) -> None:
    """The page that answers has each word of the search. The search of the site finds no page without them."""
    text = (DOCS / page).read_text().lower()
    assert [word for word in words.split() if not re.search(rf"\b{word}", text)] == []
