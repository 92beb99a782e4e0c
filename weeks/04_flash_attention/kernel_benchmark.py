"""How fast is an operation of ours, beside the equation, the compiler and the vendors?

A tool for any entry of OPERATIONS: chosen operations, shapes, dtypes and peers, timed in turn, as a
table, a figure and (--output) a JSON file with every round. Which forms there are depends on the
device: on a GPU `flash` is our Triton kernel, beside cuDNN and FlashAttention 2; on a CPU it is the
readable loop over tiles in Python, which shows the algorithm and is slow.

Expected: all forms agree. On an H200, in bfloat16, over twelve shapes of 16,384 tokens and width
2048, the Triton kernel is hoped to reach 0.95 of cuDNN's speed and 1.4 times FlashAttention 2's;
its backward 0.65 and 1.0.

Run     uv run python weeks/04_flash_attention/kernel_benchmark.py
        uv run python weeks/04_flash_attention/kernel_benchmark.py --device cuda
        --op flash_attention_forward --shapes "16x32x1024x64 causal" --dtypes bfloat16
        --peers flash cudnn
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from implementations.attention.flash import flash_attention
from implementations.attention.vendor import attention_sdpa
from implementations.attention_basic import attention_naive
from implementations.lab.benchmark import (
    Case,
    Measurement,
    Operation,
    as_json,
    as_table,
    dtype_named,
    magnitude,
    measure,
    ratios,
)
from implementations.lab.files import write_atomically
from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved


@dataclass(frozen=True)
class Config:
    """Operations, shapes, dtypes and peers, side by side."""

    op: tuple[str, ...] = ("flash_attention_forward", "flash_attention_backward")
    """entries of OPERATIONS"""
    shapes: tuple[str, ...] = ()
    """such as "16x32x1024x64 causal"; the operation's own list unless given"""
    dtypes: tuple[str, ...] = ()
    """bfloat16 on a GPU and float32 on a CPU unless given"""
    peers: tuple[str, ...] = ()
    """forms to measure, each where an operation has it; all that the device has unless given"""
    rounds: int = 20
    output: Path | None = None
    """a JSON file for the seconds of every round"""
    device: str = "cpu"


def compiled(form: Callable) -> Callable:
    """The form through torch.compile, for this case alone.

    Without the reset dynamo would give up after eight shapes, and plain torch would be timed.
    """

    @cache
    def program() -> Callable:  # made when it is called: a form that nobody chose costs nothing
        torch.compiler.reset()
        return torch.compile(form, dynamic=False)

    return lambda *inputs, **options: program()(*inputs, **options)


def by_backend(backend: SDPBackend) -> Callable:
    """Torch's attention by one kernel and no other."""

    def attention(*inputs: Tensor, causal: bool = False) -> Tensor:
        with sdpa_kernel(backend):
            return attention_sdpa(*inputs, causal=causal)

    return attention


def attention_forms(device: str) -> Mapping[str, Callable]:
    """The equation first: the others are compared with the first that is measured."""
    forms = {"naive": attention_naive, "compiled": compiled(attention_naive)}
    if device == "cpu":
        return {**forms, "flash": flash_attention, "torch": attention_sdpa}
    # Here and not above: a machine without Triton still measures the CPU's forms.
    from implementations.attention.flash_triton import flash_attention_triton

    return {
        **forms,
        "cudnn": by_backend(SDPBackend.CUDNN_ATTENTION),
        "fa2": by_backend(SDPBackend.FLASH_ATTENTION),
        "flash": flash_attention_triton,
    }


def hopper_forms(device: str) -> Mapping[str, Callable]:
    """Our kernels for Hopper, and those beside which they are to be seen."""
    if device == "cpu":
        raise ValueError("the kernels for Hopper need --device cuda")
    from implementations.attention.flash_hopper import flash_attention_hopper

    forms = attention_forms(device)
    return {**{name: forms[name] for name in ("cudnn", "flash")}, "hopper": flash_attention_hopper}


def attention_inputs(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(case.sizes, dtype=dtype, device=device) for _ in range(3)]


def attention_operations(case: Case, products: int) -> float:
    """Each matrix product takes 2 · length² · dim a head; a causal mask hides half of it."""
    batch, heads, length, dim = case.sizes
    return products * 2 * batch * heads * length**2 * dim / (2 if "causal" in case.options else 1)


def belongs(case: Case, part: str) -> bool:
    """Whether a case is of the part "dim 128" or "dim 64 causal", by its dim and its mask."""
    mask = "causal" if "causal" in case.options else "full"
    return f"dim {case.sizes[-1]} {mask}".startswith(part)


