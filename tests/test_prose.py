"""The language of the package and its documentation: what `docs/contributing.md` asks for, as far as a test can hold it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "contributing.md"
MODULES = sorted((ROOT / "lab_state").rglob("*.py"))
OTHERS = [
    ROOT / "noxfile.py",
    *sorted((ROOT / "docs" / "examples").rglob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "docs" / "examples").rglob("*.py")),
]

# A name for the actor is missing where one of these stands: the caller, a writer, a process, the operator.
UNUSED = re.compile(
    r"\b(nobody|no[ -]one|somebody|someone|anybody|anyone|everybody|everyone|whoever|whomever|whosoever|any\s+more|anymore)\b",
    re.IGNORECASE,
)

# Ruff's D401 knows the wrong forms of some hundred verbs and some nouns. It accepts each word that it does not know,
# such as "Whether". So the verbs are listed here. A new one is added to the list.
VERB_LIST = """
abandon abort accept acknowledge acquire add adjust adopt advance allow announce answer append apply arm ask assert
assign attach await back become begin bind block bound break bring build cache call cancel change check choose claim
clean clear clip close collect combine commit compact compare complete compute configure confirm connect consume
continue convert copy correct count cover crash create cut damage deactivate decide declare decode decrease defer
define delay delete deliver depose describe detach detect determine die disable discard disconnect disown dispatch
distinguish divide do double download drain draw drop dump duplicate edit enable encode end enforce ensure enter erase
escape estimate evaluate evict exclude execute exit expand expect expire explain export extend extract fail fall
feed fence fetch fill filter find finish flip flush fold follow forget fork format forward free freeze gather
generate get give go group guard hand handle hash hear hide hold ignore import include increase increment indicate
inform inherit initialize insert inspect install interpret interrupt introduce invalidate invoke isolate iterate
join keep kill leave let limit link list listen live load locate lock log look loop lose lower make map mark match
measure merge migrate mirror mount move name narrow normalize note notice notify observe obtain offer open order
overwrite pack parse pass patch pause perform permit pick pin place plan poll pop postpone prefer prepare preserve
prevent print probe process produce propagate protect prove provide prune publish pull push put queue quote raise reach
read rebuild receive recognise recognize recompute reconnect record recover redo reduce refer refill refresh refuse
register reject relay release reload remember remove rename renew repair repeat replace replay reply report request
require reserve reset resolve respond restart restore resume retry return reuse reverse revert rewrite roll rotate
round run sample save say scan schedule search seek select send separate serialize serve set settle share shift show
shrink shut signal simulate skip sleep slice sort spell split spool spread stand start state step stop store strip
submit subscribe subtract suggest sum summarize supply suppress suspend swap sweep switch sync take tell terminate
test throttle time touch trace track transfer transform translate treat trigger trim truncate try turn undo unlink
unlock unmount unpack unregister unwrap update upgrade upload use validate verify visit wait wake walk warn watch
withdraw work wrap write yield
"""
VERBS = frozenset(VERB_LIST.split())
# A sentence that begins with one of these has no main clause: "What a commit makes durable."
RELATIVE = {"how", "what", "whatever", "when", "where", "whether", "which", "who", "whose"}
PROPERTIES = {"property", "cached_property", "abstractproperty", "setter", "getter", "deleter"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def decorators_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Return the last names of the decorators: `x.setter` gives `setter`."""
    found = set()
    for decorator in function.decorator_list:
        bare = decorator.func if isinstance(decorator, ast.Call) else decorator
        found.add(bare.attr if isinstance(bare, ast.Attribute) else bare.id if isinstance(bare, ast.Name) else "")
    return found


def first_lines(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and first line of each function's docstring, without properties and tests.

    A property is described as an attribute is, and a test states a fact. Ruff's D401 leaves them out, too.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not node.name.startswith("test_"):
                docstring = ast.get_docstring(node)
                if docstring and not decorators_of(node) & PROPERTIES:
                    yield node.body[0].lineno, docstring.partition("\n")[0]
            case _:
                pass


def is_imperative(line: str) -> bool:
    """Return whether a line begins with a verb of the list. "Name of the state" does not: a noun comes before "of"."""
    words = line.split()
    return words[0].rstrip(".,;:").lower() in VERBS and words[1:2] != ["of"]


def without_examples(page: Path) -> str:
    """Return the text of a page. The section of the style guide is left out: it shows what is not written."""
    text = page.read_text()
    return re.sub(r"^## Style\n.*?(?=^## )", "", text, flags=re.DOTALL | re.MULTILINE) if page == GUIDE else text


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_docstrings_of_functions_begin_with_a_verb(module: Path) -> None:
    """The docstring of each function, private and nested ones too, begins with an imperative verb."""
    found = [
        f"{module}:{number}: {line}" for number, line in first_lines(module.read_text()) if not is_imperative(line)
    ]
    assert found == []


def test_docstrings_of_other_functions_begin_with_a_verb() -> None:
    """So do those of the helpers of the tests, the examples and the sessions of nox."""
    found = {f"{path}:{number}": line for path in OTHERS for number, line in first_lines(path.read_text())}
    assert {where: line for where, line in found.items() if not is_imperative(line)} == {}


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_docstrings_of_classes_and_modules_say_what_they_are(module: Path) -> None:
    """The docstring of a class or a module does not begin with a relative word."""
    parts = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Module | ast.ClassDef)]
    lines = [(ast.get_docstring(part) or "-").partition("\n")[0] for part in parts]
    assert [line for line in lines if line.split()[0].rstrip(".,;:").lower() in RELATIVE] == []


@pytest.mark.parametrize("file", [*MODULES, *PAGES], ids=name_of)
def test_words_that_are_not_used(file: Path) -> None:
    """A sentence names who acts: a caller, a writer, a process. It does not say "nobody" or "whoever"."""
    text = without_examples(file)
    found = [f"{file}: ...{text[max(0, m.start() - 40) : m.end() + 20]!r}" for m in UNUSED.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    ("line", "good"),
    [
        ("Return the keys.", True),
        ("Begin; a second call waits.", True),
        ("Let go of the lock.", True),
        ("Returns the keys.", False),
        ("Whether a key is there.", False),
        ("A key is gone.", False),
        ("`set` with a time.", False),
        ("Name of the state.", False),
        ("Closing the file.", False),
    ],
)
def test_the_rule_for_verbs(line: str, *, good: bool) -> None:
    """An imperative verb passes; another form of it, a noun, an article and a piece of code do not."""
    assert is_imperative(line) is good


def test_the_rule_looks_at_private_and_nested_functions() -> None:
    """Private, nested and asynchronous functions and methods are looked at; classes, properties and tests are not."""
    source = '''"""Module."""
class A:
    """Class."""
    @property
    def b(self):
        """Property."""
    @b.setter
    def b(self, value):
        """Setter."""
    async def _c(self):
        """Method."""
        def d():
            """Nested."""
def e(): ...
def test_f():
    """Fact."""
'''
    assert [line for _, line in first_lines(source)] == ["Method.", "Nested."]


def test_the_glossary_is_sorted() -> None:
    """The words of the glossary are in alphabetical order, each is there once, and each has a definition of whole sentences."""
    entries = re.findall(r"^(\S.*)\n: ((?:.+\n)+)", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    words = [word for word, _ in entries]
    assert len(words) > 20
    assert words == sorted(set(words))
    assert [word for word, text in entries if not text.rstrip().endswith(".")] == []
