"""Weights in the order that decoding reads fastest: by column, where outputs are many.

    row-major      y_i = Σ_j W_ij x_j    a dot product for each row, each with a sum to end
    column-major   y  += x_j W_:j        a scaled column added to y, no sum to end; y stays near

A pass over one token reads every weight once and does two operations with it, so it is as fast as
the reading. Torch keeps a linear layer's weight row by row. On a CPU the same numbers stored column
by column are read up to twice as fast where there are more outputs than inputs (a vocabulary, a
gated layer), and no faster where there are fewer. Only the strides change: shape, values and
`state_dict` stay, and so does every function that takes the layer.

Run     uv run python implementations/serving/weight_layout.py
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implementations.layers.embeddings import Embedding


def column_major(weight: Float[Tensor, "output input"]) -> Float[Tensor, "output input"]:
    """A copy of the same matrix whose columns are contiguous."""
    return weight.t().contiguous().t()


def store_for_decoding(module: nn.Module) -> None:
    """Store, in place, the weights of linear layers and tables that have at least as many outputs
    as inputs column by column.

    Looking up a row of such a table touches as many cache lines as the row has numbers: nothing for
    a token, something for a long prompt.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | Embedding):
            outputs, inputs = part.weight.shape
            if outputs >= inputs:
                part.weight.data = column_major(part.weight.data)


def main() -> None:
    from implementations.lab.timing import time_interleaved

    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("outputs x inputs   row-major   column-major   GB/s of weights, one token, one thread")
    for shape in ((576, 1536), (576, 576), (1536, 576), (49152, 576)):
        count = max(1, 10**8 // (4 * shape[0] * shape[1]))  # more than a cache holds
        rows = [torch.randn(shape) for _ in range(count)]
        columns = [column_major(weight) for weight in rows]
        timings = time_interleaved(
            {
                "row": lambda x, rows=rows: [nn.functional.linear(x, w) for w in rows],
                "column": lambda x, columns=columns: [nn.functional.linear(x, w) for w in columns],
            },
            torch.randn(1, shape[1]),
        )
        speed = {name: count * rows[0].nbytes / timings.median(name) for name in timings.seconds}
        name = f"{shape[0]} x {shape[1]}"
        print(f"{name:16} {speed['row'] / 1e9:11.1f} {speed['column'] / 1e9:14.1f}")


if __name__ == "__main__":
    main()
