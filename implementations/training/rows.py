"""Batches of rows that are a function of the step, for data that is a table: images, points.

    rows(step) = (seed, step) -> row numbers, drawn with replacement -> those rows of every tensor

What RandomWindows is for one long text, this is for examples that stand by themselves: nothing is
remembered between steps, so a run that goes on needs its step and nothing else.

Shapes  each tensor [row, ...]    a batch [batch, ...], or a tuple of them
Run     uv run python implementations/training/rows.py
"""

import torch
from torch import Tensor

from implementations.training.accumulation import Batch
from implementations.training.batches import raw_numbers


class RandomRows:
    """Random rows, the same ones of every tensor: `rows(step)`.

    Args:
        tensors: equally many rows in each, on any device.
        batch: rows of a batch.
        seed: another seed is another order of the data.

    Raises:
        ValueError: no tensors or no rows, tensors of different lengths, or a number that is wrong.
    """

    def __init__(self, *tensors: Tensor, batch: int, seed: int = 0):
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"all tensors have equally many rows, at least 1, got {lengths or 0}")
        if batch < 1 or seed < 0:
            raise ValueError(f"a batch has a row at least, a seed is not negative: {batch}, {seed}")
        self.tensors, self.batch, self.seed, self.rows = tensors, batch, seed, lengths.pop()

    def __call__(self, step: int) -> Batch:
        """The batch of update `step`; a tensor if there is one, else a tuple."""
        numbers = raw_numbers(self.seed, step, self.batch) % self.rows
        chosen = torch.from_numpy(numbers.astype("int64")).to(self.tensors[0].device)
        batch = tuple(tensor[chosen] for tensor in self.tensors)
        return batch[0] if len(batch) == 1 else batch


def main() -> None:
    images, labels = torch.rand(1000, 8, 8), torch.arange(1000)
    rows = RandomRows(images, labels, batch=5, seed=1)
    for step in (0, 1, 70_000, 1):
        batch, numbers = rows(step)
        print(f"  step {step:6}  {list(batch.shape)}, rows {numbers.tolist()}")


if __name__ == "__main__":
    main()
