"""Autocast: which operation runs in which precision, as a table and a context of forty lines.

    narrow   matrix products: their inputs may lose digits, tensor cores sum them in float32
    wide     exp, log, sums, norms, losses: one digit lost in the argument is many in the result
    other    as their inputs come, the widest of them decides

Weights stay in float32; each is cast where a product reads it, and the cast is part of the graph,
so its gradient comes back in float32. torch.autocast has the same three lists, longer, one for each
kind of device: on a CPU softmax, sums and norms stay in the narrow type and widen inside, and only
losses are wide.

A trap that both share: the context decides last. An equation that widens its operands before a
product, as `attention_naive` does, gets them narrowed again.

Paper   Micikevicius et al. 2017, arXiv:1710.03740, section 3
Run     uv run python implementations/precision/autocast.py
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Policy(NamedTuple):
    """Names of torch functions by the precision of their inputs."""

    narrow: frozenset[str]
    wide: frozenset[str]


PRODUCTS = frozenset(
    (
        "linear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "einsum",
        "conv1d",
        "conv2d",
        "conv3d",
        "scaled_dot_product_attention",
    )
)
DELICATE = frozenset(
    (
        "exp",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "pow",
        "__pow__",
        "__rpow__",
        "rsqrt",
        "reciprocal",
        "softmax",
        "log_softmax",
        "logsumexp",
        "layer_norm",
        "rms_norm",
        "group_norm",
        "norm",
        "sum",
        "cumsum",
        "prod",
        "cross_entropy",
        "nll_loss",
        "softplus",
    )
)
GPU = Policy(PRODUCTS, DELICATE)
CPU = Policy(PRODUCTS, frozenset({"cross_entropy"}))
POLICIES = {"cpu": CPU, "cuda": GPU}


class Autocast(TorchFunctionMode):
    """Inside this context torch's functions get their floats as the policy says; float64 stays.

    Args:
        policy: which function runs in what.
        dtype: the narrow type, bfloat16 or float16.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"the narrow type is bfloat16 or float16, got {dtype}")
        self.policy, self.dtype = policy, dtype

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        target = None
        if name in self.policy.narrow:
            target = self.dtype
        elif name in self.policy.wide:
            target = torch.float32
        if target is not None:
            args, kwargs = tree_map(lambda value: cast(value, target), (args, kwargs))
        return function(*args, **kwargs)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A float tensor in another precision; float64 and all that is no float as it was."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value if value.dtype in (torch.float64, dtype) else value.to(dtype)


class RecordDtypes(TorchDispatchMode):
    """Keeps `seen`: every operation that computes, in order, with the dtypes of what it returns.

    Views and casts are left out: when a cast happens is nobody's business.
    """

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, tuple[torch.dtype, ...]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in ("_to_copy", "clone", "_unsafe_view", "detach"):
            dtypes = tuple(leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
            self.seen.append((name, dtypes))
        return result


def main() -> None:
    from implementations.models.decoder import Decoder, DecoderConfig

    torch.manual_seed(0)
    config = DecoderConfig(vocabulary=50, width=32, layers=1, heads=2, hidden=64, positions=16)
    decoder, tokens = Decoder(config), torch.randint(50, (1, 8))
    for name, context in (
        ("torch's", torch.autocast("cpu", torch.bfloat16)),
        ("ours, a CPU's policy", Autocast(CPU)),
        ("ours, a GPU's policy", Autocast(GPU)),
    ):
        with RecordDtypes() as record, context:
            decoder(tokens)
        narrow = [name for name, dtypes in record.seen if torch.bfloat16 in dtypes]
        wide = [name for name, dtypes in record.seen if torch.bfloat16 not in dtypes]
        print(
            f"{name}: {len(narrow)} operations in bfloat16, {len(wide)} not, among these", end=" "
        )
        print(", ".join(sorted(set(wide) - set(narrow))))


if __name__ == "__main__":
    main()
