"""The scheduler: which tokens the next pass of a serving engine reads, and whose memory it takes.

    1  every text that is read to its end       its one new token
    2  every text that is not                   the next chunk of it, of what the budget leaves
    3  texts that wait, in order of arrival     while memory, budget and places last

All run together in one pass (continuous batching): a text joins when there is room and leaves when
it ends, and a long prompt is read in chunks, so that nobody waits for the longest. The budget is
how many tokens a pass reads at most, which bounds the time between two tokens of a running text.

When memory is out, the youngest running text gives its blocks back and waits again (preemption);
later it reads what it had, prompt and written tokens, once more (recompute). The oldest is
therefore never stopped, and since each text alone fits into memory it ends: so does everybody.
Nobody overtakes a text that waits, but for a fork: it begins in the blocks of a text that runs.

Paper   Yu et al. 2022, Orca (OSDI '22): iteration-level scheduling; Kwon et al. 2023,
        arXiv:2309.06180, section 4.5: preemption; Agrawal et al. 2023, arXiv:2308.16369: chunks
Run     uv run python implementations/serving/scheduler.py
"""

from bisect import insort
from dataclasses import dataclass, field
from typing import NamedTuple

from implementations.serving.block_manager import BlockManager, Copy, OutOfBlocks, Text


@dataclass(eq=False)
class Request:
    """A text on its way."""

    tokens: list[int]
    """its prompt, and what was written since"""
    longest: int
    """how many tokens it may grow to"""
    number: int = field(default=-1, init=False)
    """its place in the order of arrival"""
    text: Text | None = field(default=None, init=False)
    """its blocks, which hold what is read of it; None while it waits"""

    @property
    def read(self) -> int:
        """How many of its tokens are in the cache, or will be after the pass that is planned."""
        return 0 if self.text is None else len(self.text.tokens)

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.read


class Chunk(NamedTuple):
    """Tokens start ... end - 1 of a request, to be read in the next pass."""

    request: Request
    start: int
    end: int


class Plan(NamedTuple):
    """What the next pass reads, after these copies are made."""

    chunks: list[Chunk]
    copies: list[Copy]


