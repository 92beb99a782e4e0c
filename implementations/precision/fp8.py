"""fp8 for a linear layer: three products of 8-bit numbers, and where their scales come from.

    forward    y  = x Wᵀ       x and W in e4m3: three fraction bits
    backward   dx = dy W       dy in e5m2: less precise, 57,344 instead of 448 at its end
               dW = dyᵀ x
    word = fp8(scale · number)    number ≈ word · inverse    scale = largest / amax = 1 / inverse

fp8 spans too little to hold a tensor as it is; a scale moves the tensor's largest number, its amax,
to the format's largest. Whose amax?

    current   the tensor's own: exact, and the tensor is read twice
    delayed   the largest of the last steps': one read; what has grown is cut off at the end
    block     of each 128 neighbours along the sum, or 128 x 128 weights: an outlier costs only them

Each operand is needed in two directions: x along its channels forward, along its tokens for dW. So
a scaling returns two forms, of x and of xᵀ, both dense along the sum of their product. What is not
finite makes its whole block NaN: nothing hides it from the guard that skips the step.

Paper   Micikevicius et al. 2022, arXiv:2209.05433; blocks: DeepSeek-V3, arXiv:2412.19437, 3.3.2
Shapes  x [token, input]    weight [output, input]    inverse [] or [row blocks, column blocks]
Fast    fp8_triton.py: both forms of a tensor in one launch; torch._scaled_mm: the products
Run     uv run python implementations/precision/fp8.py
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn.functional import pad

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SIDE = 128  # of a block
SMALLEST_NORMAL = 2.0**-126
HISTORY = 16  # amaxes that delayed scaling remembers
ALIGNMENT = 16  # the numbers that tensor cores take at a time

Block = tuple[int, int]


class Scaled(NamedTuple):
    """A matrix in fp8 with what its words are to be multiplied by."""

    values: Tensor
    inverse: Float32[Tensor, "*blocks"]
    """one number, or one for each block"""
    block: Block | None = None
    """rows and columns of a block; None: the whole tensor"""


Both = tuple[Scaled, Scaled]
"""x and xᵀ, each dense along its last axis"""
Scaling = Callable[[Tensor, torch.dtype], Both]
Product = Callable[[Scaled, Scaled, torch.dtype], Tensor]
"""(left [row, inner], right [column, inner], dtype) -> left rightᵀ"""


def largest(dtype: torch.dtype) -> float:
    """448 or 57,344."""
    return torch.finfo(dtype).max


def scale_of(amax: Float32[Tensor, "*blocks"], dtype: torch.dtype) -> Float32[Tensor, "*blocks"]:
    """largest / amax, and 1 where all is zero. Neither it nor its inverse leaves float32's normal
    numbers, so that an amax below 448 · 2^-126 is scaled as if it were that."""
    # Not 448 / amax, which torch computes as (1 / amax) · 448: two roundings, the kernel has one.
    end = torch.full_like(amax, largest(dtype))
    scale = end / amax.clamp(min=largest(dtype) * SMALLEST_NORMAL)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def amax_of(x: Float[Tensor, "row column"], block: Block | None = None) -> Float32[Tensor, "..."]:
    """The largest absolute value of the tensor, or of each block; zero where there is nothing."""
    if block is None:
        if not x.numel():
            return torch.zeros((), device=x.device)
        # One pass over x, where abs() would write it once more.
        return torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    size = x.float().abs()
    for axis, side in enumerate(block):
        count = -(-x.shape[axis] // side)
        size = pad(size.transpose(axis, -1), (0, count * side - x.shape[axis]))
        size = size.unflatten(-1, (count, side)).amax(-1).transpose(axis, -1)
    return size


def spread(numbers: Float32[Tensor, "..."], block: Block | None, shape: torch.Size) -> Tensor:
    """One number a block -> one for each place of a matrix of that shape."""
    if block is None:
        return numbers
    rows, columns = block
    whole = numbers.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return whole[: shape[0], : shape[1]]


def quantize(
    x: Float[Tensor, "row column"],
    dtype: torch.dtype,
    scale: Float32[Tensor, "..."],
    block: Block | None = None,
) -> Scaled:
    """Round scale · x to fp8; what passes the format's largest number becomes it, NaN stays.

    Raises:
        ValueError: `x` is float64, which would be rounded twice, or no matrix.
    """
    check(x)
    end = largest(dtype)
    wide = (x.float() * spread(scale, block, x.shape)).clamp(-end, end)
    return Scaled(wide.to(dtype), 1 / scale, block)


def dequantize(scaled: Scaled) -> Float32[Tensor, "row column"]:
    """word · inverse."""
    return scaled.values.float() * spread(scaled.inverse, scaled.block, scaled.values.shape)


def check(x: Tensor) -> None:
    """Raise ValueError unless `x` is a matrix that is rounded once."""
    if x.ndim != 2:
        raise ValueError(f"a scaling is of a matrix, got the shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"fp8 is made from float32 or a narrower float, got {x.dtype}")


# The two forms of a matrix, given its scale or from its own blocks


def quantize_both(
    x: Float[Tensor, "row column"], dtype: torch.dtype, scale: Float32[Tensor, ""]
) -> tuple[Scaled, Scaled, Float32[Tensor, ""]]:
    """x and xᵀ under one scale, and the amax that was met on the way: the next steps' scale."""
    row_form = quantize(x, dtype, scale)
    column_form = Scaled(row_form.values.mT.contiguous(), row_form.inverse)
    return row_form, column_form, amax_of(x)


