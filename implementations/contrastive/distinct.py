"""Batches in which nobody is their own negative: a member of each of several different families.

    epoch, place = divmod(step · batch, families)     one shuffle of the families an epoch
    batch(step)  = of each family in turn one member

Drawn with replacement, 128 of 1,500 pictures hold five pairs of the same picture on average, and
InfoNCE would push each of them away from itself. So would it a cook from a woman who cooks, where
both are drawn alike: a family is all that counts as the same. Everything is a function of the step.

Shapes  families [row]    a batch of rows [batch]
Run     uv run python implementations/contrastive/distinct.py
"""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from implementations.training.batches import raw_numbers

STREAM = 2 << 64  # Philox's key has two words: the low one is the seed, the high one this use of it


class DistinctRows:
    """Rows of different families, batch by batch: `rows(step)`.

    Args:
        families: the family of each row; rows of one family never meet in a batch.
        batch: rows of a batch.
        seed: another seed is another order.

    Raises:
        ValueError: more rows in a batch than families, fewer than two, or a negative seed.
    """

    def __init__(self, families: Int[Tensor, " row"], *, batch: int, seed: int = 0):
        order = families.argsort(stable=True)
        self.members = order.split(families.unique(return_counts=True)[1].tolist())
        if not 2 <= batch <= len(self.members):
            raise ValueError(
                f"a contrastive batch has from 2 to all {len(self.members)} families, got {batch}"
            )
        if seed < 0:
            raise ValueError(f"a seed is not negative, got {seed}")
        self.batch, self.seed = batch, seed

    def __call__(self, step: int) -> Int[Tensor, " batch"]:
        """The rows of update `step`; an epoch's last, incomplete batch is left out."""
        epoch, place = divmod(step, len(self.members) // self.batch)
        shuffled = np.argsort(raw_numbers(STREAM + self.seed, epoch, len(self.members)))
        chosen = shuffled[place * self.batch : (place + 1) * self.batch]
        which = raw_numbers(STREAM * 2 + self.seed, step, self.batch)
        families = (self.members[family] for family in chosen)
        rows = [rows[int(w) % len(rows)] for rows, w in zip(families, which.tolist(), strict=True)]
        return torch.stack(rows)


def main() -> None:
    families = torch.arange(1000) // 2
    rows = DistinctRows(families, batch=128)
    met = [128 - len((torch.randint(1000, (128,)) // 2).unique()) for _ in range(100)]
    ours = [128 - len(families[rows(step)].unique()) for step in range(100)]
    print("1,000 pictures in 500 families, 128 a batch: pictures that meet their like")
    print(f"  drawn with replacement  {np.mean(met):.1f} a batch")
    print(f"  distinct families       {np.mean(ours):.1f} a batch")


if __name__ == "__main__":
    main()
