"""GPTQ: round a layer's weights one column after the other, and let the rest make up for it.

    wanted    a layer that answers alike: minimise  |(W - Q) Xᵀ|² = samples · Σ_rows (w-q) H (w-q)ᵀ
              with H = Xᵀ X / samples, from a few inputs of the layer
    one step  round column j; move the columns F that are still real to where they serve best:
              w_F ← w_F - e_j U_jF,      e_j = (w_j - q_j) / U_jj,      H⁻¹ = Uᵀ U, U upper
    the end   |(W - Q) Xᵀ|² = samples · Σ_j e_j²: each rounding counts once, over U_jj²

The columns left at step j need the inverse of H without the rows and columns before j. All of these
inverses are in one factor: row j of U is that inverse's row j over the root of its diagonal, so
nothing is eliminated twice. `gptq_naive` solves for the rest anew after each column, as the
definition says. Updates of columns far to the right are gathered and made once a block.

A group's scale is taken when its first column's turn comes, from the weights as they then are. With
`order` the columns with the largest inputs go first, while many real ones are left to make up for
them; neighbours in memory then come at different times, and all scales are of the first weights.

Paper   Frantar et al. 2022, arXiv:2210.17323; the step: Hassibi & Stork 1993, "Second order
        derivatives for network pruning: optimal brain surgeon"
Shapes  weight [row, column]    hessian [column, column]    inputs [sample, column]
Run     uv run python implementations/precision/gptq.py
"""

import torch
from jaxtyping import Float
from torch import Tensor

from implementations.precision.block_quantization import (
    Quantized,
    assembled,
    check,
    grid,
    nearest_words,
)

DAMPING = 0.01  # of the mean of H's diagonal, added to it
BLOCK = 128  # columns between two updates of all that follow them


def hessian(inputs: Float[Tensor, "*sample column"]) -> Float[Tensor, "column column"]:
    """Xᵀ X / samples, in float32 or wider: half the second derivative of a mean squared error."""
    rows = inputs.flatten(0, -2)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows.mT @ rows / max(1, len(rows))


