"""How much memory does a call hold at once? Counted on the CPU, allocation by allocation.

    peak = max over time of the bytes of all tensors that the call has made and not yet dropped

On a GPU the allocator keeps this count itself. On a CPU every operation is intercepted: the storage
of what it returns is added when it is new and subtracted when Python lets it go. Scratch space
inside an operation is not seen.

    moved = Σ over operations of the bytes of what each reads and of what it writes

Operations that only look at their input in another shape move nothing. Nothing stays in a cache
between two operations: this is the traffic of large matrices.

Run     uv run python implementations/lab/memory.py
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountStorages(TorchDispatchMode):
    """Keeps `held` and `peak`, the bytes of the storages made inside the `with` block."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.older: dict[int, torch.UntypedStorage] = {}  # held, so that no id is used again
        self.living: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in storages((args, kwargs)):  # first seen as an input: not made in here
            if id(storage) not in self.living:
                self.older[id(storage)] = storage
        result = function(*args, **(kwargs or {}))
        for storage in storages(result):
            if id(storage) not in self.living and id(storage) not in self.older:
                self.add(storage)
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        self.living[key] = weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.held -= size
        del self.living[key]


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """The storages of all tensors in nested tuples, lists and dictionaries."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


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
    with CountStorages() as count:
        result = function(*inputs)
        peak = count.peak
        del result
    return peak


class CountMoves(TorchDispatchMode):
    """Keeps `moved`, the bytes read and written by the operations inside the `with` block."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = (x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor))
            # An expanded tensor is read as often as it is used, but lies in memory once.
            self.moved += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)
        return result


def moved_bytes(function: Callable, *inputs: Tensor) -> int:
    """The bytes that one call's operations read and write, each on its own."""
    with CountMoves() as count:
        function(*inputs)
    return count.moved


def main() -> None:
    x = torch.randn(1000, 1000)
    for name, function in {
        "x + 1": lambda x: x + 1,
        "(x + 1) * 2": lambda x: (x + 1) * 2,
        "(x + 1).mul_(2)": lambda x: (x + 1).mul_(2),
        "x.T": lambda x: x.T,
    }.items():
        held, moved = peak_bytes(function, x) / 4e6, moved_bytes(function, x) / 4e6
        print(f"  {name:16} holds {held:.0f} times the memory of x and moves {moved:.0f} times")


if __name__ == "__main__":
    main()
