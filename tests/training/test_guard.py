"""Signals leave a note, and a folder belongs to one process."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from implementations.training.guard import exclusive, stop_requests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_interrupts_nothing(number):
    before = signal.getsignal(number)
    with stop_requests() as asked:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            pytest.fail("interrupted in the middle of something")
        assert asked == [number]
    assert signal.getsignal(number) is before


@pytest.fixture
def interruptible():
    """Python's own Ctrl-C: a process that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_interrupts_at_once(interruptible):
    with stop_requests() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert asked == [signal.SIGINT]


def test_another_thread_can_train_without_handlers():
    seen = []

    def work():
        with stop_requests() as asked:
            seen.append(asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [[]]


def test_a_folder_is_held_by_one_and_let_go_of(tmp_path):
    refusal = pytest.raises(ValueError, match="another process is training in")
    with exclusive(tmp_path), refusal, exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


WAITER = """
import signal, sys
from pathlib import Path
from implementations.training.guard import exclusive
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
with exclusive(Path(sys.argv[1]), wait=True):
    print("mine")
"""


@pytest.fixture
def waiter(tmp_path):
    """Starts another process that waits for `tmp_path`; returns it once it does."""
    started = []

    def start():
        command = [sys.executable, "-c", WAITER, tmp_path]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes)
        started.append(process)
        line = f"waits for another process, which is training in {tmp_path}\n"
        assert process.stderr.readline() == line
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_who_waits_is_next(waiter, tmp_path):
    with exclusive(tmp_path):
        process = waiter()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
    assert process.communicate(timeout=30) == ("mine\n", "")
    assert process.returncode == 0


def test_ctrl_c_ends_the_wait(waiter, tmp_path):
    """With one word and the shell's code."""
    with exclusive(tmp_path):
        process = waiter()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "\nstopped waiting\n")
    assert process.returncode == 130
