"""AdamW in Triton: every number of every parameter in one launch, in place.

    the equation of adamw.py, on a table of addresses

A network has hundreds of tensors, most of them small. The kernel gets their addresses as numbers; a
program takes one block of one tensor, and two small tables say which.

Floor   bytes a parameter of 4 bytes: 28 (parameter, gradient and both averages read, all but the
        gradient written)
Run     uv run python implementations/optimizers/adamw_triton.py
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from implementations.lab.ahead_of_time import Variant
from implementations.layers.row_tiles import launch
from implementations.optimizers.adamw import AdamWState, check, wide_dtype

# 16 numbers a thread: four 16-byte loads of each of four tensors. On an H200 0.99 of a copy's
# speed; blocks of 2048 with 4 warps 0.96.
BLOCK, WARPS = 1024, 2
DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def update_block(parameter, gradient, first, second, settings, at, size, WHOLE: tl.constexpr):
    wide = first.dtype.element_ty
    inside = None if WHOLE else at < size
    keep_first = tl.load(settings).to(wide)
    keep_second = tl.load(settings + 1).to(wide)
    new_first = tl.load(settings + 2).to(wide)
    new_second = tl.load(settings + 3).to(wide)
    keep_parameter = tl.load(settings + 4).to(wide)
    rate = tl.load(settings + 5).to(wide)
    root_correction = tl.load(settings + 6).to(wide)
    epsilon = tl.load(settings + 7).to(wide)
    slope = tl.load(gradient + at, inside).to(wide)
    mean = keep_first * tl.load(first + at, inside) + new_first * slope
    square = keep_second * tl.load(second + at, inside) + new_second * slope * slope
    weight = keep_parameter * tl.load(parameter + at, inside).to(wide)
    weight -= rate * mean / (tl.sqrt(square) * root_correction + epsilon)
    tl.store(first + at, mean, inside)
    tl.store(second + at, square, inside)
    tl.store(parameter + at, weight, inside)


@triton.jit
def adamw_kernel(
    addresses,
    settings,
    owners,
    starts,
    sizes,
    tensors,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    owner = tl.load(owners + tl.program_id(0))
    start = tl.load(starts + tl.program_id(0))
    size = tl.load(sizes + owner)
    parameter = tl.load(addresses + owner).to(tl.pointer_type(PARAMETER))
    gradient = tl.load(addresses + tensors + owner).to(tl.pointer_type(GRADIENT))
    first = tl.load(addresses + 2 * tensors + owner).to(tl.pointer_type(WIDE))
    second = tl.load(addresses + 3 * tensors + owner).to(tl.pointer_type(WIDE))
    if ALIGNED:  # said once, for loads of 16 bytes
        parameter = tl.multiple_of(parameter, 16)
        gradient = tl.multiple_of(gradient, 16)
        first = tl.multiple_of(first, 16)
        second = tl.multiple_of(second, 16)
    start = tl.multiple_of(start, BLOCK)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        update_block(parameter, gradient, first, second, settings, at, size, True)
    else:
        update_block(parameter, gradient, first, second, settings, at, size, False)


@lru_cache(maxsize=16)
def block_tables(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each block its tensor and its first number; for each tensor its size."""
    count = torch.tensor(sizes)
    blocks = -(-count // BLOCK)
    owners = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
    starts = (torch.arange(len(owners)) - (blocks.cumsum(0) - blocks)[owners]) * BLOCK
    return owners.to(device), starts.to(device), count.to(device)


@torch.library.custom_op("ml_studies::adamw", mutates_args=("parameters", "first", "second"))
def adamw_op(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    settings: Sequence[float],
) -> None:
    """One step in place; `settings` are the eight numbers that the kernel reads."""
    groups, device = (parameters, gradients, first, second), parameters[0].device
    flat = [tensor.data_ptr() for group in groups for tensor in group]
    addresses = torch.tensor(flat).to(device, non_blocking=True)
    numbers = torch.tensor(settings, dtype=torch.float64).to(device, non_blocking=True)
    owners, starts, sizes = block_tables(tuple(p.numel() for p in parameters), device)
    launch(
        adamw_kernel,
        (len(owners),),
        addresses,
        numbers,
        owners,
        starts,
        sizes,
        len(parameters),
        PARAMETER=DTYPES[parameters[0].dtype],
        GRADIENT=DTYPES[gradients[0].dtype],
        WIDE=DTYPES[first[0].dtype],
        ALIGNED=all(address % 16 == 0 for address in flat),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


@adamw_op.register_fake
def _(parameters, gradients, first, second, settings):
    return None


@torch.no_grad()
def step_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: AdamWState,
    *,
    learning_rate: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
) -> AdamWState:
    """`step` of adamw.py in place: parameters and averages are overwritten.

    Raises:
        ValueError: what `check` refuses there; parameters or gradients of several dtypes or
            devices, or tensors that are not dense.
    """
    check(parameters, gradients, state, learning_rate, betas, epsilon, weight_decay)
    check_tensors(parameters, gradients, state)
    steps = state.steps + 1
    corrections = [1 - beta**steps for beta in betas]
    settings = [*betas, *(1 - beta for beta in betas), 1 - learning_rate * weight_decay]
    settings += [learning_rate / corrections[0], corrections[1] ** -0.5, epsilon]
    adamw_op(list(parameters), list(gradients), state.first, state.second, settings)
    return AdamWState(steps, state.first, state.second)


def check_tensors(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], state: AdamWState
) -> None:
    """Raise ValueError for what addresses alone cannot tell the kernel."""
    wide = wide_dtype(parameters[0])
    averages = [*state.first, *state.second]
    for name, group in (
        ("parameters", parameters),
        ("gradients", gradients),
        ("averages", averages),
    ):
        dtypes, devices = {t.dtype for t in group}, {t.device for t in group}
        if len(dtypes) > 1 or not dtypes <= set(DTYPES):
            raise ValueError(f"{name} are floats of one dtype, got {sorted(map(str, dtypes))}")
        if devices != {parameters[0].device}:
            raise ValueError(f"{name} stand on one device, got {sorted(map(str, devices))}")
        if any(not tensor.is_contiguous() for tensor in group):
            raise ValueError(f"{name} are dense, and one has gaps or another order in memory")
    if averages[0].dtype != wide:
        raise ValueError(f"averages are {wide}, got {averages[0].dtype}")


def variants() -> Iterator[Variant]:
    """float32 parameters with float32 gradients."""
    types = {"addresses": "*i64", "settings": "*fp64", "owners": "*i64", "starts": "*i64"}
    types |= {"sizes": "*i64", "tensors": "i32"}
    constants = dict.fromkeys(("PARAMETER", "GRADIENT", "WIDE"), tl.float32)
    constants |= {"ALIGNED": True, "BLOCK": BLOCK}
    yield Variant("float32", adamw_kernel, types, constants, WARPS, capabilities=(90,))


def main() -> None:
    from implementations.optimizers.adamw import init, step

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = [torch.randn(size, device=device) for size in ((300, 40), (7,), (1,))]
    ours, state = [p.clone() for p in parameters], init(parameters)
    naive, naive_state = parameters, init(parameters)
    for _ in range(10):
        gradients = [torch.randn_like(p) for p in parameters]
        naive, naive_state = step(naive, gradients, naive_state)
        state = step_(ours, gradients, state)
    apart = max((a - b).abs().max().item() for a, b in zip(ours, naive, strict=True))
    print(f"10 steps of 3 parameters on {device}: kernel and equation at most {apart:.1e} apart")


if __name__ == "__main__":
    main()
