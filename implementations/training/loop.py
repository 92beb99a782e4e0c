"""The training loop: updates until done, and whatever happens, no more than one interval is lost.

    resume or start -> update, observe, log, checkpoint -> update ... -> loss curve

A run is a folder: checkpoints step-00000100/, the log log.jsonl, the picture loss.png. The same
call on the same folder goes on where the last one was stopped, and ends with the same weights to
the bit, provided that the machine computes the same thing twice: same hardware, threads and torch.

Ctrl-C and SIGTERM write a checkpoint and leave; NaN stops the run before it reaches the weights.

Run     uv run python implementations/training/loop.py [FOLDER]
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from implementations.lab.command_line import clear_errors
from implementations.training.accumulation import Loss, next_token_loss
from implementations.training.batches import RandomWindows
from implementations.training.checkpoint import checkpoint_path
from implementations.training.guard import exclusive, stop_requests
from implementations.training.journal import (
    LOG,
    PICTURE,
    append,
    counted,
    cut,
    draw,
    processor_seconds,
)
from implementations.training.run import Batches, Diverged, Observe, Run
from implementations.training.settings import TrainingConfig


@dataclass(frozen=True)
class TrainingResult:
    """A finished run."""

    steps: int
    """updates that led to these weights"""
    loss: float
    """mean loss of the last batch, before its update"""
    tokens: int
    """tokens that were asked for, in all"""
    resumed_from: int | None
    """the checkpoint's step that this call began at; None if it began at the beginning"""
    checkpoint: Path
    log: Path
    picture: Path | None
    processor_seconds: float
    """that processors worked on it, in all calls; waiting for a turn is not counted"""


def train(
    model: nn.Module,
    batches: Batches,
    config: TrainingConfig,
    folder: Path,
    *,
    loss: Loss = next_token_loss,
    observe: Observe | None = None,
    wait: bool = False,
) -> TrainingResult:
    """Train `model` in place, or go on with what `folder` holds.

    Seed torch before the model is made: weights and dropout then are the same each time. The
    first checkpoint, of step 0, is written before any work, and shows that the folder can be.

    Args:
        batches: the batch of a step, a tensor or a tuple of tensors with equally many rows; the
            same batch whenever it is asked for, see batches.py.
        loss: `loss(model, batch)` gives the sum of the losses and how many they are; the default
            asks a decoder for each next token.
        observe: called with the step every `observe_every` updates and at the end, the model in
            eval mode: print a sample, measure on other data. What it returns joins the log's line.
        wait: while another process trains in the folder, and go on from what it leaves; guard.py
            says for whom that is.

    Raises:
        ValueError: a setting is wrong, another process trains in the folder and nobody waits, its
            checkpoints are all damaged, or it holds another run (model, settings or data).
        Diverged: a loss, gradient or weight is not finite (a ValueError too).
        OSError: the folder cannot be written; the last checkpoint there is good.
        SystemExit: after Ctrl-C (code 130) or SIGTERM (143), when the checkpoint is written; at
            once after Ctrl-C while it waits.
    """
    config.check()
    model.train()
    run, log = Run(model, batches, config, folder, loss), folder / LOG
    if run.finished():
        return result(run, began=config.steps)
    with exclusive(folder, wait=wait), counted(folder) as note, stop_requests() as asked:
        began = run.resume()
        if began is None:
            run.save()
        cut(log, run.step)
        with progress(config, run.step) as bar:
            while run.step < config.steps and not asked:
                line = updated(run, folder)
                last = run.step == config.steps
                if observe and (last or run.step % config.observe_every == 0):
                    line |= run.observe(observe)
                if last or run.step % config.log_every == 0:
                    append(log, line)
                if last or run.step % config.checkpoint_every == 0:
                    note()
                    run.save()
                bar.set_postfix_str(status(line), refresh=False)
                bar.update()
        if run.saved != run.step:  # asked to stop between two checkpoints
            run.save()
        draw(folder)
    if asked:
        print(
            f"stopped by {asked[0].name} after step {run.step} of {config.steps}; "
            f"{checkpoint_path(folder, run.step)} is written: the same command goes on from there",
            file=sys.stderr,
        )
        raise SystemExit(128 + asked[0])
    return result(run, began)


def result(run: Run, began: int | None) -> TrainingResult:
    """Of a run that has come to its end."""
    folder, picture = run.folder, run.folder / PICTURE
    return TrainingResult(
        steps=run.step,
        loss=run.last_loss,
        tokens=run.tokens,
        resumed_from=began,
        checkpoint=checkpoint_path(folder, run.step),
        log=folder / LOG,
        picture=picture if picture.exists() else draw(folder),
        processor_seconds=processor_seconds(folder),
    )


def updated(run: Run, folder: Path) -> dict[str, float]:
    """The line of one update; a run that diverges leaves the picture of how it did."""
    try:
        return run.update()
    except Diverged:
        draw(folder)
        raise


@contextmanager
def progress(config: TrainingConfig, step: int) -> Iterator[tqdm]:
    """A bar on stderr; none where that is a file, which the log serves better."""
    hidden = None if config.progress else True
    with tqdm(total=config.steps, initial=step, unit="step", disable=hidden) as bar:
        yield bar


def status(line: Mapping[str, float]) -> str:
    """What stands behind the bar."""
    text = f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s"
    return f"{text}, MFU {line['mfu']:.1%}" if "mfu" in line else text


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 32), nn.Dropout(0.1), nn.Linear(32, 50))
    batches = RandomWindows(torch.arange(10_000) % 50, batch=8, length=32)
    config = TrainingConfig(steps=300, warmup=20, learning_rate=0.03, checkpoint_every=50)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        result = train(model, batches, config, folder)
        print(f"{result.steps} steps, {result.tokens:,} tokens, last loss {result.loss:.3f} nats")
        print("left in the folder:", *sorted(p.name for p in folder.iterdir() if p.name[0] != "."))


if __name__ == "__main__":
    with clear_errors():
        main()
