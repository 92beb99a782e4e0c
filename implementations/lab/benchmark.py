"""One operation in several forms, side by side: speed, useful work a second, and agreement.

    rate = useful work of a case / median seconds        FLOPs or bytes that any form must do
    geometric mean of speed ratios over the cases        one number against each peer

An `Operation` is an entry of a table: its forms by name, its inputs by case, its useful work. A
case is written as its sizes and its options, "16x32x1024x64 causal". Forms are timed interleaved;
each is first compared with the first one, because a fast wrong answer is no speed.

Run     uv run python implementations/lab/benchmark.py
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from implementations.lab.timing import Timings, time_interleaved


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement, and the options that every form is called with."""

    sizes: tuple[int, ...]
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read "16x32x1024x64 causal".

        Raises:
            ValueError: the sizes are not positive integers joined by x.
        """
        sizes, *options = text.split() or [""]
        numbers = sizes.split("x")
        if not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise ValueError(f"a shape is written like '16x32x1024x64 causal', got {text!r}")
        return cls(tuple(map(int, numbers)), tuple(options))

    def __str__(self) -> str:
        return " ".join(["x".join(map(str, self.sizes)), *self.options])

    def keywords(self) -> dict[str, bool]:
        return dict.fromkeys(self.options, True)


@dataclass(frozen=True)
class Operation:
    """What can be measured of one operation.

    Args:
        sizes: what the numbers of a case are: "batch x heads x length x dim".
        options: the options that a case may have, keywords of every form.
        forms: for a device type ("cpu", "cuda"), functions of the inputs by name, made anew for
            every case; the others are compared with the first one that fits.
        inputs: tensors for a case, a dtype and a device.
        work: useful operations, or bytes, of a case, given the bytes of one element.
        unit: FLOP/s or B/s.
        ours: the form whose speed is set against the others'.
        cases: by device type, what is measured unless told otherwise.
        backward: time the gradients of all inputs alone, under a random upstream gradient.
        goals: the geometric mean that is hoped for against a peer.
        parts: kinds of cases whose means are told apart, each with its own goals.
    """

    sizes: str
    options: tuple[str, ...]
    forms: Callable[[str], Mapping[str, Callable]]
    inputs: Callable[[Case, torch.dtype, str], Sequence[Tensor]]
    work: Callable[[Case, int], float]
    unit: str
    ours: str
    cases: Mapping[str, Sequence[str]]
    backward: bool = False
    goals: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def read(self, text: str) -> Case:
        """A case of this operation.

        Raises:
            ValueError: as `Case.parse`, or the sizes or options are not this operation's.
        """
        case, wanted = Case.parse(text), self.sizes.split(" x ")
        if len(case.sizes) != len(wanted):
            raise ValueError(f"a shape is {self.sizes}, got {text!r}")
        if unknown := set(case.options) - set(self.options):
            raise ValueError(f"the options are {self.options}, got {sorted(unknown)}")
        return case


@dataclass(frozen=True)
class Measurement:
    """One case in one dtype."""

    case: Case
    dtype: str
    timings: Timings
    rates: dict[str, float]
    """useful work a second, by form"""
    apart: dict[str, float]
    """mean difference from the first form, over the first form's mean size"""
    left_out: tuple[str, ...]
    """forms that do not fit into the device's memory"""


def measure(
    operation: Operation,
    case: Case,
    dtype: str,
    device: str,
    peers: Sequence[str] = (),
    rounds: int = 20,
) -> Measurement:
    """Time the chosen forms (all, unless named) of one case.

    Raises:
        ValueError: there is no such form or dtype, or nothing fits.
    """
    forms = chosen(operation, device, peers)
    inputs = operation.inputs(case, dtype_named(dtype), device)
    calls, results, left_out = {}, {}, []
    upstream = None
    for name, form in forms.items():
        try:
            call, upstream = prepare(operation, form, inputs, case, upstream)
            results[name] = flat(call(*inputs))
        except torch.OutOfMemoryError:
            left_out.append(name)
            continue
        calls[name] = call
    if not calls:
        raise ValueError(f"no form of {case} fits into the memory of {device}")
    apart = {
        name: difference(result, next(iter(results.values()))) for name, result in results.items()
    }
    results.clear()
    timings = time_interleaved(calls, *inputs, rounds=rounds)
    work = operation.work(case, inputs[0].element_size())
    rates = {name: work / timings.median(name) for name in calls}
    return Measurement(case, dtype, timings, rates, apart, tuple(left_out))


