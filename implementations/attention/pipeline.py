"""How many cycles attention takes on a Hopper multiprocessor, if its parts overlap and if not.

    share of the matrix rate = cycles of the products alone / cycles until all is done

A multiprocessor has units that work side by side when they are asked to. A block of 128 keys seen
by 128 queries of dim 128 needs, in cycles of each unit:

    products       Q Kᵀ and P V      4 · 128 · 128 · 128 operations, 4,096 a cycle      2,048
    exponentials   of the softmax        128 · 128, 16 a cycle                          1,024
    arithmetic     maxima                128 · 128, 64 a cycle                            256
                   shrinking O           128 · 128, 128 a cycle                           128
    copies         K and V               2 · 128 · 128 · 2 bytes, 64 a cycle            1,024

The other instructions of a softmax (scale and subtract, add, round) fit beside the exponentials,
eight cycles each, of the same warp. What is asked for when is the schedule: a generator for every
warpgroup, which says what it starts and what it waits for, as the kernels of pipeline_hopper.py do.
The simulation is then a matter of adding up. Nothing waits but for a unit, a buffer or a copy's
latency, so its answers are bounds: what a program with this schedule and no other delay reaches.

Units     H100 whitepaper and CUDA programming guide, arithmetic instructions, capability 9.0
Assumed   a copy's latency of 700 cycles, 1,000 to start a program
Paper     Shah et al. 2024, arXiv:2407.08608
Fast      pipeline_hopper.py: the same steps as kernels
Run       uv run python implementations/attention/pipeline.py
"""

import heapq
from collections import defaultdict
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

SIZE = KEYS = DIM = 128  # queries of a tile, keys of a block, dim
STAGES = 2  # blocks of keys on the chip
COPY_LATENCY, PROGRAM_START = 700, 1000  # cycles
PRODUCTS = 4096  # operations a cycle
SLICES = 8  # two warpgroups that compute at the same time take turns, so many in a block


class Costs(NamedTuple):
    """Cycles of a warpgroup's part of a block, or of both warpgroups' together."""

    product: float
    """one of the two"""
    maxima: float
    exponentials: float
    shrinking: float

    @classmethod
    def of(cls, rows: int) -> "Costs":
        return cls(
            product=2 * rows * KEYS * DIM / PRODUCTS,
            maxima=rows * KEYS / 64,
            exponentials=rows * KEYS / 16,
            shrinking=rows * DIM / 128,
        )


COPY = KEYS * DIM * 2 / 64  # of keys, of values, and of a tile's queries or output


class Span(NamedTuple):
    """A unit at work, for the picture."""

    unit: str
    who: str
    start: float
    stop: float


@dataclass
class Moment:
    """Something that will have happened once all who take part have said when."""

    needed: int = 1
    times: list[float] = field(default_factory=list)

    @property
    def time(self) -> float | None:
        return max(self.times) if len(self.times) == self.needed else None


Actor = Generator[Moment, float, None]
"""yields what it waits for, and is sent the time when that has happened"""


class Multiprocessor:
    """Units that each do one thing at a time, in the order in which they are asked.

    Args:
        consumers: how many must have read a block before its slot is free.
        delay: cycles that a warpgroup loses in each block without asking a unit for anything.
    """

    def __init__(self, consumers: int, delay: float = 0.0):
        self.delay = delay
        self.free: dict[str, float] = defaultdict(float)
        self.spans: list[Span] = []
        self.full: dict[tuple[str, int], Moment] = defaultdict(Moment)
        self.empty: dict[tuple[str, int], Moment] = defaultdict(lambda: Moment(consumers))

    def start(self, unit: str, who: str, now: float, cycles: float) -> Moment:
        """Ask for work now; the moment when it will be done."""
        begin = max(now, self.free[unit])
        self.free[unit] = begin + cycles
        self.spans.append(Span(unit, who, begin, begin + cycles))
        return Moment(1, [begin + cycles])

    def copy(self, who: str, now: float) -> Moment:
        """One block; the next copy need not wait for this one's latency."""
        done = self.start("copies", who, now, COPY)
        return Moment(1, [done.times[0] + COPY_LATENCY])

    def softmax(self, who: str, now: float, costs: Costs) -> Generator[Moment, float, float]:
        """Maxima, then exponentials, in slices: warpgroups that meet here share the units."""
        for unit, cycles in (("arithmetic", costs.maxima), ("exponentials", costs.exponentials)):
            for _ in range(SLICES):
                now = yield self.start(unit, who, now, cycles / SLICES)
        return (yield Moment(1, [now + self.delay]))

    def run(self, actors: dict[str, Actor]) -> float:
        """Let all of them act in the order of time; when the last has finished.

        Raises:
            ValueError: they wait for one another.
        """
        now = dict.fromkeys(actors, 0.0)
        waiting = {name: actor.send(None) for name, actor in actors.items()}
        while waiting:
            times = {name: moment.time for name, moment in waiting.items()}
            ready = [(max(now[n], t), n) for n, t in times.items() if t is not None]
            if not ready:
                raise ValueError(f"nobody can go on: {', '.join(waiting)}")
            time, name = min(ready)
            now[name] = time
            try:
                waiting[name] = actors[name].send(time)
            except StopIteration:
                del waiting[name]
        return max(now.values())