def quantize_blocks(
    x: Float[Tensor, "row column"], dtype: torch.dtype, block: Block = (1, SIDE)
) -> Both:
    """x and xᵀ, each in blocks of that shape with a scale of their own.

    With 1 x 128 the two are rounded apart: a block of xᵀ runs along the other axis.
    """

    def form(x: Tensor) -> Scaled:
        return quantize(x, dtype, scale_of(amax_of(x, block), dtype), block)

    return form(x), form(x.mT.contiguous())


# Where the scales come from


def current(
    x: Float[Tensor, "row column"], dtype: torch.dtype, quantize: Callable = quantize_both
) -> Both:
    """Scaled by the tensor's own amax."""
    return quantize(x, dtype, scale_of(amax_of(x), dtype))[:2]


class Delayed(nn.Module):
    """Scaled by the largest amax of the last calls; by 1 in the first, which knows of none."""

    def __init__(self, quantize: Callable = quantize_both, length: int = HISTORY):
        super().__init__()
        self.quantize = quantize
        self.register_buffer("history", torch.zeros(length))

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "row column"], dtype: torch.dtype) -> Both:
        scale = scale_of(self.history.amax(), dtype)
        row_form, column_form, amax = self.quantize(x, dtype, scale)
        self.history.copy_(remembered(self.history, amax))
        return row_form, column_form


def remembered(
    history: Float32[Tensor, " step"], amax: Float32[Tensor, ""]
) -> Float32[Tensor, " step"]:
    """The history with one amax more and the oldest less. An infinite or NaN one is left out: that
    step is skipped, and must not decide the scale of those after it."""
    newest = torch.where(amax.isfinite(), amax, history[0])
    return torch.cat([newest[None], history[:-1]])


class Recipe(NamedTuple):
    """How a layer is computed: three scalings and a product."""

    input: Scaling
    weight: Scaling
    gradient: Scaling
    product: Product
    gradient_dtype: torch.dtype = E5M2


def product_naive(left: Scaled, right: Scaled, dtype: torch.dtype) -> Float[Tensor, "row column"]:
    """left rightᵀ of what the words mean, in float32: what an exact accumulator would give."""
    return (dequantize(left) @ dequantize(right).mT).to(dtype)


def make_recipe(
    name: str,
    *,
    product: Product = product_naive,
    quantize: Callable = quantize_both,
    quantize_blocks: Callable = quantize_blocks,
) -> Recipe:
    """The recipe "current", "delayed" or "block" around any functions with these signatures.

    A recipe of blocks keeps gradients in e4m3: a block needs no more range than its own.

    Raises:
        ValueError: there is no such recipe.
    """
    if name == "current":
        scaling = partial(current, quantize=quantize)
        return Recipe(scaling, scaling, scaling, product)
    if name == "delayed":
        return Recipe(*(Delayed(quantize) for _ in range(3)), product)
    if name == "block":
        along = partial(quantize_blocks, block=(1, SIDE))
        square = partial(quantize_blocks, block=(SIDE, SIDE))
        return Recipe(along, square, along, product, gradient_dtype=E4M3)
    raise ValueError(f"the recipes are current, delayed and block, got {name!r}")


def product_scaled_mm(
    left: Scaled, right: Scaled, dtype: torch.dtype, *, fast_accumulation: bool = False
) -> Float[Tensor, "row column"]:
    """`product_naive` by torch._scaled_mm: tensor cores on a GPU, a plain loop on a CPU.

    Args:
        fast_accumulation: keep the running sums in the tensor core's own 14 bits or so.

    Raises:
        ValueError: the inner size or the columns are no multiple of 16, both sides are e5m2, or
            squares of 128 x 128 do not fill an inner size in fours.
    """
    inner, columns = left.values.shape[1], right.values.shape[0]
    if inner % ALIGNMENT or columns % ALIGNMENT:
        raise ValueError(f"tensor cores take 16 numbers at a time, got {inner} and {columns}")
    if left.values.dtype == right.values.dtype == E5M2:
        raise ValueError("tensor cores have no product of e5m2 with e5m2")
    square = (SIDE, SIDE) in (left.block, right.block)
    if square and inner % (4 * SIDE):
        # cuBLAS reads the rows of their scales in fours, and torch 2.11 takes only dense ones: on
        # an H200 the product of 768 was wrong without a word.
        raise ValueError(f"squares take an inner size in multiples of {4 * SIDE}, got {inner}")
    left_inverse, right_inverse = left.inverse, right.inverse
    if left.block is not None:
        left_inverse, right_inverse = laid_out(left), laid_out(right)
    return torch._scaled_mm(
        left.values,
        right.values.t(),
        scale_a=left_inverse,
        scale_b=right_inverse.t(),
        out_dtype=dtype,
        use_fast_accum=fast_accumulation,
    )