# 16,384 tokens and a width of 2048 in all: heads · dim = 2048, batch · length = 16,384.
LARGE = [
    f"{16384 // length}x{2048 // dim}x{length}x{dim}{mask}"
    for dim in (64, 128)
    for mask in ("", " causal")
    for length in (1024, 4096, 16384)
]
SMALL = [f"1x4x{length}x64{mask}" for mask in ("", " causal") for length in (256, 1024)]
ATTENTION = partial(
    Operation,
    sizes="batch x heads x length x dim",
    options=("causal",),
    forms=attention_forms,
    inputs=attention_inputs,
    unit="FLOP/s",
    cases={"cpu": SMALL, "cuda": LARGE},
)
OPERATIONS = {
    "flash_attention_forward": ATTENTION(
        work=lambda case, element: attention_operations(case, products=2),
        ours="flash",
        goals={"cudnn": 0.95, "fa2": 1.4},
    ),
    "flash_attention_backward": ATTENTION(
        work=lambda case, element: attention_operations(case, products=5),
        ours="flash",
        goals={"cudnn": 0.65, "fa2": 1.0},
        backward=True,
    ),
    "hopper_attention_forward": ATTENTION(
        work=lambda case, element: attention_operations(case, products=2),
        forms=hopper_forms,
        ours="hopper",
        parts={"dim 128": {"cudnn": 1.05}, "dim 64": {"cudnn": 1.0}},
    ),
    "hopper_attention_backward": ATTENTION(
        work=lambda case, element: attention_operations(case, products=5),
        forms=hopper_forms,
        ours="hopper",
        parts={
            "dim 128 full": {"cudnn": 1.0},
            "dim 128 causal": {"cudnn": 0.95},
            "dim 64": {"cudnn": 1.05},
        },
        backward=True,
    ),
}


def beside_hopper(backward: bool, rounds: int) -> list[Finding]:
    """What heads that share keys cost, and a length that no tile divides; and a call's Python."""
    from implementations.attention.flash_hopper import flash_attention_hopper

    name = "hopper_attention_backward" if backward else "hopper_attention_forward"
    findings = []
    for causal in (False, True):
        calls, rates = {}, {}
        for kind, key_heads, length in (("plain", 32, 4096), ("8", 8, 4096), ("4,001", 32, 4001)):
            sizes = (32, key_heads, key_heads)
            inputs = [torch.randn(2, h, length, 128, device="cuda").bfloat16() for h in sizes]
            calls[kind] = lambda _, x=inputs: flash_attention_hopper(*x, causal=causal)  # noqa: B023
            if backward:
                calls[kind] = gradients_of(flash_attention_hopper, inputs, causal)
            rates[kind] = length**2
        timings = time_interleaved(calls, inputs[0], rounds=rounds)
        for kind, what in (("8", "8 key heads for 32 query heads"), ("4,001", "4,001 tokens")):
            speed = timings.ratio(kind, "plain") * rates[kind] / rates["plain"]
            claim = f"{name}: {what}, times the speed of 32 and of 4,096" + ", causal" * causal
            findings.append(Finding(claim, speed, "x", goal=at_least(0.95)))
    if not backward:
        x = torch.randn(1, 2, 128, 128, device="cuda").bfloat16()
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # the choice itself takes as long as a call
            peer = host_microseconds(partial(scaled_dot_product_attention, is_causal=True), x)
        ours = host_microseconds(partial(flash_attention_hopper, causal=True), x)
        claim = f"{name}: time of a small call on the host"
        findings.append(Finding(f"{claim}, cuDNN", peer, "µs"))
        findings.append(Finding(f"{claim}, hopper", ours, "µs", goal=at_most(peer)))
    return findings


def gradients_of(form: Callable, inputs: list[Tensor], causal: bool) -> Callable:
    leaves = [x.requires_grad_() for x in inputs]
    output = form(*leaves, causal=causal)
    upstream = torch.randn_like(output)
    return lambda _: torch.autograd.grad(output, leaves, upstream, retain_graph=True)


def host_microseconds(form: Callable, x: Tensor, calls: int = 200) -> float:
    """Median time after which a call returns; the GPU is faster with so little."""
    seen = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            form(x, x, x)
        seen.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(seen)


BESIDE = {
    "hopper_attention_forward": partial(beside_hopper, False),
    "hopper_attention_backward": partial(beside_hopper, True),
}


def operation_named(name: str) -> Operation:
    if name not in OPERATIONS:
        raise ValueError(f"the operations are {', '.join(OPERATIONS)}, got {name!r}")
    return OPERATIONS[name]