def alone(machine: Multiprocessor, tiles: Iterable[int]) -> Actor:
    """Copy, multiply, softmax, copy, multiply: both warpgroups and nobody beside them."""
    costs, who = Costs.of(SIZE), "both"
    now = yield Moment(1, [0.0])
    for blocks in tiles:
        now = yield machine.copy(who, now)
        for _ in range(blocks):
            now = yield machine.copy(who, now)
            now = yield machine.start("products", who, now, costs.product)
            now = yield from machine.softmax(who, now, costs)
            now = yield machine.start("arithmetic", who, now, costs.shrinking)
            now = yield machine.copy(who, now)
            now = yield machine.start("products", who, now, costs.product)
        now = yield machine.copy(who, now)


def producer(machine: Multiprocessor, tiles: Iterable[int]) -> Actor:
    """Copies of keys and values, as early as there is a slot."""
    now = yield Moment(1, [0.0])
    count = 0
    for turn, blocks in enumerate(tiles):
        if turn:
            now = yield machine.empty["q", turn - 1]
        machine.full["q", turn].times += machine.copy("producer", now).times
        for _ in range(blocks):
            for kind in "kv":
                if count >= STAGES:
                    now = yield machine.empty[kind, count - STAGES]
                machine.full[kind, count].times += machine.copy("producer", now).times
            count += 1


def in_turn(machine: Multiprocessor, tiles: Iterable[int], who: str, rows: int) -> Actor:
    """Multiply, softmax, multiply; the copies are the producer's."""
    costs, count = Costs.of(rows), 0
    for turn, blocks in enumerate(tiles):
        now = yield machine.full["q", turn]
        for _ in range(blocks):
            now = yield machine.full["k", count]
            now = yield machine.start("products", who, now, costs.product)
            machine.empty["k", count].times.append(now)
            now = yield from machine.softmax(who, now, costs)
            now = yield machine.start("arithmetic", who, now, costs.shrinking)
            now = yield machine.full["v", count]
            now = yield machine.start("products", who, now, costs.product)
            machine.empty["v", count].times.append(now)
            count += 1
        machine.empty["q", turn].times.append(now)
        stored = machine.copy(who, now)
    yield stored


def in_flight(machine: Multiprocessor, tiles: Iterable[int], who: str, rows: int) -> Actor:
    """Q Kᵀ of a block and P V of the block before are asked for at once."""
    costs, count = Costs.of(rows), 0
    for turn, blocks in enumerate(tiles):
        now = yield machine.full["q", turn]
        now = yield machine.full["k", count]
        now = yield machine.start("products", who, now, costs.product)
        machine.empty["k", count].times.append(now)
        now = yield from machine.softmax(who, now, costs)
        for _ in range(1, blocks):
            now = yield machine.full["k", count + 1]
            scores = machine.start("products", who, now, costs.product)
            now = yield machine.full["v", count]
            output = machine.start("products", who, now, costs.product)
            now = yield scores
            machine.empty["k", count + 1].times.append(now)
            now = yield from machine.softmax(who, now, costs)
            now = yield output
            machine.empty["v", count].times.append(now)
            now = yield machine.start("arithmetic", who, now, costs.shrinking)
            count += 1
        now = yield machine.full["v", count]
        now = yield machine.start("products", who, now, costs.product)
        machine.empty["v", count].times.append(now)
        machine.empty["q", turn].times.append(now)
        count += 1
        stored = machine.copy(who, now)
    yield stored


