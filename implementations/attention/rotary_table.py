"""Rotary positions from a table: the cosines and sines of all positions are computed once.

    cos[p, i] = cos(p f_i),  sin[p, i] = sin(p f_i)        for every position p of a model

A decoder turns queries and keys in every layer by the same angles. Computed anew each time they
cost more than the turning itself. The bits are those of `rotate_half_split`.

Paper   Su et al. 2021, arXiv:2104.09864
Shapes  x [..., token, dim]
Run     uv run python implementations/attention/rotary_table.py
"""

import torch
from jaxtyping import Float
from torch import Tensor

from implementations.attention.positions import Positions, angles, rotate_half_split


class RotaryTable:
    """A function with the signature of `rotate_half_split`, for one base and so many positions.

    Args:
        count: how many positions there are.
        dim: of a head.
        base: as in `rotate_half_split`.
        dtype: of the angles, float32 or wider.
        device: where the heads are that it turns.

    Raises:
        ValueError: the dim is odd.
    """

    def __init__(
        self,
        count: int,
        dim: int,
        base: float = 10000.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        angle = angles(torch.arange(count, dtype=dtype, device=device), dim, base)
        self.cos, self.sin, self.base = angle.cos(), angle.sin(), base

    def __call__(
        self,
        x: Float[Tensor, "*batch token dim"],
        positions: Positions | None = None,
        base: float | None = None,
    ) -> Float[Tensor, "*batch token dim"]:
        """(first, second) -> (first cos - second sin, first sin + second cos).

        Raises:
            ValueError: another base, dim or number of positions than the table's, or a dtype that
                is wider.
        """
        tokens, dim = x.shape[-2:]
        if base not in (None, self.base):
            raise ValueError(f"the table is of base {self.base}, asked for {base}")
        if dim != 2 * self.cos.shape[1]:
            raise ValueError(f"the table turns heads of dim {2 * self.cos.shape[1]}, got {dim}")
        if torch.promote_types(x.dtype, self.cos.dtype) != self.cos.dtype:
            raise ValueError(f"the table's angles are {self.cos.dtype}, got {x.dtype}")
        if tokens > len(self.cos) or (positions is not None and len(positions) != tokens):
            given = tokens if positions is None else len(positions)
            raise ValueError(
                f"{tokens} tokens got {given} of the table's {len(self.cos)} positions"
            )
        rows = slice(tokens) if positions is None else positions
        cos, sin = self.cos[rows], self.sin[rows]
        first, second = x.to(cos.dtype).chunk(2, -1)
        turned = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
        return turned.to(x.dtype)


def main() -> None:
    from implementations.lab.timing import time_interleaved

    torch.manual_seed(0)
    torch.set_num_threads(1)
    table, x, place = RotaryTable(8192, 64), torch.randn(1, 9, 1, 64), torch.tensor([700])
    same = torch.equal(table(x, place), rotate_half_split(x, place))
    forms = {"table": lambda x: table(x, place), "anew": lambda x: rotate_half_split(x, place)}
    timings = time_interleaved(forms, x, rounds=200)
    for name in forms:
        print(f"one token, nine heads, {name}: {timings.median(name) * 1e6:.0f} µs")
    print(f"the same bits: {same}")


if __name__ == "__main__":
    main()
