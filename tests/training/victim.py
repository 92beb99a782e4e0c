"""Train in forks of a process that has imported torch, and kill them with SIGKILL.

    python -P tests/training/victim.py FOLDER

One JSON object a line comes in, one for each experiment goes out, then an empty line:

    {"kill": "time", "count": 5, "seed": 0}   a run is killed at a random moment, and resumed
    {"kill": "run"}                           a run is killed before each of its file operations
    {"kill": "save", "damaged": false}        a save is killed before each of its file operations

A fork starts in milliseconds where an import takes seconds. Nothing is computed in this process, so
a fork is as good as a new one.
"""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer of a process imports it, and a fork starts with none
from torch import nn

from implementations.training.batches import RandomWindows
from implementations.training.checkpoint import (
    MANIFEST,
    State,
    checkpoint_path,
    checkpoints,
    load_latest,
    save,
)
from implementations.training.journal import LOG, read
from implementations.training.loop import train
from implementations.training.settings import TrainingConfig

torch.set_num_threads(1)  # a fork does not inherit threads
STEPS, EVERY = 60, 4
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def work(folder: Path) -> None:
    """Begin a small run with dropout, or go on with it."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Dropout(0.3), nn.Linear(8, 11))
    text = torch.arange(997) ** 2 % 11
    batches = RandomWindows(text, batch=4, length=12, seed=2)
    config = TrainingConfig(
        steps=STEPS, warmup=3, learning_rate=0.05, checkpoint_every=EVERY, micro_batches=2, keep=2
    )
    train(model, batches, config, folder)


def fork(action: Callable[[], None], said: Path) -> int:
    """Do it in a fork, what it says going to a file; returns the process number."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            action()
            code = 0
        finally:
            os._exit(code)
    return process


def ending(process: int) -> int:
    """The exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_before(number: int, action: Callable[[], None]) -> Callable[[], None]:
    """The action, with a SIGKILL in place of its `number`-th file operation, counted from 0."""

    def doomed() -> None:
        count = itertools.count()

        def hook(event: str, arguments: tuple) -> None:
            if event in FILE_EVENTS and next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        action()

    return doomed


def outcome(folder: Path) -> dict:
    """Sums of all that the last checkpoint holds, and what the log says, but for the speed."""
    manifest = checkpoint_path(folder, STEPS) / MANIFEST
    lines = [[line["step"], line["loss"], line["tokens"]] for line in read(folder / LOG)]
    return {"files": json.loads(manifest.read_text())["files"], "log": lines}


def struck(folder: Path, expected: dict) -> dict:
    """What the killed run had left, and whether going on from there leads to the same end."""
    steps = [int(path.name[5:]) for path in checkpoints(folder)]
    where = {"newest": max(steps, default=None), "saving": any(folder.glob(".step-*"))}
    code = ending(fork(lambda: work(folder), folder.with_suffix(".txt")))
    said = folder.with_suffix(".txt").read_text()
    identical = code == 0 and outcome(folder) == expected
    return where | {"code": code, "identical": identical, "refused": "refused" in said}


def at_random_moments(root: Path, expected: dict, seconds: float, request: dict) -> Iterator[dict]:
    chance, landed = random.Random(request["seed"]), 0
    for attempt in range(10 * request["count"]):
        if landed == request["count"]:
            return
        folder = root / f"run-{attempt}"
        process = fork(lambda folder=folder: work(folder), folder.with_suffix(".txt"))
        time.sleep(chance.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        if ending(process) == -signal.SIGKILL:  # else it had just finished
            landed += 1
            folder.mkdir(exist_ok=True)
            yield struck(folder, expected)


def at_each_operation_of_a_run(root: Path, expected: dict) -> Iterator[dict]:
    for number in itertools.count():
        folder = root / f"run-{number}"
        action = killed_before(number, lambda folder=folder: work(folder))
        if ending(fork(action, folder.with_suffix(".txt"))) != -signal.SIGKILL:
            return
        folder.mkdir(exist_ok=True)
        yield struck(folder, expected)


def at_each_operation_of_a_save(root: Path, damaged: bool) -> Iterator[dict]:
    """Save step 2 over an older step 1, and perhaps over a damaged step 2, keeping one."""
    states = {
        step: State({"w": {"w": torch.full((9,), float(step))}}, {"n": step}) for step in (1, 2)
    }
    for number in itertools.count():
        folder = root / f"save-{number}"
        folder.mkdir()
        for step in (1, 2) if damaged else (1,):
            save(folder, step, states[step])
        if damaged:
            (checkpoint_path(folder, 2) / "w.safetensors").write_bytes(b"not this")
        action = killed_before(number, lambda folder=folder: save(folder, 2, states[2], keep=1))
        code = ending(fork(action, folder.with_suffix(".txt")))
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            step, state = load_latest(folder)
        whole = state.tensors["w"]["w"].tolist() == [float(step)] * 9
        yield {"code": code, "step": step, "whole": whole, "refused": said.getvalue()}
        if code != -signal.SIGKILL:
            return


def experiments(root: Path, request: dict) -> Iterator[dict]:
    if request["kill"] == "save":
        yield from at_each_operation_of_a_save(root, request["damaged"])
        return
    reference = root / "reference"
    started = time.perf_counter()
    assert ending(fork(lambda: work(reference), root / "reference.txt")) == 0
    seconds, expected = time.perf_counter() - started, outcome(reference)
    if request["kill"] == "time":
        yield from at_random_moments(root, expected, seconds, request)
    else:
        yield from at_each_operation_of_a_run(root, expected)


if __name__ == "__main__":
    for line in sys.stdin:
        scratch = Path(sys.argv[1]) / "scratch"
        scratch.mkdir()
        for found in experiments(scratch, json.loads(line)):
            print(json.dumps(found), flush=True)
        print(flush=True)
        shutil.rmtree(scratch)
