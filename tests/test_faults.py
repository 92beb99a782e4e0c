"""Every known way to get it wrong, planted in a copy of the repository: a named test must notice.

tests/<subject>/faults.toml lists the faults:

    [[fault]]
    name = "no scale"
    file = "implementations/attention_basic.py"     from the root
    old  = "query.shape[-1] ** -0.5"                occurs once in the file
    new  = "1.0"                                    takes its place
    wild = "the bug in the wild that it copies"
    test = "tests/attention/test_attention_basic.py::test_equals_torch"    or a list: each must fail
    timeout = 20                                    only if the fault makes the test hang

A fault is killed when the named test *fails while it runs*, on code that could be imported, and
passes on the unbroken copy by the same road. All other ends are no kill, and say so.

Run     uv run pytest -m faults
"""

import ast
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
SERVER = Path(__file__).with_name("fault_server.py")
# 15 s of one core, once a worker; most tests would pay for most of them again in each fault.
# Not blackjax: it uses JAX while it is imported, which would fix the number of host devices.
IMPORTS = ["torch", "torch._dynamo", "jax", "numpyro", "beartype", "hypothesis", "einops"]
IMPORTS += ["matplotlib.pyplot", "safetensors.torch", "transformers", "tyro", "sybil", "gguf"]
IMPORTS += ["transformers.models.llama.modeling_llama", "scipy.stats", "sklearn.datasets", "arviz"]
PATIENCE = 120.0  # seconds for a run that is not declared to hang


class Run(NamedTuple):
    """How a run of tests ended."""

    verdict: int | None
    """pytest's exit code, None if it did not live to give one"""
    code: int | None
    """return code of the process, negative for a signal, None after a time-out"""
    reports: list[dict]
    """each phase of each test, in order"""
    output: str


class Server:
    """A process that has imported much and runs tests in forks; see fault_server.py."""

    def __init__(self, *imports: str):
        command = [sys.executable, "-P", str(SERVER), *imports]
        # This run's own pytest settings (options, xdist's worker) are not the fork's.
        clean = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
        # A file, because a pipe that nobody reads would stop it one day.
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the server
        # A session of its own: Ctrl-C reaches pytest alone, which then closes the server.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env=clean,
            start_new_session=True,
        )

    def run(self, root: Path, tests: list[str], seconds: float = PATIENCE) -> Run:
        """Run the tests (pytest node ids) of the repository at `root`, in a fork of their own."""
        answer = ""
        with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(BrokenPipeError):
            request = {"root": str(root), "tests": tests, "scratch": scratch, "seconds": seconds}
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        assert answer, f"the fault server has died, and said\n{self.last_words()}"
        return Run(**json.loads(answer))

    def last_words(self) -> str:
        self.said.seek(0)
        return "".join(self.said.readlines()[-30:])

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died, with a request unread
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)
        self.said.close()


class Survived(Exception):
    """No kill: the sentence says why."""


class Repository:
    """A copy of a repository that may be broken, and what its unbroken tests were seen to do."""

    def __init__(self, original: Path, copy: Path, server: Server):
        ignored = shutil.ignore_patterns(".*", "__pycache__")
        self.root, self.server, self.passed = copy, server, {}
        shutil.copytree(original, copy, ignore=ignored)

    def kill(self, fault: dict, patience: float = PATIENCE) -> None:
        """Plant the fault and run its tests.

        Raises:
            Survived: some named test does not notice, or what happened is no evidence.
        """
        tests = named_tests(fault)
        for test in tests:
            self.require_unbroken(test, patience)
        path = self.root / fault["file"]
        text = path.read_text()
        path.write_text(text.replace(fault["old"], fault["new"]))
        try:
            run = self.server.run(self.root, tests, fault.get("timeout", patience))
        finally:
            path.write_text(text)
        require_kill(run, tests, may_hang="timeout" in fault)

    def require_unbroken(self, test: str, patience: float) -> None:
        """The test passes on the copy as it is; run once."""
        if test not in self.passed:
            self.passed[test] = self.server.run(self.root, [test], patience)
        require_pass(self.passed[test], test)


def named_tests(fault: dict) -> list[str]:
    return [fault["test"]] if isinstance(fault["test"], str) else fault["test"]


