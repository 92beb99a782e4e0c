"""How much memory does a call hold at once? Counted on the CPU, allocation by allocation.

    peak = max over time of the bytes of all tensors that the call has made and not yet dropped

On a GPU the allocator keeps this count itself. On a CPU every operation is intercepted: the storage
of what it returns is added when it is new and subtracted when Python lets it go. Scratch space
inside an operation is not seen.

Run     uv run python implementations/lab/memory.py
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountStorages(TorchDispatchMode):
    """Keeps `held` and `peak`, the bytes of the storages made inside the `with` block."""

    def __init__(self, *inputs: Tensor):
        super().__init__()
        self.held = self.peak = 0
        self.known = {id(x.untyped_storage()): x.untyped_storage() for x in inputs}
        self.living: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.known or key in self.living:
            return
        self.held += size
        self.peak = max(self.peak, self.held)
        self.living[key] = weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.held -= size
        del self.living[key]


def peak_bytes(function: Callable, *inputs: Tensor) -> int:
    """The most memory that one call holds at once beyond its inputs, in bytes."""
    if any(x.is_cuda for x in inputs):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function(*inputs)  # kept until the peak is read
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak
    with CountStorages(*inputs) as count:
        result = function(*inputs)
        peak = count.peak
        del result
    return peak


def main() -> None:
    x = torch.randn(1000, 1000)
    for name, function in {
        "x + 1": lambda x: x + 1,
        "(x + 1) * 2": lambda x: (x + 1) * 2,
        "(x + 1).mul_(2)": lambda x: (x + 1).mul_(2),
        "x.T": lambda x: x.T,
    }.items():
        print(f"  {name:16} holds {peak_bytes(function, x) / 4e6:.0f} times the memory of x")


if __name__ == "__main__":
    main()