def draw(measured: dict[str, list[Measurement]]) -> None:
    """A panel an operation, a bar a form, a group of bars a case."""
    _, panels = plt.subplots(
        len(measured), 1, figsize=(11, 4 * len(measured)), layout="constrained", squeeze=False
    )
    for axes, (name, measurements) in zip(panels.flat, measured.items(), strict=True):
        forms = list(dict.fromkeys(form for m in measurements for form in m.rates))
        prefix, size = magnitude(measurements)
        for i, form in enumerate(forms):
            places = [x for x, m in enumerate(measurements) if form in m.rates]
            rates = [measurements[x].rates[form] / size for x in places]
            offset = (i - (len(forms) - 1) / 2) * 0.8 / len(forms)
            axes.bar([x + offset for x in places], rates, 0.8 / len(forms), label=form)
        labels = [f"{m.case}\n{m.dtype}" for m in measurements]
        axes.set_xticks(range(len(measurements)), labels, fontsize=7, rotation=30, ha="right")
        operation = OPERATIONS[name]
        axes.set(title=f"{name}: {operation.sizes}", ylabel=f"useful {prefix}{operation.unit}")
        axes.legend(ncols=len(forms), fontsize=8)


def findings_of(name: str, measurements: list[Measurement]) -> list[Finding]:
    """Agreement, and our speed against each peer over all the cases."""
    operation, count = OPERATIONS[name], len(measurements)
    narrow = max(torch.finfo(dtype_named(m.dtype)).eps for m in measurements)
    findings = [
        Finding(
            f"{name}: forms differ on average, in units of the result, by at most",
            max(max(m.apart.values()) for m in measurements),
            # Weights and results are rounded to the dtype a few times, and sums add to that; a
            # wrong mask or scale is a difference of a tenth and more.
            expected=at_most(max(4 * narrow, 1e-4)),
        )
    ]
    peers = dict.fromkeys(form for m in measurements for form in m.rates)
    for peer in peers:
        seen = ratios(measurements, operation.ours, peer)
        if peer == operation.ours or not seen:
            continue
        claim = f"{name}: {operation.ours}, times the speed of {peer}, geometric mean"
        findings.append(mean_ratio(claim, seen, operation.goals.get(peer)))
        for part, goals in operation.parts.items():
            own = [m for m in measurements if belongs(m.case, part)]
            if peer in goals and (seen_there := ratios(own, operation.ours, peer)):
                findings.append(mean_ratio(f"{claim} over {part}", seen_there, goals[peer]))
        findings += [
            Finding(f"{name}: the same against {peer}, {which} of the shapes", pick(seen), "x")
            for which, pick in (("worst", min), ("best", max))
            if count > 1
        ]
    return findings


def mean_ratio(claim: str, seen: list[float], goal: float | None) -> Finding:
    goal = None if goal is None else at_least(goal)
    return Finding(claim, statistics.geometric_mean(seen), "x", goal=goal)


def peers_of(name: str, kind: str, peers: tuple[str, ...], ops: tuple[str, ...]) -> tuple[str, ...]:
    """The peers that an operation has; one that no operation has is refused by `measure`."""
    has = {op: operation_named(op).forms(kind) for op in ops}
    return tuple(
        p for p in peers if p in has[name] or not any(p in forms for forms in has.values())
    )


def main(config: Config) -> list[Finding]:
    kind = torch.device(config.device).type
    dtypes = config.dtypes or (("float32",) if kind == "cpu" else ("bfloat16",))
    measured, findings = {}, []
    for name in config.op:
        operation = operation_named(name)
        cases = [operation.read(text) for text in config.shapes or operation.cases[kind]]
        measured[name] = []
        peers = peers_of(name, kind, config.peers, config.op)
        for case in tqdm(cases, desc=name, unit="shape"):
            for dtype in dtypes:
                torch.manual_seed(0)
                options = config.device, peers, config.rounds
                measured[name].append(measure(operation, case, dtype, *options))
        print(f"\n{name} on {kind}: {operation.sizes}")
        print(as_table(measured[name], operation.unit), "\n")
        findings += findings_of(name, measured[name])
        if name in BESIDE and not config.shapes:
            findings += BESIDE[name](config.rounds)
    if kind == "cpu":
        print("this is a CPU: `flash` is the readable loop over tiles in Python\n")
    draw(measured)
    if config.output is not None:
        text = json.dumps({name: as_json(each) for name, each in measured.items()}, indent=1)
        print("timings", write_atomically(config.output, text + "\n"))
    return findings


if __name__ == "__main__":
    quick = Config(
        shapes=("1x2x128x16", "1x2x128x16 causal"), peers=("naive", "flash", "torch"), rounds=3
    )
    run(main, Config(), quick=quick)