def require_pass(run: Run, test: str) -> None:
    """Nothing but passes and skips, and a pass among them; a test of CUDA may lack its device."""
    passed = [r for r in run.reports if r["phase"] == "call" and r["outcome"] == "passed"]
    if run.verdict != pytest.ExitCode.OK:
        raise survived(f"unbroken, {test} does not pass: {ending(run)}", run)
    if not passed and not torch.cuda.is_available() and all(r["cuda"] for r in run.reports):
        pytest.skip(f"{test} needs a CUDA GPU")
    if not passed:
        raise survived(f"unbroken, {test} is skipped: it proves nothing", run)


def require_kill(run: Run, tests: list[str], may_hang: bool) -> None:
    """Each named test failed while it ran, in one of its cases at least, and nothing else broke."""
    failures = [report for report in run.reports if report["outcome"] == "failed"]
    for report in failures:
        if report["phase"] != "call":
            sentence = f"no kill: {report['test']} fails in its {report['phase']} phase"
            raise survived(sentence, run)
        if report["import_error"]:
            raise survived(f"no kill: {report['test']} fails to import what is broken", run)
    if may_hang and hangs_in_call(run):
        return
    if run.verdict != pytest.ExitCode.TESTS_FAILED:
        raise survived(f"no kill: {ending(run)}", run)
    for test in tests:
        cases = (f"{test}[", f"{test}::")
        if not any(r["test"] == test or r["test"].startswith(cases) for r in failures):
            raise survived(f"survived: {test} does not notice", run)


def hangs_in_call(run: Run) -> bool:
    """Whether a run out of time had just set a test up, so that it stood in the test itself."""
    last = run.reports[-1] if run.reports else {"phase": "collection"}
    return run.code is None and last["phase"] == "setup" and last["outcome"] == "passed"


def ending(run: Run) -> str:
    """How a run ended, in words."""
    if run.verdict is None and run.code is None:
        return "it ran out of time"
    if run.verdict is None:
        return f"signal {-run.code} ended it" if run.code < 0 else f"exit code {run.code} ended it"
    return {
        pytest.ExitCode.OK: "the tests pass",
        pytest.ExitCode.TESTS_FAILED: "the tests fail",
        pytest.ExitCode.INTERRUPTED: "pytest was stopped",
        pytest.ExitCode.INTERNAL_ERROR: "pytest itself failed",
        pytest.ExitCode.USAGE_ERROR: "there is no such test, or it could not be collected",
        pytest.ExitCode.NO_TESTS_COLLECTED: "there is no such test",
    }[run.verdict]


def survived(sentence: str, run: Run) -> Survived:
    return Survived("\n".join([sentence, *run.output.splitlines()[-30:]]))


# The files of faults


def faults_of(path: Path) -> list[dict]:
    return tomllib.loads(path.read_text())["fault"]


FILES = sorted(ROOT.glob("tests/*/faults.toml"))
FAULTS = [
    pytest.param(fault, id=f"{path.parent.name}/{fault.get('name')}")
    for path in FILES
    for fault in faults_of(path)
]


def mistakes(fault: dict, root: Path) -> list[str]:
    """What is wrong with the entry itself, without running anything."""
    required, optional = {"name", "file", "old", "new", "wild", "test"}, {"timeout"}
    if not required <= fault.keys() <= required | optional:
        return [f"the keys are {sorted(required)} and perhaps timeout, got {sorted(fault)}"]
    path, found = root / fault["file"], []
    if not path.is_file():
        return [f"there is no file {fault['file']}"]
    text = path.read_text()
    if (times := text.count(fault["old"])) != 1:
        found.append(f"{fault['old']!r} occurs {times} times in {fault['file']}, not once")
    elif path.suffix == ".py":
        try:
            broken = ast.parse(text.replace(fault["old"], fault["new"]))
            if ast.dump(broken) == ast.dump(ast.parse(text)):
                found.append("the broken code is the same code")
        except SyntaxError as problem:
            found.append(f"the broken file is not Python: {problem}")
    elif fault["old"] == fault["new"]:
        found.append("old and new are the same")
    found += [f"there is no test {t}" for t in named_tests(fault) if not exists(t, root)]
    return found


