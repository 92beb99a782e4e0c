"""What may happen to a run from outside: Ctrl-C, a polite kill, and a second process.

    Ctrl-C or SIGTERM   ask the run to stop; it does so between two updates
    a second Ctrl-C     stops at once
    a second process    is turned away from a folder in which one is training

Python would raise KeyboardInterrupt anywhere, also in the middle of an update with half of the
weights moved: such a state must never become a checkpoint. So the signal only leaves a note.

Run     uv run python implementations/training/guard.py
"""

import fcntl
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder for this process. The system lets go of it however the process dies.

    Raises:
        ValueError: another process holds it.
        OSError: the folder cannot be written.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {folder}") from None
        yield


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
