"""README.md, the notes and the weeks' READMEs: what they link to, name and show is there.

A link to a file must find it inside the repository. A link to a Python file whose text is a name
(`attention_weights`, `MultiHeadAttention.project`, `test_equals_torch`) must find the name there.
The Python blocks are run by conftest.py at the root; here it is checked that they are.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("notes/*.md")),
    *sorted(ROOT.glob("weeks/*/README.md")),
]

# In this order: what stands in a fence or between backticks is no link.
PIECE = re.compile(
    r"^[ ]*(?P<fence>`{3,}|~{3,})(?P<language>[^\n]*)\n.*?^[ ]*(?P=fence)[ ]*$"
    r"|(?:\[(?P<text>[^\[\]]*))?\]\((?P<target>[^()\s]+)[^()\n]*\)"
    r'|<(?:a|img)\b[^>]*?(?:href|src)="(?P<attribute>[^"]+)"'
    r"|`[^`\n]*`",
    re.MULTILINE | re.DOTALL,
)
NAME = re.compile(r"`(?P<symbol>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)`|(?P<test>test_\w+)")


def complaints(page: Path, root: Path) -> list[str]:
    """A sentence for everything on the page that points at nothing."""
    text = page.read_text(encoding="utf-8")
    found = []
    for piece in PIECE.finditer(text):
        if target := piece["target"] or piece["attribute"]:
            found += wrong_with_link(piece["text"] or "", target, page, root)
        language = piece["language"] or ""
        if language.strip().lower().startswith("py") and language != "python":
            found.append(f"```{language} is not ```python: nobody would run the block")
    return found


def wrong_with_link(text: str, target: str, page: Path, root: Path) -> Iterator[str]:
    """At most one sentence: what is wrong with `[text](target)`."""
    path = unquote(target.partition("#")[0])
    if re.match(r"[a-z]+:", target) or not path:  # the web, or a heading of this page
        return
    file = (page.parent / path).resolve()
    if not file.is_relative_to(root.resolve()):
        yield f"{target} lies outside the repository"
    elif not file.exists():
        yield f"{target} does not exist"
    elif file.suffix == ".py" and (name := NAME.fullmatch(text)) and text.strip("`") != file.name:
        wanted = name["symbol"] or name["test"]
        if wanted not in defined(file):
            yield f"{target} does not define {wanted}"


def defined(file: Path) -> set[str]:
    """What a Python file defines at its top level and, as Class.member, in its classes."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        names |= names_of(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for inner in node.body for name in names_of(inner)}
    return names


def names_of(node: ast.stmt) -> set[str]:
    """The names that one statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    flat = (name for target in targets if target for name in ast.walk(target))
    return {name.id for name in flat if isinstance(name, ast.Name)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_everything_a_document_points_at_is_there(page):
    assert complaints(page, ROOT) == []


@pytest.fixture
def repository(tmp_path):
    """A small repository with one implementation, one test, one note, and our conftest.py."""
    for path, text in {
        "implementations/idea.py": "LIMIT: int = 3\nA, B = 1, 2\nclass Layer:\n"
        "    size = 4\n    def forward(self):\n        inside = 1\n",
        "tests/test_idea.py": "def test_it_holds():\n    pass\n",
        "notes/a note.md": "",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    shutil.copy(ROOT / "conftest.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def write(repository: Path, text: str, path: str = "notes/page.md") -> Path:
    page = repository / path
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    return page


BAD = {
    "a lost file": ("[it](../gone.md)", "../gone.md does not exist"),
    "a lost heading's file": ("[it](gone.md#step-3)", "gone.md#step-3 does not exist"),
    "a lost picture": ("![it](gone.png)", "gone.png does not exist"),
    "a lost linked picture": ("[![it](a%20note.md)](gone.md)", "gone.md does not exist"),
    "a lost tag": ('<img width="9" src="gone.png">', "gone.png does not exist"),
    "a title beside it": ('[it](gone.md "a title")', "gone.md does not exist"),
    "after code": ("`x` is [`y`](gone.md)", "gone.md does not exist"),
    "after a fence": ("```text\n[a](b)\n```\n[it](gone.md)", "gone.md does not exist"),
    "a way out": ("[it](../../tests)", "../../tests lies outside the repository"),
    "a lost symbol": (
        "[`forward`](../implementations/idea.py)",
        "../implementations/idea.py does not define forward",
    ),
    "a lost method": (
        "[`Layer.inside`](../implementations/idea.py)",
        "../implementations/idea.py does not define Layer.inside",
    ),
    "a lost test": (
        "[`test_it`](../tests/test_idea.py)",
        "../tests/test_idea.py does not define test_it",
    ),
    "a lost test without backticks": (
        "[test_it](../tests/test_idea.py)",
        "../tests/test_idea.py does not define test_it",
    ),
    "a block that is not run": (
        "```py\n1 / 0\n```",
        "```py is not ```python: nobody would run the block",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_is_noticed(repository, name):
    text, sentence = BAD[name]
    assert complaints(write(repository, text), repository) == [sentence]


def test_a_good_document_is_left_alone(repository):
    """Every kind of link that resolves, links to elsewhere, and code that looks like a link."""
    page = write(
        repository,
        "[web](https://nowhere.invalid) [mail](mailto:a@b.c) [here](#heading) `x[0](y)`\n"
        "[note](a%20note.md) [folder](../tests) [file](../implementations/idea.py#L3)\n"
        "[`idea.py`](../implementations/idea.py) [`LIMIT`](../implementations/idea.py)\n"
        "[`Layer`](../implementations/idea.py) [`Layer.forward`](../implementations/idea.py)\n"
        "[`Layer.size`](../implementations/idea.py) [`B`](../implementations/idea.py)\n"
        "[`test_it_holds`](../tests/test_idea.py) [any words](../tests/test_idea.py)\n"
        "```python\ntable[0](row)\n```\n",
    )
    assert complaints(page, repository) == []


def run_pytest(repository: Path, *arguments: str) -> str:
    """What pytest says in the small repository, in a process of its own."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=repository, env=clean, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_every_block_is_run_and_no_script_is(repository):
    """A false claim fails wherever it stands; names are shared in a document, and only there."""
    write(repository, "```python\nassert 1 + 1 == 3\n```\n", "README.md")
    write(repository, "```python\nx = 1\n```\n\n```python\nassert x == 1\n```\n", "notes/a.md")
    write(repository, "```python\nassert x == 1\n```\n", "notes/b.md")
    write(repository, "```python\nassert not 1\n```\n", "weeks/01_idea/README.md")
    write(repository, "1 / 0\n", "weeks/01_idea/two_sample_test.py")
    said = run_pytest(repository)
    assert "3 failed, 3 passed" in said, said
    for line in (
        "FAILED README.md::line:1",
        "PASSED notes/a.md::line:5",
        "FAILED notes/b.md::line:1,column:1 - NameError",
        "FAILED weeks/01_idea/README.md::line:1",
    ):
        assert line in said, said
    assert "two_sample_test" not in said


def test_a_block_alone_runs_those_above_it(repository):
    write(repository, "```python\nx = 1\n```\n\n```python\nassert x == 1\n```\n", "notes/a.md")
    assert "1 passed" in run_pytest(repository, "notes/a.md::line:5,column:1")
