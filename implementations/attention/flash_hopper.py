"""FlashAttention on Hopper GPUs: how its kernels are launched, and autograd.

    output = softmax(query keyᵀ · scale) value      log_sum_exp = log Σ exp(query keyᵀ · scale)

The kernels are two files of their own: flash_hopper_forward.py, which draws its pipeline, and
flash_hopper_backward.py.

Paper   Shah et al. 2024, arXiv:2407.08608
Naive   flash.py; flash_triton.py has every GPU, dtype and dim
Shapes  query, output [..., head, query, dim]    key, value [..., key_head, key, dim]
Run     uv run python implementations/attention/flash_hopper.py
"""

from functools import lru_cache, partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from triton.experimental.gluon import language as gl

from implementations.attention.flash import check_flash_inputs
from implementations.attention.flash_hopper_backward import KEYS as KEYS_OF_A_PROGRAM
from implementations.attention.flash_hopper_backward import (
    OWN_KEYS,
    QUERIES,
    backward_kernel,
    finish_kernel,
    prepare_kernel,
)
from implementations.attention.flash_hopper_forward import KEYS, ROWS, forward_kernel
from implementations.attention.flash_triton import (
    LOG2_E,
    check_kernel_inputs,
    differentiate,
    empty_like,
    empty_results,
    fetchable,
    in_four_dimensions,
    remember,
    tile_of,
)
from implementations.attention.hopper_tiles import (
    define,
    gpu_is_missing,
    launch,
    multiprocessors,
    operator,
    tile_at,
)

DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)


class Plan(NamedTuple):
    """A launch of the forward, but for its addresses."""

    grid: tuple[int, int, int]
    sizes: tuple[int, ...]
    """tiles, heads, query heads of a key head, queries, keys"""
    constants: tuple
    """causal, tiles in pairs, consumers of 64 rows a program, registers of a consumer's thread"""
    results: tuple[tuple[int, ...], ...]
    """strides of the output, shape and strides of the log-sum-exp"""


