"""kill -9 at any moment, then resume: the same bits as if nothing had happened."""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

VICTIM = Path(__file__).with_name("victim.py")
MEMORY = Path("/dev/shm")  # a kill is no power cut: what was written is there, synced or not


@pytest.fixture(scope="module")
def kill():
    """Asks victim.py for an experiment; returns what each kill led to."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        process = subprocess.Popen(
            [sys.executable, "-P", str(VICTIM), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def ask(**request):
            print(json.dumps(request), file=process.stdin, flush=True)
            found = list(iter(lambda: process.stdout.readline().strip(), ""))
            assert process.poll() is None, "victim.py has died: its last words are above"
            return [json.loads(line) for line in found]

        yield ask
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=30)


@pytest.mark.parametrize(
    "count", [5, pytest.param(50, marks=pytest.mark.full)], ids=["5 kills", "50 kills"]
)
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(kill, count):
    """Sums of weights, moments, generators and scalars, and every line of the log but its speed."""
    found = kill(kill="time", count=count, seed=count)
    assert len(found) == count
    assert all(end["identical"] and not end["refused"] for end in found), found
    if count >= 50:  # the moments are spread: before, between and inside saves
        assert len({end["newest"] for end in found}) >= 4
        assert {end["saving"] for end in found} == {True, False}


@pytest.mark.parametrize("damaged", [False, True])
def test_killed_at_any_file_operation_of_a_save_one_whole_checkpoint_is_left(kill, damaged):
    """Before each operation in turn, so no moment is missed: the old one, or the new one."""
    found = kill(kill="save", damaged=damaged)
    *ends, last = found
    assert len(ends) >= 12 and all(end["code"] == -signal.SIGKILL for end in ends)
    assert all(end["whole"] for end in found), found
    steps = [end["step"] for end in found]
    assert steps == sorted(steps) and set(steps) == {1, 2}
    assert (last["code"], last["step"]) == (0, 2)
    # Nothing half-written is ever seen; the damaged one is refused until it is replaced.
    assert all(not end["refused"] or (damaged and end["step"] == 1) for end in found)


@pytest.mark.full
def test_killed_at_any_file_operation_of_a_run_it_ends_with_the_same_bits(kill):
    found = kill(kill="run")
    assert len(found) > 100
    assert all(end["identical"] and not end["refused"] for end in found), found