def chosen(operation: Operation, device: str, peers: Sequence[str]) -> dict[str, Callable]:
    """The forms named, in the order of the table."""
    forms = operation.forms(torch.device(device).type)
    if unknown := set(peers) - forms.keys():
        raise ValueError(f"the forms here are {', '.join(forms)}, got {', '.join(sorted(unknown))}")
    return {name: form for name, form in forms.items() if not peers or name in peers}


def dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a dtype is float32, float16, bfloat16 or float64, got {name!r}")
    return dtype


def prepare(
    operation: Operation,
    form: Callable,
    inputs: Sequence[Tensor],
    case: Case,
    upstream: Tensor | None,
) -> tuple[Callable, Tensor | None]:
    """What is timed: the form, or the gradients of an output that was made before."""
    if not operation.backward:
        return (lambda *inputs: form(*inputs, **case.keywords())), None
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    output = form(*leaves, **case.keywords())
    upstream = torch.randn_like(output) if upstream is None else upstream
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def gradients(*_: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, wanted, upstream, retain_graph=True)

    return gradients, upstream


def flat(result: Tensor | Sequence[Tensor]) -> Tensor:
    """All numbers of a result, as one vector."""
    parts = [result] if isinstance(result, Tensor) else result
    return torch.cat([part.detach().flatten() for part in parts])


def difference(result: Tensor, reference: Tensor) -> float:
    """Mean absolute difference over mean size; NaN where either has one."""
    apart = (result.float() - reference.float()).abs().mean()
    return (apart / reference.float().abs().mean()).item()


def ratios(measurements: Sequence[Measurement], ours: str, peer: str) -> list[float]:
    """How many times faster `ours` is than `peer`, for each case in which both ran."""
    both = [m.timings for m in measurements if {ours, peer} <= m.timings.seconds.keys()]
    return [timings.ratio(ours, peer) for timings in both]


def magnitude(measurements: Sequence[Measurement]) -> tuple[str, float]:
    """The unit's prefix and its size: tera, or giga where all is slower than a tenth of that."""
    fastest = max(rate for m in measurements for rate in m.rates.values())
    return ("T", 1e12) if fastest > 1e11 else ("G", 1e9)


def as_table(measurements: Sequence[Measurement], unit: str) -> str:
    """Median milliseconds and rate of every form, a line a case."""
    names = list(dict.fromkeys(name for m in measurements for name in (*m.rates, *m.left_out)))
    prefix, factor = magnitude(measurements)
    lines = [f"{'':34}" + "".join(f"{name:>20}" for name in names)]
    for m in measurements:
        cells = [
            f"{m.timings.median(name) * 1e3:10.3f} ms {m.rates[name] / factor:6.1f}"
            if name in m.rates
            else f"{'does not fit':>20}"
            for name in names
        ]
        lines.append(f"{f'{m.case} {m.dtype}':34}" + "".join(cells))
    return "\n".join([f"milliseconds, and {prefix}{unit}", *lines])


def as_json(measurements: Sequence[Measurement]) -> list[dict]:
    """Every measurement with the seconds of all its rounds."""
    return [
        {
            "shape": str(m.case),
            "dtype": m.dtype,
            "rates": m.rates,
            "apart": m.apart,
            "left_out": m.left_out,
            "seconds": m.timings.seconds,
        }
        for m in measurements
    ]


def main() -> None:
    product = Operation(
        sizes="rows x columns",
        options=(),
        forms=lambda device: {
            "matmul": torch.matmul,
            "sum of products": lambda a, b: (a[..., None] * b).sum(1),
        },
        inputs=lambda case, dtype, device: [
            torch.randn(*case.sizes),
            torch.randn(*case.sizes[::-1]),
        ],
        work=lambda case, element: 2 * case.sizes[0] ** 2 * case.sizes[1],
        unit="FLOP/s",
        ours="matmul",
        cases={},
    )
    measurements = [measure(product, Case((n, n)), "float32", "cpu") for n in (64, 128)]
    print(as_table(measurements, product.unit))
    mean = statistics.geometric_mean(ratios(measurements, "matmul", "sum of products"))
    print(f"matmul is {mean:.0f} times as fast, in the geometric mean")


if __name__ == "__main__":
    main()
