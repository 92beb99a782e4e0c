"""What a launch on Hopper needs and can keep: descriptors of tiles, compiled kernels, operators.

    descriptor   where the copy engine finds a tile: kept by address, shape and strides
    kernel       the compiled form: kept by what the code depends on, not asked of each argument
    operator     known to autograd and torch.compile: registered for GPUs alone

A small attention takes the GPU less time than it takes Python to ask for it; then this is the
speed. weeks/04_flash_attention/kernel_benchmark.py measures it.

Run     uv run python implementations/attention/hopper_tiles.py
"""

from collections.abc import Callable, Hashable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LIBRARY = torch.library.Library("ml_studies", "FRAGMENT")
COMPILED = {}  # kernels by name, constants and variant


class Address(NamedTuple):
    """What a descriptor asks of a tensor. Holding the tensor itself would keep its memory."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.pointer


def tile_at(x: Tensor, rows: int) -> TensorDescriptor:
    """How the copy engine finds `rows` rows of `x`; beyond the edge it reads zeros, writes nothing.

    Kept, because making one takes as long as a launch: models come back to the same addresses.
    """
    return descriptor_at(x.data_ptr(), x.dtype, x.shape, x.stride(), rows)


@lru_cache(1024)
def descriptor_at(
    pointer: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], rows: int
) -> TensorDescriptor:
    block = [1, 1, rows, shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl_dtype(dtype))
    return TensorDescriptor(Address(pointer, dtype), list(shape), list(stride), block, layout)


def gl_dtype(dtype: torch.dtype) -> gl.dtype:
    return gl.float16 if dtype == torch.float16 else gl.bfloat16


def block_types(rows: dict[str, int], dim: int, dtype: gl.dtype) -> dict[str, str]:
    """Triton's names for descriptors of blocks with so many rows."""
    types = {}
    for name, count in rows.items():
        block = [1, 1, count, dim]
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        types[name] = f"tensordesc<{dtype}{block},{layout!r}>"
    return types


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a Hopper GPU.

    Raises:
        ValueError: it is another GPU.
    """
    properties = torch.cuda.get_device_properties(device)
    if properties.major != 9:
        has = f"{properties.name} has {properties.major}.{properties.minor}"
        raise ValueError(f"the kernels run on compute capability 9.0, {has}")
    return properties.multi_processor_count


def launch(
    kernel, grid: tuple[int, int, int], arguments: tuple, constants: tuple, variant: Hashable
) -> None:
    """`kernel[grid]` of the arguments and then the constants, on the current GPU.

    Triton's own way looks at every argument to find the compiled kernel: 34 µs where this takes 16.

    Args:
        variant: the dtypes, devices and dims that, with the constants, decide what is compiled.
            Integers must be marked `do_not_specialize`, pointers be multiples of 16.
    """
    key = (kernel.__name__, constants, variant)
    if key in COMPILED:
        COMPILED[key][grid](*arguments, *constants)
    else:
        COMPILED[key] = kernel[grid](*arguments, *constants)


def define(name: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Registers `run` as ml_studies::name, for calls that nobody differentiates.

    Autograd of an operator is Python: asking it whether it is wanted takes 9 µs a call.

    Args:
        run: of tensors on a GPU.
        fake: of tensors without data.
    """
    LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()))
    LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"ml_studies::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.ml_studies, name).default


def operator(
    name: str,
    run: Callable,
    fake: Callable,
    differentiate: Callable | None = None,
    remember: Callable | None = None,
) -> torch._ops.OpOverload:
    """The same with autograd; `torch.library.custom_op` without its checks at a call.

    Args:
        run, fake: as for `define`.
        differentiate: the gradients of the inputs; without it the operator has none, and says so.
        remember: keeps what `differentiate` needs.
    """

    def refuse(ctx, *gradients):
        raise RuntimeError(f"{name} has no second derivative")

    defined = define(name, run, fake)
    torch.library.register_autograd(
        f"ml_studies::{name}", differentiate or refuse, setup_context=remember, lib=LIBRARY
    )
    return defined


def gpu_is_missing() -> bool:
    """Whether there is no GPU to run on, said with what can be done without one."""
    missing = not torch.cuda.is_available()
    if missing:
        print("there is no GPU: implementations/lab/ahead_of_time.py compiles kernels without one")
    return missing


def main() -> None:
    x = torch.zeros(1, 2, 1000, 64, dtype=torch.bfloat16)
    print("a tile of 128 rows of [1, 2, 1000, 64], in memory as the matrix unit wants it:")
    print(f"  block {tile_at(x, 128).block_shape}, {tile_at(x, 128).layout}")
    print(f"  kept: {tile_at(x, 128) is tile_at(x, 128)}")


if __name__ == "__main__":
    main()
