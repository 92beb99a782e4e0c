"""The diary of a run: one line of JSON a step, and the loss curve drawn from it.

A line is written whole and at once, so a killed run loses none but the last. A resumed run goes
back to its checkpoint, and so does its diary: no step appears twice.

Its other entry is the time that processors have worked on the run, in all calls.

Run     uv run python implementations/training/journal.py [FOLDER]
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from implementations.lab.command_line import clear_errors
from implementations.lab.files import cache_folder, write_atomically
from implementations.lab.pictures import save_figure

LOG, PICTURE, SECONDS = "log.jsonl", "loss.png", "processor_seconds"


def append(path: Path, line: dict) -> None:
    """Write one line at the end.

    Raises:
        OSError: naming the path, when it cannot be written or the disk is full.
    """
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, str(path)) from problem


def read(path: Path) -> list[dict]:
    """Every line, the first step first. A line torn by a crash is left out."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def cut(path: Path, step: int) -> None:
    """Forget what came after `step`: those steps will be done, and written, again."""
    kept = [json.dumps(line) + "\n" for line in read(path) if line["step"] <= step]
    if path.exists():
        write_atomically(path, "".join(kept))


@contextmanager
def counted(folder: Path) -> Iterator[Callable[[], None]]:
    """Add the processor time of what runs inside to the folder's, even if it is interrupted.

    Gives a function that writes what it is by now: before a result, whose readers wait for nothing.
    """
    before, started = processor_seconds(folder), time.process_time()

    def write() -> None:
        write_atomically(folder / SECONDS, str(before + time.process_time() - started))

    try:
        yield write
    except BaseException:
        with suppress(OSError):  # on a full disk, say: the first error is the one to hear of
            write()
        raise
    write()


def processor_seconds(folder: Path) -> float:
    """That were counted so far."""
    path = folder / SECONDS
    return float(path.read_text("utf-8")) if path.exists() else 0.0


def draw(folder: Path) -> Path | None:
    """Save the loss curve of a run's folder; None if nothing is logged yet."""
    lines = read(folder / LOG)
    if not lines:
        return None
    steps = np.array([line["step"] for line in lines])
    losses = np.array([line["loss"] for line in lines])
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return save_figure(figure, folder / PICTURE)


def main() -> None:
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        if not read(folder / LOG):
            raise ValueError(f"{folder / LOG} holds no line to draw")
    else:
        folder = cache_folder("training", "journal")
        (folder / LOG).unlink(missing_ok=True)
        for step in range(1, 201):
            append(folder / LOG, {"step": step, "loss": 2 + 5 / step + 0.1 * np.sin(7.0 * step)})
        cut(folder / LOG, 150)
        print(f"200 steps written, cut at 150: {len(read(folder / LOG))} lines are left")
    print("loss curve:", draw(folder))


if __name__ == "__main__":
    with clear_errors():
        main()
