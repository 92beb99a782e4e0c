"""Sums in finite precision: what is lost when a long sum meets a small term, and how to keep it.

    fl(a + b) = (a + b)(1 + δ)    |δ| <= u, half the spacing at one      γ(k) = k u / (1 - k u)

    in order    total = fl(total + x)                          |error| <= γ(n - 1) Σ|x|
    pairwise    halve the list by adding neighbours, again     |error| <= γ(⌈log2 n⌉) Σ|x|
    Kahan       carry what the last addition lost              |error| <= (2 u + O(n u²)) Σ|x|
    Neumaier    sum what all additions lost, add it at last    |error| <= u |Σx| + γ(n - 1)² Σ|x|

Rounding errors of random sign grow as √n, not n; a sum so long that each term is below half its
spacing does not move at all. That is the fate of bf16 weights: `kahan_add` holds what the weight
could not, in a second bf16 number, as an alternative to fp32 master weights.

Paper   Kahan 1965; Neumaier 1974; Ogita, Rump & Oishi 2005 (the last bound); Higham 2002, chapter 4
Shapes  x [..., terms] -> [...], each addition rounded to the dtype of x
Run     uv run python implementations/precision/summation.py
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad


def sum_in_order(x: Float[Tensor, "*batch terms"]) -> Float[Tensor, "*batch"]:
    """One running total."""
    total = torch.zeros_like(x[..., :0].sum(-1))
    for term in x.unbind(-1):
        total = total + term
    return total


def sum_pairwise(x: Float[Tensor, "*batch terms"]) -> Float[Tensor, "*batch"]:
    """A tree: each term goes through ⌈log2 n⌉ additions instead of up to n - 1."""
    x = pad(x, (0, 1)) if x.shape[-1] == 0 else x
    while x.shape[-1] > 1:
        x = pad(x, (0, x.shape[-1] % 2))
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def kahan_add(
    total: Float[Tensor, "*batch"], lost: Float[Tensor, "*batch"], term: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """(total, lost) after one more term; the sum so far is total + lost, which begins as zeros."""
    corrected = term + lost
    longer = total + corrected
    return longer, corrected - (longer - total)


def sum_kahan(x: Float[Tensor, "*batch terms"]) -> Float[Tensor, "*batch"]:
    """A running total that gives each new term what the last addition lost."""
    total = lost = torch.zeros_like(x[..., :0].sum(-1))
    for term in x.unbind(-1):
        total, lost = kahan_add(total, lost, term)
    return total


def sum_neumaier(x: Float[Tensor, "*batch terms"]) -> Float[Tensor, "*batch"]:
    """A running total, and beside it the exact loss of every addition, added at the end.

    Kahan's loss is exact only while the total is larger than the term; here the smaller is asked.
    """
    total = losses = torch.zeros_like(x[..., :0].sum(-1))
    for term in x.unbind(-1):
        longer = total + term
        is_larger = total.abs() >= term.abs()
        larger, smaller = torch.where(is_larger, total, term), torch.where(is_larger, term, total)
        losses = losses + (smaller - (longer - larger))
        total = longer
    return total + losses


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: a rounded result is off by at most this share of itself."""
    return torch.finfo(dtype).eps / 2


def gamma(additions: int, u: float) -> float:
    """γ(k), which bounds (1 + u)^k - 1: what k roundings may add up to.

    Raises:
        ValueError: k u is one or more, so that no digit is safe.
    """
    if additions * u >= 1:
        raise ValueError(f"{additions} roundings of {u:.1e} have no bound: their product is >= 1")
    return additions * u / (1 - additions * u)


def bound_in_order(x: Float[Tensor, "*batch terms"]) -> Float[Tensor, "*batch"]:
    """The most that `sum_in_order` may be off, in float64. Errors are those of `gamma`."""
    factor = gamma(max(x.shape[-1] - 1, 0), unit_roundoff(x.dtype))
    return factor * x.double().abs().sum(-1)


def bound_pairwise(x: Float[Tensor, "*batch terms"]) -> Float[Tensor, "*batch"]:
    """The most that `sum_pairwise` may be off, in float64."""
    depth = math.ceil(math.log2(max(x.shape[-1], 1)))
    return gamma(depth, unit_roundoff(x.dtype)) * x.double().abs().sum(-1)


def bound_neumaier(x: Float[Tensor, "*batch terms"]) -> Float[Tensor, "*batch"]:
    """The most that `sum_neumaier` may be off, in float64. Errors are those of `gamma`."""
    u, wide = unit_roundoff(x.dtype), x.double()
    second_order = gamma(max(x.shape[-1] - 1, 0), u) ** 2
    return u * wide.sum(-1).abs() + second_order * wide.abs().sum(-1)


def main() -> None:
    torch.manual_seed(0)
    sums = {"in order": sum_in_order, "pairwise": sum_pairwise}
    sums |= {"Kahan": sum_kahan, "Neumaier": sum_neumaier}
    print("root mean square error of a float32 sum of n uniform numbers, in units of u Σ|x|")
    lengths = (16, 256, 4096)
    print(f"{'n':10}" + "".join(f"{n:10}" for n in lengths))
    rows = [torch.rand(256, n) for n in lengths]
    for name, add in sums.items():
        errors = []
        for x in rows:
            exact = x.double().sum(-1)
            relative = (add(x).double() - exact) / exact / unit_roundoff(x.dtype)
            errors.append(relative.square().mean().sqrt().item())
        print(f"{name:10}" + "".join(f"{error:10.2f}" for error in errors))
    updates = torch.full((1000,), 1e-3).bfloat16()
    grown = torch.cat([torch.ones(1).bfloat16(), updates])
    print("a bf16 weight of 1, a thousand times increased by 0.001:")
    for name, add in sums.items():
        print(f"    {name:10}{add(grown).item():.3f}")


if __name__ == "__main__":
    main()
