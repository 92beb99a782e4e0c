"""The house rules that a reader relies on: names, imports that point one way, docstrings, folders.

Files are parsed, never imported. Each rule is a function of a root folder that returns sentences;
each is also shown a made-up house that breaks it.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "implementations"
TAKEN = (set(sys.stdlib_module_names) | set(packages_distributions())) - {PACKAGE}
BACKENDS = ("_triton", "_hopper", "_hopper_forward", "_hopper_backward", "_jax")
# What a file of a folder may import of the package, outside its main(); other folders are free.
MAY_IMPORT = {
    "lab": {"lab", "sources"},
    "sources": {"lab", "sources"},
    "attention_basic": {"lab"},
    "layers": {"attention_basic", "attention", "layers", "lab"},
}


class Import(NamedTuple):
    """One imported module, as written."""

    module: str
    function: str | None
    """the outermost function or class it stands in; None at module level"""
    form: str
    """from, import, relative or by name (a string, as in importorskip)"""


def imports(path: Path) -> list[Import]:
    """Every import of a file, wherever it stands."""
    return [found for node in parse(path.read_text()).body for found in imports_in(node)]


parse = functools.cache(ast.parse)


def imports_in(statement: ast.stmt) -> Iterator[Import]:
    function = getattr(statement, "name", None)
    for node in ast.walk(statement):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, function, "import") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            form = "relative" if node.level else "from"
            yield Import(node.module or ".", function, form)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            if called in ("importorskip", "import_module"):
                yield Import(str(node.args[0].value), function, "by name")


def scripts(root: Path, *folders: str) -> dict[str, Path]:
    """Python files below the folders by their path from the root, without an __init__.py."""
    found = (path for folder in folders for path in sorted((root / folder).rglob("*.py")))
    return {path.relative_to(root).as_posix(): path for path in found if path.stem != "__init__"}


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def is_fast(module: str) -> bool:
    return module.endswith(BACKENDS)


def subject(module: str) -> str:
    """implementations.lab.files -> lab, implementations.attention_basic -> attention_basic"""
    return module.split(".")[1]


# The rules


def taken_names(root: Path) -> list[str]:
    """A file run by path puts its folder first on sys.path: it must not hide a module."""
    found = [path for folder in (PACKAGE, "weeks") for path in (root / folder).rglob("*")]
    modules = [path for path in found if path.is_dir() or path.suffix == ".py"]
    return [f"{path} bears the name of a module" for path in modules if path.stem in TAKEN]


def vague_imports(root: Path) -> list[str]:
    """Our own modules are imported as `from implementations.x.y import z`, and in no other way."""
    files = scripts(root, PACKAGE, "weeks")
    modules = {module_name(path) for path in files}
    siblings = {part for module in modules for part in module.split(".")[1:]}
    found = []
    for path, file in files.items():
        for module, _, form in imports(file):
            first = module.split(".")[0]
            if form == "relative" or first in siblings:
                found.append(f"{path} imports {module} by a relative or bare name")
            elif first == PACKAGE and (form != "from" or module not in modules):
                found.append(f"{path} does not import from one file of ours: {module}")
    return found


def wrong_way_imports(root: Path) -> list[str]:
    """weeks -> implementations, fast -> naive, models -> layers -> attention_basic -> lab."""
    found = []
    for path, file in scripts(root, PACKAGE, "weeks").items():
        here, in_week = module_name(path), path.startswith("weeks/")
        for module, function, _ in imports(file):
            if module.split(".")[0] in ("weeks", "tests"):
                found.append(f"{path} imports {module}")
            if in_week or not module.startswith(f"{PACKAGE}."):
                continue
            shows_all = path == f"{PACKAGE}/attention_basic.py" and function is not None
            if is_fast(module) and not is_fast(here) and not shows_all:
                found.append(f"{path} imports the fast {module}")
            allowed = MAY_IMPORT.get(subject(here), {subject(module)})
            if subject(module) not in allowed and function != "main" and not shows_all:
                found.append(f"{path} imports {module}, not {' or '.join(sorted(allowed))}")
    return found


def untested_files(root: Path) -> list[str]:
    """Every file is imported by a test; a fast one stands beside a naive one, tested together."""
    tests = sorted((root / "tests").rglob("test_*.py"))
    tested = [{module for module, *_ in imports(test)} for test in tests]
    modules = {module_name(path) for path in scripts(root, PACKAGE)}
    found = [f"no test imports {m}" for m in sorted(modules - set().union(*tested))]
    for module in filter(is_fast, sorted(modules)):
        naive = module[: module.rindex("_")]
        if naive not in modules:
            found.append(f"{module} has no naive {naive}")
        elif not any({module, naive} <= names for names in tested):
            found.append(f"no test imports both {module} and {naive}")
    return found


def unrunnable_files(root: Path) -> list[str]:
    """Every file says in its docstring how to run it, and has a main() to be run."""
    found = []
    for path, file in scripts(root, PACKAGE, "weeks").items():
        tree = parse(file.read_text())
        command = rf"^Run\s.*\buv run python {re.escape(path)}(?!\S)"
        if not re.search(command, ast.get_docstring(tree) or "", re.MULTILINE):
            found.append(f"{path} lacks the line 'Run     uv run python {path}'")
        if "main" not in {getattr(node, "name", None) for node in tree.body}:
            found.append(f"{path} has no main()")
    return found


def extra_packages(root: Path) -> list[str]:
    """A second __init__.py would let a folder of ours hide an installed package."""
    found = (root / PACKAGE).glob("*/**/__init__.py")
    return [f"{path} is not needed" for path in found]


def unfinished_weeks(root: Path) -> list[str]:
    """A week is numbered and has a README that names each script; a script has its results."""
    found = []
    for week in sorted(path for path in (root / "weeks").glob("*") if any(path.glob("*"))):
        if not re.fullmatch(r"\d\d(_[a-z]+)+", week.name):
            found.append(f"{week.name} is not a name like 01_attention")
        readme = week / "README.md"
        text = readme.read_text() if readme.exists() else ""
        if not text:
            found.append(f"{week.name} has no README.md")
        for script in sorted(week.glob("*.py")):
            if not (week / "results" / f"{script.stem}.json").exists():
                found.append(f"{week.name}/{script.name} has no results/{script.stem}.json")
            if script.name not in text:
                found.append(f"{week.name}/README.md does not mention {script.name}")
    return found


RULES = [
    taken_names,
    vague_imports,
    wrong_way_imports,
    untested_files,
    unrunnable_files,
    extra_packages,
    unfinished_weeks,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_repository(rule):
    assert not rule(ROOT)


# The rules can fail: a made-up house, and the same with one file changed


def script(path: str, *lines: str) -> dict[str, str]:
    docstring = f'"""A file.\n\nRun     uv run python {path}\n"""'
    main = "def main():\n    from implementations.models.net import x"
    return {path: "\n".join([docstring, *lines, main])}


NAIVE, FAST = "implementations/layers/norm.py", "implementations/layers/norm_triton.py"
BASIC, NET, LAB = (
    f"implementations/{name}.py" for name in ("attention_basic", "models/net", "lab/a")
)
WEEK = "weeks/01_attention/heads.py"
HOUSE = {
    "implementations/__init__.py": "",
    **script(LAB),
    **script(BASIC, "from implementations.lab.a import x"),
    **script(NAIVE, "from implementations.attention_basic import x"),
    **script(FAST, "from implementations.layers.norm import x"),
    **script(NET, "import torch", "from implementations.layers.norm import x"),
    **script(WEEK, "from implementations.layers.norm_triton import x"),
    "weeks/01_attention/README.md": "heads.py",
    "weeks/01_attention/results/heads.json": "{}",
    "tests/test_all.py": "\n".join(
        f"from implementations.{name} import x"
        for name in ("lab.a", "attention_basic", "layers.norm", "layers.norm_triton", "models.net")
    ),
}


def build(root: Path, files: dict[str, str | None]) -> Path:
    for name, text in files.items():
        if text is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_proper_house(rule, tmp_path):
    house = {
        **HOUSE,
        **script(BASIC, "def paths():", "    from implementations.layers.norm import x"),
    }
    (tmp_path / "weeks/02_transformers").mkdir(parents=True)  # not begun, and not in git
    assert not rule(build(tmp_path, HOUSE))
    assert not rule(build(tmp_path, house))


@pytest.mark.parametrize(
    "rule, change, sentence",
    [
        (taken_names, script("implementations/layers/types.py"), "types.py bears"),
        (taken_names, script("implementations/jax/norm.py"), "jax bears"),
        (taken_names, script("weeks/01_attention/einops.py"), "einops.py bears"),
        (vague_imports, script(NET, "from ..layers.norm import x"), "relative"),
        (vague_imports, script(NET, "from . import other"), "relative"),
        (vague_imports, script(NAIVE, "import norm_triton"), "bare"),
        (vague_imports, script(NET, "from layers.norm import x"), "bare"),
        (vague_imports, script(NET, "import implementations.layers.norm"), "one file of ours"),
        (vague_imports, script(NET, "from implementations.layers import norm"), "one file"),
        (vague_imports, script(WEEK, "from implementations import attention_basic"), "one file"),
        (wrong_way_imports, script(LAB, "from weeks.heads import x"), "imports weeks.heads"),
        (wrong_way_imports, script(LAB, "def f():", "    import tests.test_all"), "imports tests"),
        (wrong_way_imports, script(WEEK, "from weeks.other import x"), "imports weeks.other"),
        (
            wrong_way_imports,
            script(NET, "from implementations.layers.norm_triton import x"),
            "imports the fast",
        ),
        (
            wrong_way_imports,
            {NET: script(NET)[NET].replace("models.net", "layers.norm_triton")},
            "imports the fast",
        ),
        (
            wrong_way_imports,
            script(BASIC, "from implementations.lab.a_jax import x"),
            "imports the fast",
        ),
        (wrong_way_imports, script(LAB, "from implementations.layers.norm import x"), "not lab"),
        (
            wrong_way_imports,
            script(LAB, "def f():", "    from implementations.models.net import x"),
            "not lab",
        ),
        (
            wrong_way_imports,
            script("implementations/sources/b.py", "from implementations.layers.norm import x"),
            "not lab",
        ),
        (
            wrong_way_imports,
            script(BASIC, "from implementations.layers.norm import x"),
            "not lab",
        ),
        (
            wrong_way_imports,
            script(NAIVE, "from implementations.models.net import x"),
            "not attention",
        ),
        (
            untested_files,
            script("implementations/lab/b.py"),
            "no test imports implementations.lab.b",
        ),
        (untested_files, {NAIVE: None}, "has no naive"),
        (
            untested_files,
            {
                "tests/test_all.py": HOUSE["tests/test_all.py"].replace("layers.norm ", "lab.a "),
                "tests/test_norm.py": "from implementations.layers.norm import x",
            },
            "no test imports both",
        ),
        (unrunnable_files, {NET: '"""A net."""\ndef main(): pass'}, "lacks the line"),
        (unrunnable_files, {NET: script(LAB)[LAB]}, "lacks the line"),
        (unrunnable_files, {WEEK: script(WEEK)[WEEK].replace("heads.py", "heads.py2")}, "lacks"),
        (unrunnable_files, {NET: script(NET)[NET].replace("main", "start")}, "has no main()"),
        (extra_packages, {"implementations/layers/__init__.py": ""}, "is not needed"),
        (unfinished_weeks, {"weeks/attention/README.md": "x"}, "is not a name like"),
        (unfinished_weeks, {"weeks/01_attention/README.md": None}, "has no README.md"),
        (unfinished_weeks, {"weeks/01_attention/results/heads.json": None}, "has no results"),
        (
            unfinished_weeks,
            {"weeks/01_attention/README.md": "head.py"},
            "does not mention heads.py",
        ),
    ],
)
def test_a_broken_rule_is_noticed(rule, change, sentence, tmp_path):
    found = rule(build(tmp_path, HOUSE | change))
    assert any(sentence in violation for violation in found)


def test_an_import_by_name_counts_as_a_test(tmp_path):
    tests = HOUSE["tests/test_all.py"].replace("from implementations.models.net import x", "")
    skip = '\nimport pytest\nnet = pytest.importorskip("implementations.models.net")'
    assert untested_files(build(tmp_path, HOUSE | {"tests/test_all.py": tests}))
    assert not untested_files(build(tmp_path, HOUSE | {"tests/test_all.py": tests + skip}))