def laid_out(scaled: Scaled) -> Float32[Tensor, "row column"]:
    """The scales of blocks as cuBLAS reads them: those of 1 x 128 blocks with the rows dense."""
    if scaled.block[0] == 1:
        return scaled.inverse.mT.contiguous().mT
    return scaled.inverse


class ScaledProduct(torch.autograd.Function):
    """x weightᵀ and its two gradients, each a product of fp8; what is kept for later is fp8 too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, dtype: torch.dtype) -> Tensor:
        x_row, x_column = recipe.input(x, E4M3)
        weight_row, weight_column = recipe.weight(weight, E4M3)
        tensors = (x_column.values, x_column.inverse, weight_column.values, weight_column.inverse)
        ctx.save_for_backward(*tensors)
        ctx.blocks = x_column.block, weight_column.block
        ctx.recipe, ctx.dtypes = recipe, (x.dtype, weight.dtype)
        return recipe.product(x_row, weight_row, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_values, x_inverse, weight_values, weight_inverse = ctx.saved_tensors
        x_column = Scaled(x_values, x_inverse, ctx.blocks[0])
        weight_column = Scaled(weight_values, weight_inverse, ctx.blocks[1])
        recipe, (x_dtype, weight_dtype) = ctx.recipe, ctx.dtypes
        row, column = recipe.gradient(gradient, recipe.gradient_dtype)
        x_gradient = recipe.product(row, weight_column, x_dtype)
        return x_gradient, recipe.product(column, x_column, weight_dtype), None, None


class Fp8Linear(nn.Module):
    """nn.Linear with its three products in fp8; weight and bias stay as they are.

    Args:
        linear: whose parameters are taken over, not copied.
        recipe: a new one for every layer, since delayed scaling remembers.
    """

    def __init__(self, linear: nn.Linear, recipe: Recipe):
        super().__init__()
        self.weight, self.bias, self.recipe = linear.weight, linear.bias, recipe
        for name in ("input", "weight", "gradient"):
            if isinstance(scaling := getattr(recipe, name), nn.Module):
                # Its history is part of a checkpoint, and lives where the weight does.
                self.add_module(f"{name}_scaling", scaling.to(self.weight.device))

    def forward(self, x: Float[Tensor, "*batch input"]) -> Float[Tensor, "*batch output"]:
        """In the dtype of `x`, or in that of torch.autocast inside its context."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = x.reshape(-1, x.shape[-1])
        y = ScaledProduct.apply(rows, self.weight, self.recipe, dtype)
        y = y.unflatten(0, x.shape[:-1]) if x.ndim != 2 else y
        return y if self.bias is None else y + self.bias.to(y.dtype)


def with_fp8(module: nn.Module, recipe: Callable[[], Recipe]) -> nn.Module:
    """Exchange every nn.Linear below `module` for a layer in fp8, in place; returns `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Fp8Linear(child, recipe()))
        else:
            with_fp8(child, recipe)
    return module


def main() -> None:
    torch.manual_seed(0)
    x, weight, gradient = (
        torch.randn(256, 512),
        torch.randn(128, 512) / 512**0.5,
        torch.randn(256, 128),
    )
    outliers = x.clone()
    outliers[:, 7] *= 1000  # a channel as large transformers have some
    print("relative error of y = x Wᵀ, dx and dW, in %:  random x  | one channel 1000 times larger")
    for name in ("current", "delayed", "block"):
        cells = []
        for values in (x, outliers):
            layer = Fp8Linear(nn.Linear(512, 128, bias=False), make_recipe(name))
            layer.weight.data.copy_(weight)
            for _ in range(2):  # delayed scaling knows nothing in the first step
                leaf = values.clone().requires_grad_()
                y = layer(leaf)
                got = [y, *torch.autograd.grad(y, (leaf, layer.weight), gradient)]
            want = [values @ weight.T, gradient @ weight, gradient.T @ values]
            errors = [(a - b).norm() / b.norm() for a, b in zip(got, want, strict=True)]
            cells.append("  ".join(f"{100 * error.item():5.2f}" for error in errors))
        print(f"    {name:10}" + "  |  ".join(cells))


if __name__ == "__main__":
    main()
