"""Batches that are a function of the step: the position in the data is one number.

    start_j(step) = Philox(key = seed, counter = (step, j)) mod windows
    row_j(step)   = tokens[start_j : start_j + length + 1]

A usual generator must be replayed or its state saved to learn what batch 70,000 is. Philox is
counter-based: it scrambles its counter, so any batch can be had at once, in any order, and a
resumed run needs the step and nothing else. Windows are drawn with replacement; a row has one token
more than the model reads, because each token is asked for the next one.

Paper   Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
        doi:10.1145/2063384.2063405
Shapes  tokens [position]    a batch [batch, length + 1]
Run     uv run python implementations/training/batches.py
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor


@dataclass(frozen=True)
class RandomWindows:
    """Random windows of a long text, batch by batch: `windows(step)`.

    Args:
        tokens: the whole text, in memory or mapped from a file, of any integer type.
        batch: rows of a batch.
        length: tokens that the model reads; a row has one more.
        seed: another seed is another order of the data.

    Raises:
        ValueError: the text is shorter than one row, or a number is not positive.
    """

    tokens: Integer[Tensor, "position"]
    batch: int
    length: int
    seed: int = 0

    def __post_init__(self):
        if min(self.batch, self.length) < 1:
            raise ValueError(f"rows and tokens are at least 1, got {self.batch} x {self.length}")
        if self.seed < 0:
            raise ValueError(f"a seed is not negative, got {self.seed}")
        if self.windows < 1:
            raise ValueError(
                f"a row needs {self.length + 1} tokens, the text has {len(self.tokens)}"
            )

    @property
    def windows(self) -> int:
        """How many places a window can start at."""
        return len(self.tokens) - self.length

    def __call__(self, step: int) -> Int[Tensor, "batch token"]:
        """The batch of update `step`, as int64; the same one however often it is asked for."""
        starts = raw_numbers(self.seed, step, self.batch) % self.windows
        rows = [self.tokens[start : start + self.length + 1] for start in starts.tolist()]
        return torch.stack(rows).long()


def raw_numbers(seed: int, step: int, count: int) -> np.ndarray:
    """`count` random 64-bit numbers that depend on (seed, step) alone.

    The raw output of Philox, because NumPy promises that it never changes, which it does not for
    `Generator.integers`. The remainder favours low places by at most windows / 2^64.
    """
    # The low 64 bits count inside the step, so that no two steps share a counter.
    return np.random.Philox(key=seed, counter=step << 64).random_raw(count)


def map_tokens(path: Path, dtype: torch.dtype = torch.uint16) -> Integer[Tensor, "position"]:
    """A file of bare integers as a tensor that the system reads in page by page when asked.

    Raises:
        ValueError: the file's size is no multiple of the type's, or is zero.
        FileNotFoundError: there is no such file.
    """
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"{path} holds {size} bytes, no whole number of {dtype}")
    # Not shared: a write by mistake changes this process's copy, never the file.
    return torch.from_file(str(path), shared=False, size=size // dtype.itemsize, dtype=dtype)


def main() -> None:
    windows = RandomWindows(torch.arange(1_000_000), batch=3, length=7, seed=1)
    for step in (0, 1, 70_000, 1):
        print(f"  step {step:6}  rows start at {windows(step)[:, 0].tolist()}")


if __name__ == "__main__":
    main()