@lru_cache(1024)
def plan(query: torch.Size, key: torch.Size, causal: bool, device: torch.device) -> Plan:
    """How inputs of these shapes are cut into tiles."""
    (batch, heads, queries, dim), (_, key_heads, keys, _) = query, key
    programs = multiprocessors(device)
    # At dim 64 a third consumer has room. On an H200: 1.09 of cuDNN with it and 1.00 without at
    # 16,384 keys, but 0.93 and 1.01 at 1,024, where its larger tiles leave programs without work.
    consumers, registers = (3, 160) if dim == 64 and keys >= 8192 else (2, 240)
    tiles = batch * heads * -(-queries // (consumers * ROWS.value))
    sizes = (tiles, heads, heads // key_heads, queries, keys)
    constants = (causal, causal and tiles > programs, consumers, registers)
    # As `empty_results`, which must not keep anything: it is asked of symbolic sizes too.
    strides = (queries * heads * dim, dim, heads * dim, 1)
    results = (strides, (batch, heads, queries), (heads * queries, queries, 1))
    return Plan((min(tiles, programs), 1, 1), sizes, constants, results)


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    grid, sizes, constants, (strides, rows, row_strides) = plan(
        query.shape, key.shape, causal, query.device
    )
    output = query.new_empty_strided(query.shape, strides)
    log_sum_exp = query.new_empty_strided(rows, row_strides, dtype=torch.float32)
    query, key, value = fetchable(query), fetchable(key), fetchable(value)
    tiles = (
        tile_at(query, ROWS.value), tile_at(key, KEYS.value),
        tile_at(value, KEYS.value), tile_at(output, ROWS.value),
    )  # fmt: skip
    with torch.cuda.device_of(query):  # Triton launches on the current GPU
        arguments = (*tiles, log_sum_exp, *sizes, scale * LOG2_E.value)
        variant = (query.dtype, query.shape[-1], query.device)
        launch(forward_kernel, grid, arguments, constants, variant)
    return output, log_sum_exp


def fake_forward(query, key, value, causal, scale):
    return empty_results(query, key, value, causal, None, scale)


def heads_together(planes: int, rows: int, dim: int, at_once: int) -> int:
    """How many heads' queries, dO and dQ fill 16 MB: a third of the L2 cache, for a divisor.

    At least as many as the GPU works on `at_once`: the longest tiles of all of them come first.
    """
    most = max(1, at_once, 2**24 // (8 * rows * dim))
    return next(count for count in range(min(most, planes), 0, -1) if planes % count == 0)


def run_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    d_output: Tensor,
    d_log_sum_exp: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    programs, rows = multiprocessors(query.device), QUERIES.value
    (batch, heads, queries, dim), (key_heads, keys) = query.shape, key.shape[1:3]
    d_query, d_key, d_value = (empty_like(x) for x in (query, key, value))
    query, key, value, output, d_output = map(fetchable, (query, key, value, output, d_output))
    given = d_log_sum_exp is not None
    # A fresh copy: the kernel was compiled for pointers that are multiples of 16.
    d_total = d_log_sum_exp.clone(memory_format=torch.contiguous_format) if given else log_sum_exp
    blocks, group = -(-queries // rows), heads // key_heads
    sums = log_sum_exp.new_empty(batch * heads * blocks * 2 * rows)
    dq_sum = log_sum_exp.new_empty(batch * heads * blocks * rows * dim)
    tiles = -(-keys // KEYS_OF_A_PROGRAM.value)
    together = heads_together(batch * key_heads, group * queries, dim, programs // tiles)
    offset = gl.int32 if dq_sum.numel() < 2**31 else gl.int64
    variant = (query.dtype, dim, query.device)
    with torch.cuda.device_of(query):  # Triton launches on the current GPU
        launch(
            prepare_kernel,
            (batch * heads * blocks, 1, 1),
            (
                tile_of(output, rows, dim), tile_of(d_output, rows, dim),
                log_sum_exp, d_total, sums, dq_sum, heads, queries,
            ),
            (given, rows, dim),
            variant,
        )  # fmt: skip
        launch(
            backward_kernel,
            (batch * key_heads * tiles, 1, 1),
            (
                tile_at(query, rows), tile_at(key, KEYS_OF_A_PROGRAM.value),
                tile_at(value, OWN_KEYS.value), tile_at(d_output, rows),
                tile_at(d_key, OWN_KEYS.value), tile_at(d_value, OWN_KEYS.value),
                sums, dq_sum, together, key_heads, group, queries, keys, scale * LOG2_E.value,
            ),
            (causal, keys % KEYS_OF_A_PROGRAM.value > 0, group > 1, offset),
            variant,
        )  # fmt: skip
        launch(
            finish_kernel,
            (batch * heads * blocks, 2, 1),
            (dq_sum, d_query, heads, queries, scale),
            (rows, dim),
            variant,
        )
    return d_query, d_key, d_value


def fake_backward(query, key, value, *others):
    return empty_like(query), empty_like(key), empty_like(value)


backward = operator("flash_attention_hopper_backward", run_backward, fake_backward)


forward = operator(
    "flash_attention_hopper", run_forward, fake_forward, partial(differentiate, backward), remember
)
forward_alone = define("flash_attention_hopper_alone", run_forward, fake_forward)


def flash_attention_hopper(
    query: Float[Tensor, "*batch head query dim"],
    key: Float[Tensor, "*batch key_head key dim"],
    value: Float[Tensor, "*batch key_head key dim"],
    **options,
) -> Float[Tensor, "*batch head query dim"]:
    """softmax(query keyᵀ · scale) value; options and errors are those of the function below."""
    return flash_attention_hopper_with_log_sum_exp(query, key, value, **options)[0]


def flash_attention_hopper_with_log_sum_exp(
    query: Float[Tensor, "*batch head query dim"],
    key: Float[Tensor, "*batch key_head key dim"],
    value: Float[Tensor, "*batch key_head key dim"],
    *,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "*batch head query dim"], Float[Tensor, "*batch head query"]]:
    """The output and, in float32, log Σ exp(scores) of every query; both have gradients.

    As `flash_attention_triton_with_log_sum_exp`, for float16 and bfloat16, dims 64 and 128, and
    without a window. The gradient of the query is a sum in no fixed order: it is not the same bits
    every time, as flash_triton's is.

    Raises:
        ValueError: as `check_flash_inputs`; a window, a dim, dtype or device that the kernels do
            not know, an empty batch, or a scale that is not positive.
    """
    check_flash_inputs(query, key, value, causal=causal, window=window, mask=mask)
    if window is not None:
        raise ValueError(f"the kernels for Hopper know no window, got {window}")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    check_kernel_inputs(query, value, scale, DIMS, DTYPES)
    if not query.is_cuda:
        raise ValueError(f"the kernels run on a Hopper GPU, got {query.device}")
    inputs = (query, key, value)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return in_four_dimensions(forward if wanted else forward_alone, *inputs, causal, scale)


def main() -> None:
    from implementations.attention_basic import attention_naive
    from implementations.lab.compare import allowed, error

    if gpu_is_missing():
        return
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 8, 2000, 128, device="cuda").bfloat16() for _ in range(3))
    exact = attention_naive(query.double(), key.double(), value.double(), causal=True)
    limit = allowed(attention_naive(query, key, value, causal=True), exact)
    seen = error(flash_attention_hopper(query, key, value, causal=True), exact)
    print(f"causal, {list(query.shape)}, bfloat16")
    print(f"  largest error {seen.largest:.1e}, allowed {limit.largest:.1e}")
    print(f"  mean error    {seen.mean:.1e}, allowed {limit.mean:.1e}")


if __name__ == "__main__":
    main()