# The steps of the ladder by name: how many consumers, and what each does.
STEPS = {
    "in turn": (1, None),
    "copies ahead": (1, in_turn),
    "two consumers": (2, in_turn),
    "products in flight": (2, in_flight),
    "persistent": (2, in_flight),
    "in pairs": (2, in_flight),
}


def simulate(
    step: str, tiles: list[int], in_step: bool = False, delay: float = 0.0
) -> tuple[float, list[Span]]:
    """Cycles of one program that works on tiles of so many blocks, and what its units did when.

    Nothing makes two warpgroups take turns. At best one multiplies while the other does not, which
    is what units in order of asking lead to; at worst they do the same thing all the time, as one
    consumer of all rows would: `in_step`.
    """
    consumers, work = STEPS[step]
    consumers = 1 if in_step else consumers
    machine = Multiprocessor(consumers, delay)
    if work is None:
        return machine.run({"both": alone(machine, tiles)}), machine.spans
    names = ["both"] if consumers == 1 else ["first", "second"]
    actors = {name: work(machine, tiles, name, SIZE // consumers) for name in names}
    return machine.run({"producer": producer(machine, tiles)} | actors), machine.spans


class Line(NamedTuple):
    """Cycles of a program are a straight line in the number of its blocks."""

    block: float
    first: float
    """what the first tile takes besides"""
    later: float
    """what each later tile takes besides"""

    @classmethod
    def of(cls, step: str, in_step: bool = False, delay: float = 0.0) -> "Line":
        short, long, twice = (simulate(step, t, in_step, delay)[0] for t in ([8], [24], [8, 8]))
        block = (long - short) / 16
        return cls(block, short - 8 * block, twice - short - 8 * block)


def kernel_cycles(
    step: str,
    planes: int,
    length: int,
    causal: bool,
    programs: int,
    in_step: bool = False,
    delay: float = 0.0,
) -> float:
    """Cycles of a whole launch, with as many programs at a time as there are multiprocessors."""
    line = Line.of(step, in_step, delay)
    a_head = length // SIZE
    blocks = [i + 1 if causal else a_head for i in reversed(range(a_head))] * planes
    if step not in ("persistent", "in pairs"):  # the next program goes where one has ended
        free = [0.0] * programs
        for count in blocks:
            soonest = heapq.heappop(free)
            heapq.heappush(free, soonest + PROGRAM_START + line.first + line.block * count)
        return max(free)
    work = [PROGRAM_START + line.first - line.later] * programs
    for number, count in enumerate(blocks):
        program = number % programs
        if step == "in pairs" and causal:
            program = min(number, len(blocks) - 1 - number) % programs
        work[program] += line.later + line.block * count
    return max(work)


def useful_operations(planes: int, length: int, causal: bool) -> float:
    """Of both products; half of them when causal."""
    return 4 * planes * length**2 * DIM / (2 if causal else 1)


def copied_bytes(planes: int, length: int, causal: bool) -> float:
    """Keys and values of every block of every tile, and the queries."""
    a_head = length // SIZE
    blocks = planes * (a_head * (a_head + 1) // 2 if causal else a_head**2)
    return (blocks * 2 * KEYS + planes * length) * DIM * 2


def lost_in_a_block(
    cycles: float, planes: int, length: int, causal: bool, programs: int, step: str = "copies ahead"
) -> float:
    """The delay in every block that explains a launch's cycles; of a step that hides no delay."""
    setting = (step, planes, length, causal, programs)
    without, with_one = (kernel_cycles(*setting, delay=delay) for delay in (0.0, 1.0))
    return (cycles - without) / (with_one - without)


def main() -> None:
    products = 2 * Costs.of(SIZE).product
    print(f"128 queries, 128 keys: cycles, and the share of them that is products ({products:.0f})")
    print("                      in step     taking turns")
    for step in STEPS:
        cycles = [Line.of(step, in_step).block for in_step in (True, False)]
        columns = "     ".join(f"{count:5.0f}  {products / count:.2f}" for count in cycles)
        print(f"  {step:18} {columns}")


if __name__ == "__main__":
    main()
