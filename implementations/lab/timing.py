"""Who is faster, and by how much: interleaved rounds, medians, and ratios taken pair by pair.

    ratio = median over rounds of  time(peer) / time(ours)

A machine's speed drifts, so A A A B B B measures the drift and A B A B does not. Both run once in
every round, in alternating order, and the ratio is taken inside the round. On a GPU each run is
timed with events and starts with an L2 cache that holds none of its data. Inputs of zeros are
refused: they run faster than real ones.

Run     uv run python implementations/lab/timing.py
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

L2_FLUSH_BYTES = 256 * 2**20  # over four times the 60 MB of an H200
FLUSHES = 16  # 1.2 ms together on an H200: longer than any call here takes to be launched


@dataclass(frozen=True)
class Timings:
    """Seconds of every round, by name."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of one call."""
        return statistics.median(self.seconds[name])

    def ratio(self, ours: str, peer: str) -> float:
        """How many times faster `ours` is than `peer`: the median over rounds of peer / ours."""
        return statistics.median(self.ratios(ours, peer))

    def spread(self, ours: str, peer: str) -> float:
        """Half the distance between the quartiles of that ratio."""
        return half_between_quartiles(self.ratios(ours, peer))

    def ratios(self, ours: str, peer: str) -> list[float]:
        """peer / ours, round by round."""
        return [b / a for a, b in zip(self.seconds[ours], self.seconds[peer], strict=True)]


def half_between_quartiles(ratios: list[float]) -> float:
    """Half the distance between the quartiles: half of the ratios lie in a range twice as long."""
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return (high - low) / 2


def over_rounds(ratios: list[float], repeated: str = "rounds") -> dict[str, Any]:
    """A Finding's measurement of a ratio of times: median, spread, and how many of what.

    Of one there is no spread, and nothing was repeated.
    """
    found = {"measured": statistics.median(ratios)}
    if len(ratios) > 1:
        found |= {"spread": half_between_quartiles(ratios), "seeds": len(ratios)}
        found["repeated"] = repeated
    return found


def time_interleaved(
    functions: Mapping[str, Callable], *inputs: Tensor, rounds: int = 20, warmup: int = 3
) -> Timings:
    """Time every function on the same inputs, once a round, in alternating order.

    Args:
        functions: what to time, by name; each is called with `*inputs`.
        rounds: timed calls of each function, at least 2.
        warmup: untimed calls first, for compilation and caches.

    Raises:
        ValueError: an input holds only zeros, or there are fewer than two rounds.
    """
    if rounds < 2:
        raise ValueError(f"a median needs at least two rounds, got {rounds}")
    for position, value in enumerate(inputs):
        if value.numel() and not value.count_nonzero():
            raise ValueError(f"input {position} is all zeros, which run faster than real data")
    on_gpu = any(value.is_cuda for value in inputs)
    once = seconds_on_gpu if on_gpu else seconds_on_cpu
    for _ in range(warmup):
        for function in functions.values():
            function(*inputs)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        order = list(functions) if turn % 2 == 0 else list(reversed(functions))
        for name in order:
            seconds[name].append(once(functions[name], inputs))
    return Timings(seconds)


def seconds_on_cpu(function: Callable, inputs: tuple[Tensor, ...]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    function(*inputs)
    return time.perf_counter() - start


def seconds_on_gpu(function: Callable, inputs: tuple[Tensor, ...]) -> float:
    """Seconds between two events around one call, with a cold L2 cache.

    The flushes also keep the GPU busy while the call is being launched, so that it is the GPU's
    time alone: in a model the launches run ahead in the same way.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(FLUSHES):
        torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
    start.record()
    function(*inputs)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def main() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    timings = time_interleaved(
        {"float32": torch.matmul, "float64": lambda a, b: a.double() @ b.double()}, left, right
    )
    for name in timings.seconds:
        print(f"  {name}  {timings.median(name) * 1e3:7.3f} ms")
    ratio, spread = timings.ratio("float32", "float64"), timings.spread("float32", "float64")
    print(f"  a 512 x 512 product in float32 is {ratio:.2f} +- {spread:.2f} times faster")


if __name__ == "__main__":
    main()
