"""How wrong may a fast path be? Two questions, asked apart.

    same function?   in float64: |fast - naive| <= 1e-10 |naive|, outputs and every gradient
    same accuracy?   in a narrow dtype: error(fast, exact) <= 2 error(naive, exact) + rounding

In float64 the naive form's own error is nothing, so the second question cannot answer the first; in
bfloat16 nothing agrees to 1e-10, so the first cannot answer the second. `exact` is the naive form
on the same narrow inputs widened to float64. The largest error finds a wrong tile, the mean finds a
narrow accumulator: rounding the probabilities once already costs a perfect kernel 1.5 to 1.6 times
naive's error, while a bfloat16 accumulator costs 2.4 to 3.5 times.

Run     uv run python implementations/lab/compare.py
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Error(NamedTuple):
    """Absolute differences from the exact answer, in the units of the answer."""

    largest: float
    mean: float


def error(approximate: Tensor, exact: Tensor) -> Error:
    """Largest and mean absolute difference; equal infinities differ by nothing.

    NaN where either is NaN, so that NaN never passes.

    Raises:
        ValueError: the shapes differ.
    """
    if approximate.shape != exact.shape:
        raise ValueError(f"shapes differ: {tuple(approximate.shape)} and {tuple(exact.shape)}")
    if exact.numel() == 0:
        return Error(0.0, 0.0)
    approximate, exact = approximate.detach().to(exact.device).double(), exact.detach().double()
    difference = (approximate - exact).abs().masked_fill(approximate == exact, 0.0)
    return Error(difference.max().item(), difference.mean().item())


def magnitude(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Absolute values in float64; zero for an infinity, which would allow every error."""
    return x.detach().double().abs().masked_fill(x.detach().isinf(), 0.0)


def allowed(naive: Tensor, exact: Tensor, slack: float = 2.0) -> Error:
    """The error that a fast path may show next to naive's own: `slack` times it, plus one rounding.

    One rounding of a value x is at most eps/2 |x|; over many values it is half of that on average.
    """
    own = error(naive, exact)
    if exact.numel() == 0:
        return Error(0.0, 0.0)
    unit = torch.finfo(naive.dtype).eps / 2
    size = magnitude(exact)
    return Error(
        slack * own.largest + unit * size.max().item(),
        slack * own.mean + unit * size.mean().item() / 2,
    )


def outputs_and_gradients(
    function: Callable, inputs: Sequence[Tensor], upstream: Tensor | None = None
) -> list[Tensor]:
    """The output, then the gradient of every floating-point input under a given upstream gradient.

    Without `upstream` a random one is drawn: all-ones would hide every error that sums to zero, and
    softmax rows are made of those. An input that the output does not depend on has gradient zero.
    """
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    output = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not (wanted and output.requires_grad):
        return [output, *map(torch.zeros_like, wanted)]
    upstream = torch.randn_like(output) if upstream is None else upstream.to(output)
    return [output, *torch.autograd.grad(output, wanted, upstream, materialize_grads=True)]


def assert_same_function(
    fast: Callable, naive: Callable, *inputs: Tensor, relative: float = 1e-10
) -> None:
    """Outputs and gradients of `fast` and `naive` agree in float64, relative to the largest value
    or to 1.

    Raises:
        ValueError: a floating-point input is not float64.
        AssertionError: naming the output or the gradient that differs.
    """
    if narrow := [x.dtype for x in inputs if x.is_floating_point() and x.dtype != torch.float64]:
        raise ValueError(f"whether two forms are one function is asked in float64, got {narrow}")
    upstream = torch.randn_like(naive(*inputs))
    expected = outputs_and_gradients(naive, inputs, upstream)
    actual = outputs_and_gradients(fast, inputs, upstream)
    for name, got, want in zip(names(expected), actual, expected, strict=True):
        limit = relative * max(1.0, magnitude(want).max().item()) if want.numel() else 0.0
        assert error(got, want).largest <= limit, f"{name}: {error(got, want)} over {limit:.1e}"


def assert_same_accuracy(
    fast: Callable,
    naive: Callable,
    *inputs: Tensor,
    slack: float = 2.0,
    known: float = 0.0,
    floor: Callable[..., Sequence[Tensor]] | None = None,
) -> None:
    """`fast` is at most `slack` times as wrong as `naive`, in the largest error and in the mean.

    Where `naive` overflows, nothing can be said about `fast`, and that fails too.

    Args:
        known: allowed besides, relative to the answer's largest value and to its mean size: the
            documented error of an instruction that naive does not use.
        floor: of the widened inputs and the upstream gradient, what each value of the output and
            of every gradient may be wrong by in any order of its sums: no limit is below it. It is
            for answers that cancel to zero, which naive may hit by luck.

    Raises:
        AssertionError: naming the output or the gradient that is too wrong.
    """
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    upstream = torch.randn_like(naive(*inputs))
    exact = outputs_and_gradients(naive, wide, upstream)
    own = outputs_and_gradients(naive, inputs, upstream)
    got = outputs_and_gradients(fast, inputs, upstream)
    least = map(torch.zeros_like, exact) if floor is None else floor(*wide, upstream.double())
    for name, fast_value, naive_value, exact_value, floor_value in zip(
        names(exact), got, own, exact, least, strict=True
    ):
        assert fast_value.dtype == naive_value.dtype, f"{name}: {fast_value.dtype}"
        limit = allowed(naive_value, exact_value, slack)
        if known and exact_value.numel():
            size = known * magnitude(exact_value)
            limit = Error(limit.largest + size.max().item(), limit.mean + size.mean().item())
        limit = Error(*map(max, limit, error(floor_value, torch.zeros_like(floor_value))))
        seen = error(fast_value, exact_value)
        for kind, wrong, most in zip(Error._fields, seen, limit, strict=True):
            assert wrong <= most < torch.inf, f"{name}: {kind} error {wrong:.2e} over {most:.2e}"


def names(values: Sequence) -> list[str]:
    """What `outputs_and_gradients` returned, in words."""
    return ["output"] + [f"gradient of input {i}" for i in range(len(values) - 1)]


def main() -> None:
    torch.manual_seed(0)
    values = torch.rand(4096, 256).bfloat16()
    exact = values.double().sum(-1)
    narrow = torch.zeros(4096, dtype=torch.bfloat16)
    for column in values.T:
        narrow = narrow + column
    print("sums of 256 bfloat16 numbers      largest error     mean error")
    limit = allowed(values.sum(-1), exact)
    for name, seen in {
        "accumulated in float32": error(values.sum(-1), exact),
        "accumulated in bfloat16": error(narrow, exact),
        "allowed": limit,
    }.items():
        print(f"  {name:30}  {seen.largest:14.4f} {seen.mean:14.4f}")


if __name__ == "__main__":
    main()
