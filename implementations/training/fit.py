"""A short training: the updates of run.py and a progress bar, with nothing on the disk.

    for step: gradient of the batch's mean loss -> clipped -> Adam at this step's rate

For what takes a minute or two; what takes longer goes through loop.py, whose runs can be stopped.

Run     uv run python implementations/training/fit.py
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from implementations.training.accumulation import Loss
from implementations.training.rows import RandomRows
from implementations.training.run import Batches, Run
from implementations.training.settings import TrainingConfig


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    final: float = 0.01,
    clip: float = torch.inf,
    watch: Callable[[int], None] | None = None,
    title: str = "",
) -> list[float]:
    """Train `model` in place and return the mean loss of every batch, before its update.

    Args:
        batches: the batch of a step, such as a RandomRows.
        loss: `loss(model, batch)` gives the sum of the losses and how many they are.
        learning_rate: the highest one; a cosine leads from it to `final` times it.
        clip: the longest gradient allowed.
        watch: called with the number of updates done, before each update and at the end.
        title: what the progress bar is called.

    Raises:
        ValueError: a setting is wrong.
        Diverged: a loss or gradient is not finite; the weights are those of before.
    """
    settings = {"learning_rate": learning_rate, "final": final, "clip": clip}
    config = TrainingConfig(steps=steps, warmup=0, weight_decay=0.0, betas=(0.9, 0.999), **settings)
    config.check()
    losses = []
    model.train()
    with tempfile.TemporaryDirectory() as empty, tqdm(total=steps, desc=title, unit="step") as bar:
        run = Run(model, batches, config, Path(empty), loss)
        while run.step < steps:
            if watch:
                watch(run.step)
            losses.append(run.update()["loss"])
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
    if watch:
        watch(steps)
    model.eval()
    return losses


def main() -> None:
    torch.manual_seed(0)
    x = torch.rand(512, 1)
    rows = RandomRows(x, torch.sin(6 * x), batch=64)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))

    def squares(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, int]:
        return (model(batch[0]) - batch[1]).square().sum(), len(batch[0])

    losses = fit(model, rows, squares, steps=500, learning_rate=0.03, title="a sine")
    print(f"mean square error {losses[0]:.3f} at first, {losses[-1]:.5f} at last")


if __name__ == "__main__":
    main()