def exists(test: str, root: Path) -> bool:
    """Whether a node id names a function of a test file; its parameters are not looked at."""
    file, *names = test.split("[")[0].split("::")
    if not names or not (root / file).is_file():
        return False
    nodes = ast.walk(ast.parse((root / file).read_text()))
    return names[-1] in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("fault", FAULTS)
def test_entry_is_sound(fault):
    assert not mistakes(fault, ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_names_are_unique(path):
    names = [fault.get("name") for fault in faults_of(path)]
    assert len(names) == len(set(names))


# The faults themselves


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """A copy of this repository, and a server that has imported what its tests import."""
    server = Server(*IMPORTS)
    yield Repository(ROOT, tmp_path_factory.mktemp("faults") / "repository", server)
    server.close()


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_killed(fault, repository):
    try:
        repository.kill(fault)
    except Survived as reason:
        pytest.fail(f"{fault['wild']}\n{reason}", pytrace=False)


# The runner, on a made-up repository

TWICE = """
def twice(x):
    return 2 * x
"""
TESTS = """
import pytest, time
from implementations.made_up import twice

def test_twice():
    assert twice(2) == 4

@pytest.mark.parametrize("x", [0, 3])
def test_cases(x):
    assert twice(x) == x + x

@pytest.fixture
def six():
    return int("6" if twice(3) == 6 else "no number")

def test_setup(six):
    assert twice(3) == six

@pytest.mark.skip
def test_skipped():
    assert twice(2) == 4

@pytest.mark.cuda
@pytest.mark.skip
def test_on_cuda():
    assert twice(2) == 4

def test_wrong():
    assert twice(2) == 5

def test_late_import():
    from implementations.late import three
    assert three == 3
"""


@pytest.fixture(scope="session")
def made_up(tmp_path_factory):
    """A repository of one function, a copy of it to break, and a server that is there at once."""
    files = {
        "implementations/__init__.py": "",
        "implementations/made_up.py": TWICE,
        "implementations/late.py": "three = 3",
        "tests/test_made_up.py": TESTS,
        "pyproject.toml": (ROOT / "pyproject.toml").read_text(),
    }
    folder = tmp_path_factory.mktemp("made_up")
    for name, text in files.items():
        path = folder / "original" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    server = Server("hypothesis", "jaxtyping")  # their pytest plugins would import them each time
    yield Repository(folder / "original", folder / "copy", server)
    server.close()


def made_up_fault(new: str, test: str | list[str] = "test_twice", **more) -> dict:
    tests = [test] if isinstance(test, str) else test
    return {
        "name": "made up",
        "file": "implementations/made_up.py",
        "old": "return 2 * x",
        "new": new,
        "wild": "nowhere",
        "test": [f"tests/test_made_up.py::{name}" for name in tests],
        **more,
    }


HANG = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    "fault",
    [
        made_up_fault("return 3 * x"),
        made_up_fault("return 3 * x", "test_cases"),  # its case x = 0 passes
        made_up_fault("return 3 * x", ["test_twice", "test_cases"]),
        made_up_fault("raise ValueError"),
        made_up_fault(HANG, timeout=4),
    ],
    ids=["wrong", "one case", "two tests", "raises", "declared hang"],
)
def test_kills(made_up, fault):
    made_up.kill(fault)
    assert (made_up.root / "implementations/made_up.py").read_text() == TWICE


@pytest.mark.parametrize(
    "fault, sentence",
    [
        (made_up_fault("return x + x"), "no kill: the tests pass"),
        (made_up_fault("return x ** 2 + x", "test_cases[0]"), "no kill: the tests pass"),
        (
            made_up_fault("return x ** 2", ["test_twice", "test_cases"]),
            "test_twice does not notice",
        ),
        (made_up_fault("return 2 * x\nimport no_such_module"), "fails in its collection phase"),
        (made_up_fault("import no_such_module"), "test_twice fails to import"),
        (made_up_fault("return 3 * x", "test_setup"), "test_setup fails in its setup phase"),
        (made_up_fault("import os; os.kill(os.getpid(), 11)"), "signal 11 ended it"),
        (made_up_fault("import os; os._exit(1)"), "exit code 1 ended it"),
        (made_up_fault("import pytest; pytest.exit('gone')"), "pytest was stopped"),
        (made_up_fault(f"return 2 * x\n{HANG}", timeout=2), "it ran out of time"),
        (made_up_fault("return 3 * x", "test_wrong"), "unbroken, .* does not pass: the tests fail"),
        (made_up_fault("return 3 * x", "test_none"), "unbroken, .* does not pass"),
        (made_up_fault("return 3 * x", "test_skipped"), "unbroken, .* is skipped"),
    ],
)
def test_is_no_kill(made_up, fault, sentence):
    with pytest.raises(Survived, match=sentence):
        made_up.kill(fault)
    assert (made_up.root / "implementations/made_up.py").read_text() == TWICE


