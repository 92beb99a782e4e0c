"""A mistake is one sentence and exit code 2, a bug is a traceback, a closed pipe is nothing."""

import errno
import json
import os
import subprocess
import sys

import pytest

from implementations.lab.command_line import clear_errors

MISSING = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "no/such.png")


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (ValueError("got 0 heads"), "got 0 heads"),
        (MISSING, "no/such.png: No such file or directory"),
        (OSError("the data package x is not installed"), "the data package x is not installed"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ],
    ids=["ValueError", "OSError of a file", "OSError of a sentence", "OSError of the system"],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(capsys, problem, sentence):
    with pytest.raises(SystemExit) as leaving, clear_errors():
        raise problem
    assert leaving.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.endswith(f"{sentence}\n")
    assert printed.err.count("\n") == 1


def test_kinds_of_value_error_are_mistakes_too(capsys):
    """A damaged JSON file, say."""
    with pytest.raises(SystemExit) as leaving, clear_errors():
        json.loads("{")
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith("error: Expecting property name")


def test_ctrl_c_is_one_word_and_the_code_of_shells(capsys):
    with pytest.raises(SystemExit) as leaving, clear_errors():
        raise KeyboardInterrupt
    assert leaving.value.code == 130
    assert capsys.readouterr().err == "\nstopped\n"


@pytest.mark.parametrize("bug", [TypeError, KeyError, AssertionError, RuntimeError])
def test_a_bug_passes_through(capsys, bug):
    with pytest.raises(bug), clear_errors():
        raise bug("a bug")
    assert capsys.readouterr().err == ""


def test_an_exit_keeps_its_code():
    """--help leaves with 0, and a finding that does not hold with 1."""
    for code in (0, 1):
        with pytest.raises(SystemExit) as leaving, clear_errors():
            raise SystemExit(code)
        assert leaving.value.code == code


def test_without_a_problem_nothing_is_said(capsys):
    with clear_errors():
        print("a fact")
    assert capsys.readouterr() == ("a fact\n", "")


def python(lines, *, read_first_line_only=False):
    """Run a script; returns its exit code, stdout and stderr."""
    script = "from implementations.lab.command_line import clear_errors\nwith clear_errors():\n"
    script += "".join(f"    {line}\n" for line in lines.splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # unbuffered, no last words would be left
    )
    if read_first_line_only:
        process.stdout.readline()
        process.stdout.close()
        printed, complaint = "", process.stderr.read()
        process.stderr.close()
        process.wait()
    else:
        printed, complaint = process.communicate()
    return process.returncode, printed, complaint


def test_a_real_process_shows_a_mistake_without_and_a_bug_with_its_traceback():
    assert python("raise ValueError('got 0 heads')") == (2, "", "error: got 0 heads\n")
    code, _, complaint = python("raise KeyError('layer')")
    assert code == 1
    assert complaint.startswith("Traceback") and complaint.endswith("KeyError: 'layer'\n")


LONG_TALK = "for line in range(100_000): print(line)"
LAST_WORDS = """
import time
print("first", flush=True)
time.sleep(0.3)
print("only in the buffer when the reader is gone")
"""


@pytest.mark.parametrize("talk", [LONG_TALK, LAST_WORDS.strip()], ids=["long talk", "last words"])
def test_a_reader_that_leaves_early_hears_no_complaint(talk):
    """`script | head -1`: the pipe breaks in the middle of a loop, or at the very last flush."""
    assert python(talk, read_first_line_only=True) == (1, "", "")