def gptq(
    weight: Float[Tensor, "row column"],
    hessian: Float[Tensor, "column column"],
    bits: int,
    group: int = 64,
    *,
    damping: float = DAMPING,
    order: bool = False,
    block: int = BLOCK,
) -> Quantized:
    """The words of `quantize`, chosen for the inputs that the Hessian is of. Rows do not meet.

    A column whose input was always zero is rounded to the nearest, and moves no other.

    Args:
        damping: added to the diagonal, in units of its mean: what is not seen in few inputs must
            not move the weights without bounds.
        order: largest inputs first.
        block: columns whose updates of the rest are made at once, rounded up to whole groups; of
            no consequence but for time.

    Raises:
        ValueError: what `quantize` refuses, a Hessian of another size, that is not finite, all zero
            or even when damped not positive definite.
    """
    check(weight, bits, group)
    damped = damped_hessian(weight, hessian, damping)
    columns = weight.shape[1]
    turns = torch.arange(columns, device=weight.device)
    if order:
        turns = damped.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(damped[turns][:, turns]).to(
        torch.promote_types(weight.dtype, torch.float32)
    )
    rest = weight.to(factor.dtype)[:, turns]
    words = torch.empty_like(rest)
    scale, zero = grid(weight.to(factor.dtype).unflatten(-1, (-1, group)), bits)
    block = -(-block // group) * group  # no group reaches past its block
    for first in range(0, columns, block):
        last = min(first + block, columns)
        errors = torch.empty_like(rest[:, first:last])
        for j in range(first, last):
            k = int(turns[j]) // group
            if j % group == 0 and not order:
                scale[:, k], zero[:, k] = grid(rest[:, j : j + group], bits)
            column = rest[:, j : j + 1]
            words[:, j : j + 1] = nearest_words(column, scale[:, k], zero[:, k], bits)
            meant = scale[:, k].to(rest.dtype) * (words[:, j] - zero[:, k])
            error = (column[:, 0] - meant) / factor[j, j]
            rest[:, j + 1 : last] -= error[:, None] * factor[j, j + 1 : last]
            errors[:, j - first] = error
        rest[:, last:] -= errors @ factor[first:last, last:]
    restored = torch.empty_like(words)
    restored[:, turns] = words
    return assembled(restored.unflatten(-1, (-1, group)), scale, zero, bits)


def gptq_naive(
    weight: Float[Tensor, "row column"],
    hessian: Float[Tensor, "column column"],
    bits: int,
    group: int = 64,
    *,
    damping: float = DAMPING,
) -> Quantized:
    """`gptq` as it is defined: after each column, the best real values of all columns left.

    With the columns S rounded, the gradient of the error is zero on the others, F:
    H_FF (w_F - w⁰_F) = H_FS (w⁰_S - q_S).
    """
    check(weight, bits, group)
    damped = damped_hessian(weight, hessian, damping)
    start = weight.to(damped.dtype)
    rest, words = start.clone(), torch.empty_like(start)
    scale, zero = grid(start.unflatten(-1, (-1, group)), bits)
    for j in range(weight.shape[1]):
        k = j // group
        if j % group == 0:
            scale[:, k], zero[:, k] = grid(rest[:, j : j + group], bits)
        words[:, j : j + 1] = nearest_words(rest[:, j : j + 1], scale[:, k], zero[:, k], bits)
        rest[:, j] = scale[:, k].to(rest.dtype) * (words[:, j] - zero[:, k])
        pull = (start - rest)[:, : j + 1] @ damped[: j + 1, j + 1 :]
        rest[:, j + 1 :] = (
            start[:, j + 1 :] + torch.linalg.solve(damped[j + 1 :, j + 1 :], pull.mT).mT
        )
    return assembled(words.unflatten(-1, (-1, group)), scale, zero, bits)


def damped_hessian(
    weight: Tensor, hessian: Tensor, damping: float
) -> Float[Tensor, "column column"]:
    """The Hessian in float64 with its damped diagonal; raises ValueError for one that cannot be."""
    columns = weight.shape[-1]
    if hessian.shape != (columns, columns):
        raise ValueError(
            f"weights of {columns} columns need a Hessian of as many, got {list(hessian.shape)}"
        )
    if damping < 0:
        raise ValueError(f"damping is not negative, got {damping}")
    if not hessian.isfinite().all():
        raise ValueError("the Hessian is not finite: an input of the layer was infinite or NaN")
    mean = hessian.double().diagonal().mean()
    if mean == 0:
        raise ValueError("the Hessian is zero: the layer saw no input, or only zeros")
    identity = torch.eye(columns, dtype=torch.float64, device=hessian.device)
    return hessian.double() + damping * mean * identity


def inverse_factor(damped: Float[Tensor, "column column"]) -> Float[Tensor, "column column"]:
    """U, upper, of H⁻¹ = Uᵀ U.

    Raises:
        ValueError: H is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ValueError(
            f"the Hessian is not positive definite from column {int(failed) - 1} on: give more "
            "samples than columns, or more damping"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def main() -> None:
    from implementations.precision.block_quantization import dequantize, quantize
    from implementations.sources.weights import minilm_weights

    torch.manual_seed(0)
    weight = minilm_weights()["encoder.layer.0.intermediate.dense.weight"]
    mixing = torch.randn(48, weight.shape[1])
    inputs = torch.randn(2048, 48) @ mixing + 0.3 * torch.randn(2048, weight.shape[1])
    exact = inputs @ weight.T
    print("relative error of a layer's answer, on inputs that lie near a space of 48 dimensions")
    for bits in (4, 3, 2):
        errors = []
        for stored in (
            quantize(weight, bits, 64),
            gptq(weight, hessian(inputs), bits),
            gptq(weight, hessian(inputs), bits, order=True),
        ):
            apart = inputs @ dequantize(stored).T - exact
            errors.append((apart.norm() / exact.norm()).item())
        nearest, greedy, ordered = errors
        print(
            f"  {bits} bits   nearest {nearest:6.2%}   GPTQ {greedy:6.2%}   in order {ordered:6.2%}"
        )


if __name__ == "__main__":
    main()