class Scheduler:
    """Requests that run and requests that wait, each in order of arrival.

    Args:
        manager: hands out the blocks.
        batch: how many requests run at once at most.
        budget: how many tokens one pass reads at most.
        chunk: how many tokens of one request a pass reads at most; the whole budget unless given.

    Raises:
        ValueError: a limit is below 1, or the budget does not hold a token for each request.
    """

    def __init__(self, manager: BlockManager, batch: int, budget: int, chunk: int | None = None):
        self.manager, self.batch, self.budget = manager, batch, budget
        self.chunk = budget if chunk is None else chunk
        if min(batch, self.chunk) < 1:
            raise ValueError(f"limits are 1 or more, got batch {batch} and chunk {self.chunk}")
        if budget < batch:
            raise ValueError(f"{batch} running texts need a budget of as many tokens, got {budget}")
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.arrivals = self.preemptions = 0

    def check(self, longest: int) -> None:
        """Raise ValueError if a text of so many tokens does not fit into an empty memory."""
        wanted, blocks = self.manager.count(longest), len(self.manager.references)
        if wanted > blocks:
            page = self.manager.page
            raise ValueError(f"{longest} tokens need {wanted} blocks of {page}, there are {blocks}")

    def add(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            ValueError: as `check`.
        """
        self.check(request.longest)
        self.arrive(request, self.waiting)

    def fork(self, request: Request, twin: Request) -> None:
        """Add a twin that begins with all that is read of a request, in the same blocks and before
        all who wait if there is a place.

        Raises:
            ValueError: as `check`.
        """
        self.check(twin.longest)
        if request.text is None or len(self.running) == self.batch:
            self.arrive(twin, self.waiting)
        else:
            twin.text = self.manager.fork(request.text)
            self.arrive(twin, self.running)

    def arrive(self, request: Request, queue: list[Request]) -> None:
        request.number = self.arrivals
        self.arrivals += 1
        queue.append(request)

    def release(self, request: Request) -> None:
        """Forget a request that ended, and give its blocks back."""
        if request.text is None:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self.manager.free(request.text)
            request.text = None

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks; it waits at its place in the order of arrival."""
        insort(self.waiting, request, key=lambda waiting: waiting.number)
        self.release(request)
        self.preemptions += 1

    def plan(self) -> Plan:
        """The next pass; its blocks are taken, so it has to be made or undone."""
        before = self.preemptions
        running = [(request, request.unread) for request in self.running]
        room = self.budget - sum(unread == 1 for _, unread in running)
        chunks, copies = [], []
        for request, unread in running:  # the oldest first, so that no victim is planned already
            if request.text is None:
                continue
            start = len(request.tokens) - unread
            count = 1 if unread == 1 else min(unread, self.chunk, room)
            made = self.grow(request, start, start + count) if count else None
            if made is not None:
                room -= count if unread > 1 else 0
                chunks.append(Chunk(request, start, start + count))
                copies += made
        if self.preemptions == before:
            chunks += self.admit(room)
        return Plan(chunks, copies)

    def grow(self, request: Request, start: int, end: int) -> list[Copy] | None:
        """Blocks for the next tokens, from younger requests if need be; None if it had to stop."""
        while request.text is not None:
            try:
                return self.manager.append(request.text, request.tokens[start:end])
            except OutOfBlocks:
                self.preempt(self.running[-1])
        return None

    def admit(self, room: int) -> list[Chunk]:
        """The first chunks of requests that waited. What the cache knows of them is not read."""
        chunks = []
        while self.waiting and len(self.running) < self.batch and room > 0:
            request = self.waiting[0]
            known = self.known(request)
            if known is None:
                break
            end = min(len(request.tokens), known + min(self.chunk, room))
            request.text, start = self.manager.allocate(request.tokens[:end])
            insort(self.running, request, key=lambda running: running.number)
            del self.waiting[0]
            chunks.append(Chunk(request, start, end))
            room -= end - start
        return chunks

    def known(self, request: Request) -> int | None:
        """How many of its first tokens are in the cache; None if the request has to wait.

        It needs all its blocks, and one more for each text that runs: else those would soon stop it
        again.
        """
        manager, tokens = self.manager, request.tokens
        table = manager.known(manager.digests(tokens)[: (len(tokens) - 1) // manager.page])
        idle = len(manager.idle) - sum(block in manager.idle for block in table)
        wanted = manager.count(len(tokens)) - len(table) + len(self.running)
        return len(table) * manager.page if wanted <= idle else None

    def undo(self) -> None:
        """A pass was planned or made, but not to its end: nobody knows what is in the cache, so it
        is empty from here on, and all who ran wait again.

        A request is in one of the two queues at any time, so that an interrupt loses none.
        """
        self.manager.clear()
        everybody = {*self.running, *self.waiting}
        for request in everybody:
            request.text = None
        self.waiting = sorted(everybody, key=lambda request: request.number)
        self.running = []


def main() -> None:
    scheduler = Scheduler(BlockManager(blocks=10, page=4), batch=4, budget=8)
    requests = {"A": Request([1] * 3, 20), "B": Request([2] * 14, 20), "C": Request([3] * 4, 12)}
    names = {request: name for name, request in requests.items()}
    for request in requests.values():
        scheduler.add(request)
    step = 0
    while scheduler.running or scheduler.waiting:
        step, plan = step + 1, scheduler.plan()
        for request, *_ in plan.chunks:
            if not request.unread:
                request.tokens.append(0)
            if len(request.tokens) == request.longest:
                scheduler.release(request)
        parts = (f"{names[request]} {start}-{end - 1}" for request, start, end in plan.chunks)
        waits = "".join(names[request] for request in scheduler.waiting)
        print(f"pass {step:2}: reads {', '.join(parts):26} waiting: {waits}")


if __name__ == "__main__":
    main()
