"""Run pytest in forks of a process that has already paid for the imports.

    python -P tests/fault_server.py torch jax

One JSON object a line: {"root", "tests", "scratch", "seconds"} comes in, {"verdict", "code",
"reports", "output"} goes out. `verdict` is pytest's exit code, null if the fork did not live to
give it; `code` is the fork's own, negative for a signal, null after a time-out; `reports` has one
entry for each phase of each test, as far as the run came.

The modules named on the command line are imported and not used: no tensor, no thread of ours, no
`implementations`. So a fork is as good as a new process, and seconds cheaper. The server ends, and
kills what it runs, when its standard input does: however its owner dies.

A fork does nothing that the verdict does not need: no assert is rewritten or explained (with CI
set, pytest explains two unequal lists without end), and one test alone stops at its first failing
case.
"""

import contextlib
import gc
import importlib
import inspect
import json
import os
import select
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest

BROKEN_IMPORT = (ImportError, SyntaxError)


class Reporter:
    """A pytest plugin that writes every phase down when it ends: a run may be killed any time."""

    def __init__(self, path: Path):
        self.file = path.open("w")

    def write(self, test: str, phase: str, outcome: str, **more) -> None:
        line = {"test": test, "phase": phase, "outcome": outcome, **more}
        print(json.dumps(line), file=self.file, flush=True)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        unimportable = call.excinfo is not None and issubclass(call.excinfo.type, BROKEN_IMPORT)
        marks = {"import_error": unimportable, "cuda": "cuda" in item.keywords}
        self.write(item.nodeid, report.when, report.outcome, **marks)
        return report

    def pytest_collectreport(self, report):
        if report.failed:
            self.write(report.nodeid, "collection", "failed")


def modules_outside(root: Path) -> list[str]:
    """Modules of the package that did not come from `root`: nothing was proved about its files."""
    ours = {name: m for name, m in sys.modules.items() if name.split(".")[0] == "implementations"}
    files = {name: getattr(module, "__file__", None) for name, module in ours.items()}
    return [name for name, file in files.items() if file and root not in Path(file).parents]


def run_tests(root: Path, tests: list[str], scratch: Path) -> None:
    """The life of one fork: run the tests from `root`, and leave nothing anywhere but in `scratch`.

    A broken sampler's cached model or saved counterexample would change the verdict on the next.
    """
    output = os.open(scratch / "output.txt", os.O_WRONLY | os.O_CREAT)
    for stream, file in enumerate([os.open(os.devnull, os.O_RDONLY), output, output]):
        os.dup2(file, stream)
    os.environ.update(
        PYTHONPATH=str(root),  # a test may start a script, whose own path would be the checkout
        PYTHONDONTWRITEBYTECODE="1",  # two faults of one length and second would share bytecode
        XDG_CACHE_HOME=str(scratch / "cache"),
        HYPOTHESIS_STORAGE_DIRECTORY=str(scratch / "hypothesis"),
    )
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(root))
    os.chdir(root)
    reporter = Reporter(scratch / "reports.jsonl")
    options = ["-q", "-m", "", "-p", "no:cacheprovider", f"--basetemp={scratch / 'tests'}"]
    options += ["--rootdir", str(root), "--assert=plain"]
    options += ["--exitfirst"] if len(tests) == 1 else []  # of several, each must fail
    code = pytest.main([*options, *tests], plugins=[reporter])
    for name in modules_outside(root):
        reporter.write(f"{name}, imported from outside the copy,", "import", "failed")
    (scratch / "verdict.txt").write_text(str(int(code)))


def fork(*arguments) -> int:
    """Run the tests in a fork; returns its process number, which is also its group's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX and Python warn: a thread's locks do not survive
        process = os.fork()
    if process == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            run_tests(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    with contextlib.suppress(OSError):  # both sides set it, whichever comes first
        os.setpgid(process, process)
    return process


def wait(process: int, seconds: float) -> int | None:
    """The return code, negative for a signal; None after a time-out. Ends the whole group."""
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if select.select([sys.stdin], [], [], 0.02)[0]:  # nobody writes now: it has ended
                sys.exit("the owner of this server is gone")
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)


def read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def serve() -> None:
    assert "implementations" not in sys.modules, "a fork must import the copy's own"
    for line in sys.stdin:
        request = json.loads(line)
        root, scratch = Path(request["root"]).resolve(), Path(request["scratch"])
        answer = {
            "code": wait(fork(root, request["tests"], scratch), request["seconds"]),
            "verdict": json.loads(read(scratch / "verdict.txt") or "null"),
            "reports": [json.loads(line) for line in read(scratch / "reports.jsonl").splitlines()],
            "output": read(scratch / "output.txt"),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    for module in sys.argv[1:]:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as problem:  # a test that needs it will say so itself
            print(f"{module} is not imported: {problem}", file=sys.stderr)
    inspect.getmodule(serve)  # Sybil asks for one too, which looks through all modules once: 0.3 s
    gc.freeze()  # pytest collects garbage twice at its end: 0.8 s over all that stands here
    serve()