def test_a_server_that_dies_says_why(tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("raise SystemExit('no such luck')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = Server("dies")
    server.process.wait(timeout=30)
    with pytest.raises(AssertionError, match="no such luck"):
        server.run(tmp_path, ["test_nothing.py"])
    server.close()


def test_a_server_does_without_a_package_that_is_not_there(made_up):
    """It would only have saved time."""
    server = Server("no_such_package.part", "jaxtyping")
    Repository(made_up.root, made_up.root.with_name("other"), server).kill(
        made_up_fault("return 3 * x")
    )
    assert "no_such_package" in server.last_words()
    server.close()


def test_undeclared_hang_is_no_kill(made_up):
    with pytest.raises(Survived, match="it ran out of time"):
        made_up.kill(made_up_fault(HANG), patience=2)


def test_late_import_error_is_no_kill(made_up):
    fault = made_up_fault("", "test_late_import", file="implementations/late.py")
    with pytest.raises(Survived, match="test_late_import fails to import"):
        made_up.kill(fault | {"old": "three", "new": "four"})


def test_imports_from_elsewhere_are_no_evidence(made_up, tmp_path):
    """The checkout is importable in the fork too: it must not be what the tests ran on."""
    test = "def test_checkout():\n    import implementations.lab.files\n    assert 0"
    (tmp_path / "test_checkout.py").write_text(test)
    run = made_up.server.run(tmp_path, ["test_checkout.py"])
    with pytest.raises(Survived, match="imported from outside the copy"):
        require_kill(run, ["test_checkout.py"], may_hang=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_test_is_skipped_aloud_without_a_gpu(made_up):
    with pytest.raises(pytest.skip.Exception, match="needs a CUDA GPU"):
        made_up.kill(made_up_fault("return 3 * x", "test_on_cuda"))


@pytest.mark.parametrize(
    "changes, mistake",
    [
        ({}, None),
        ({"file": "implementations/none.py"}, "no file"),
        ({"old": "x"}, "occurs 2 times"),
        ({"old": "y"}, "occurs 0 times"),
        ({"new": "return 2 *  x"}, "same code"),
        ({"new": "return 2 * )"}, "not Python"),
        ({"test": "tests/test_made_up.py::test_none"}, "no test"),
        ({"test": "tests/test_made_up.py"}, "no test"),
        ({"tset": "tests/test_made_up.py::test_twice"}, "the keys are"),
    ],
)
def test_mistakes_are_found(made_up, changes, mistake):
    found = mistakes(made_up_fault("return 3 * x") | changes, made_up.root)
    assert [mistake in sentence for sentence in found] == [True] * bool(mistake)
    assert mistakes({"name": "made up"}, made_up.root)


def test_server_ends_with_its_owner(tmp_path):
    """Also in the middle of a run: neither the server nor the test goes on working."""
    slow = (
        "import os, time\ndef test_slow():\n    print(os.getpid(), flush=True)\n    time.sleep(60)"
    )
    (tmp_path / "test_slow.py").write_text(slow + "\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -s\n")
    server = Server()
    request = {"root": str(tmp_path), "tests": ["test_slow.py"], "scratch": str(tmp_path)}
    print(json.dumps(request | {"seconds": 60}), file=server.process.stdin, flush=True)
    output = tmp_path / "output.txt"
    while not (output.exists() and output.read_text().strip()):
        assert server.process.poll() is None
        time.sleep(0.02)
    server.close()
    assert server.process.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(output.read_text()), 0)
