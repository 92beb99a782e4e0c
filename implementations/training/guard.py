"""What may happen to a run from outside: Ctrl-C, a polite kill, and a second process.

    Ctrl-C or SIGTERM   ask the run to stop; it does so between two updates
    a second Ctrl-C     stops at once
    a second process    is turned away from a folder in which one is training, or waits for it

Python would raise KeyboardInterrupt anywhere, also in the middle of an update with half of the
weights moved: such a state must never become a checkpoint. So the signal only leaves a note.

Who asks for a trained model waits: any process may train it. Who asks for a training, in a folder
of its own choice, is turned away: it was started twice, or the folder is meant for another run, and
hours of waiting would end in that news. A finished run is read by all at once, and needs neither.

Run     uv run python implementations/training/guard.py
"""

import fcntl
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """A list that holds, once the user or the system asks the process to stop, which signal came.

    Outside the main thread, where Python allows no handlers, it stays empty.
    """
    asked: list[signal.Signals] = []
    before: dict[int, signal.Handlers] = {}

    def ask(number, frame):
        asked.append(signal.Signals(number))
        signal.signal(number, before[number])
        # Not print: a signal may come while the same stream is being written to.
        os.write(2, b"\nstopping after this step (again: at once)\n")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask) or signal.SIG_DFL
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def exclusive(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the folder, made if it is missing, for this process.

    The system lets go of it however the process dies.

    Args:
        wait: for a process that holds it, as long as it takes; a line on stderr says so. Look
            again afterwards: what was to be done may be done.

    Raises:
        ValueError: another process holds it, and nobody waits.
        OSError: the folder cannot be written.
        SystemExit: after Ctrl-C while waiting (code 130).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise ValueError(f"another process is training in {folder}") from None
            wait_for(file, folder)
        yield


def wait_for(file: IO, folder: Path) -> None:
    try:
        print(f"waits for another process, which is training in {folder}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except KeyboardInterrupt:
        print("\nstopped waiting", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def main() -> None:
    with stop_requests() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        print(f"asked to stop by {asked[0].name}, and still here to finish the step")
    with tempfile.TemporaryDirectory() as folder, exclusive(Path(folder)):
        try:
            with exclusive(Path(folder)):
                pass
        except ValueError as problem:
            print(f"a second one hears: {problem}")


if __name__ == "__main__":
    main()
