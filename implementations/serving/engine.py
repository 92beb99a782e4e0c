"""A serving engine: many requests, one model, and to each the text that it would get alone.

    step   plan, one pass over all planned tokens, one new token for every text read to its end

What a request gets depends on nothing but itself: its logits on its own keys, its randomness on its
seed and the place in its text, its end on its own tokens. So a request may be stopped and resumed,
forked, or batched with any other, and in exact arithmetic its text is the same. What goes wrong
inside a request ends that request alone. What stops a pass (Ctrl-C, say) costs the texts that run
their place in the cache: they are read again, and go on.

    engine = Engine(decoder, blocks=256)
    engine.generate(prompts, Parameters(max_tokens=32, temperature=0.8))    all at once
    async for token in engine.stream(prompt): ...                           as they come

Paper   Kwon et al. 2023, arXiv:2309.06180 (vLLM); Yu et al. 2022, Orca (OSDI '22)
Run     uv run python implementations/serving/engine.py
"""

import asyncio
import math
import operator
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implementations.attention.paged import attention_paged
from implementations.models.decoder import Decoder
from implementations.serving.block_manager import BlockManager
from implementations.serving.decode_graphs import DecodeGraphs
from implementations.serving.draws import draw, uniform
from implementations.serving.paged_cache import Batch, PagedCache, Reader, reader
from implementations.serving.scheduler import Chunk, Request, Scheduler
from implementations.text.sampling import SamplingSettings, greedy, processed

MOST_REPLAYED = 256  # tokens: beyond, the GPU is busy for longer than the launches take


@runtime_checkable
class Constraint(Protocol):
    """Which tokens may come next, as serving/structured.py makes it from a schema."""

    start: int
    """the state before the first token"""
    end: int
    """the token that ends a text"""

    def shortest(self, state: int) -> int:
        """How many tokens a complete text still needs at least."""

    def allowed(self, state: int, remaining: int) -> Bool[Tensor, " vocabulary"]:
        """The tokens after which a text can be completed within `remaining` tokens in all."""

    def after(self, state: int, token: int) -> int:
        """The state after one more token."""


@dataclass(frozen=True)
class Parameters:
    """What a request asks for besides its prompt."""

    max_tokens: int = 16
    temperature: float = 0.0
    """0 takes the likeliest token"""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    """a text ends with the first of these, which is its last token"""
    stop_strings: tuple[str, ...] = ()
    """a text ends when what was written holds one of these"""
    constraint: Constraint | None = None
    """ends the text alone: no other stop beside it"""

    @property
    def sampling(self) -> SamplingSettings:
        filters = self.top_k, self.top_p, self.min_p
        return SamplingSettings(self.temperature or 1.0, *filters, self.repetition_penalty)

    @cached_property
    def plain(self) -> bool:
        """Whether the likeliest token of the model itself is wanted."""
        return (self.temperature, self.repetition_penalty, self.constraint) == (0, 1, None)


@dataclass(eq=False)
class Generation(Request):
    """A request that the engine knows."""

    prompt: int
    """how many of its tokens it was given"""
    parameters: Parameters
    state: int = 0
    """of its constraint"""
    finish: Literal["", "stop", "length", "cancelled", "error"] = field(default="", init=False)
    """why it ended; empty while it has not"""
    error: Exception | None = field(default=None, init=False)

    @property
    def output(self) -> list[int]:
        """The tokens written so far."""
        return self.tokens[self.prompt :]


class Engine:
    """Serves a decoder.

    Args:
        decoder: rotary or without positions; its dtype and device are the engine's.
        blocks: how many blocks of keys and values there are.
        page: how many tokens a block holds.
        batch: how many requests run at once at most.
        budget: how many tokens a pass reads at most.
        chunk: how many tokens of one prompt a pass reads at most; the budget unless given.
        longest: the longest text; the model's positions unless given.
        attention: any function with the signature of `attention_paged`.
        decode: makes text of tokens, for stop strings.
        graphs: capture passes over few tokens as CUDA graphs, now: as many as texts run at once, or
            256 if the budget allows; needs a GPU, and an attention function that can be captured.
        reader: makes the function that reads a batch, as `reader` of serving/paged_cache.py.

    Raises:
        ValueError: as `PagedCache`, `BlockManager` and `Scheduler`; or graphs without a GPU.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        blocks: int,
        page: int = 16,
        batch: int = 32,
        budget: int = 512,
        chunk: int | None = None,
        longest: int | None = None,
        attention: Callable[..., Tensor] = attention_paged,
        decode: Callable[[list[int]], str] | None = None,
        graphs: bool = False,
        reader: Callable[[Decoder, PagedCache], Reader] = reader,
    ):
        self.decoder, self.decode = decoder, decode
        self.longest = decoder.config.positions if longest is None else longest
        self.manager = BlockManager(blocks, page)
        self.scheduler = Scheduler(self.manager, batch, budget, chunk)
        self.cache = PagedCache(decoder, blocks, page, attention)
        self.read_batch, self.graphs = reader(decoder, self.cache), None
        if graphs:
            sizes = max(batch, min(budget, MOST_REPLAYED)), self.longest
            self.graphs = DecodeGraphs(decoder, self.cache, *sizes, self.read_batch)

    # Requests

    def add(self, prompt: Sequence[int], parameters: Parameters | None = None) -> Generation:
        """Queue a prompt.

        Raises:
            ValueError: the request cannot be served; the sentence says why. Nothing is queued.
        """
        parameters = parameters or Parameters()
        tokens = self.check(prompt, parameters)
        start = parameters.constraint.start if parameters.constraint else 0
        longest = len(tokens) + parameters.max_tokens
        generation = Generation(tokens, longest, len(tokens), parameters, start)
        self.scheduler.add(generation)
        return generation

    def check(
        self, prompt: Sequence[int], parameters: Parameters, state: int | None = None
    ) -> list[int]:
        """The prompt as plain integers.

        Raises:
            ValueError: the request cannot be served, its constraint in this state or at its start.
        """
        vocabulary, constraint = self.decoder.config.vocabulary, parameters.constraint
        tokens, stops = whole("tokens", prompt), whole("stop tokens", parameters.stop_tokens)
        (count,) = whole("max_tokens", [parameters.max_tokens])
        if not tokens:
            raise ValueError("a prompt has at least one token, got none")
        wrong = [token for token in tokens if not 0 <= token < vocabulary]
        if wrong:
            raise ValueError(f"tokens are 0 to {vocabulary - 1} here, got {wrong[0]}")
        if count < 1:
            raise ValueError(f"a request asks for at least one token, got max_tokens = {count}")
        if len(tokens) + count > self.longest:
            asked = f"a prompt of {len(tokens)} and {count} new ones"
            raise ValueError(f"a text has at most {self.longest} tokens, got {asked}")
        if not 0 <= parameters.temperature < math.inf:
            given = parameters.temperature
            raise ValueError(f"a temperature is 0 (greedy) or positive and finite, got {given}")
        check_sampling(parameters.sampling, self.decoder.embedding.weight.dtype)
        strings = parameters.stop_strings
        if isinstance(strings, str) or not all(isinstance(string, str) for string in strings):
            raise ValueError(f"stop strings are a tuple of strings, got {strings!r}")
        if strings and self.decode is None:
            raise ValueError("stop strings need an engine with `decode`, this one has none")
        if "" in strings:
            raise ValueError("a stop string has at least one character, got an empty one")
        if constraint is not None:
            if strings or {*stops} - {constraint.end}:
                raise ValueError("a constraint ends its text alone, got stop tokens or strings too")
            fewest = constraint.shortest(constraint.start if state is None else state)
            if fewest > count:
                raise ValueError(f"the constraint needs at least {fewest} tokens, got {count}")
        self.scheduler.check(len(tokens) + count)
        return tokens

    def fork(self, generation: Generation, parameters: Parameters) -> Generation:
        """A second continuation of what a request has written so far. Its constraint goes on too.

        Raises:
            ValueError: the request has ended, or as `add`.
        """
        if generation.finish:
            raise ValueError(f"a request that ended ({generation.finish}) cannot be forked")
        if parameters.constraint is not generation.parameters.constraint:
            raise ValueError("a fork keeps the constraint of the request, got another")
        self.check(generation.tokens, parameters, generation.state)
        tokens, longest = list(generation.tokens), len(generation.tokens) + parameters.max_tokens
        twin = Generation(tokens, longest, len(tokens), parameters, generation.state)
        self.scheduler.fork(generation, twin)
        return twin

    def cancel(self, generation: Generation) -> None:
        """End a request now; one that has ended stays as it is."""
        if not generation.finish:
            self.end(generation, "cancelled")

    def generate(
        self, prompts: Sequence[Sequence[int]], parameters: Parameters | Sequence[Parameters]
    ) -> list[Generation]:
        """All prompts to their ends. A request that failed has `finish` "error" and its `error`.
        Left early, by Ctrl-C, all are cancelled.

        Raises:
            ValueError: a request cannot be served, then none is; or not one set of parameters a
                prompt.
        """
        if isinstance(parameters, Parameters):
            parameters = [parameters] * len(prompts)
        if len(parameters) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with {len(parameters)} parameters")
        pairs = list(zip(prompts, parameters, strict=True))
        for prompt, wanted in pairs:
            self.check(prompt, wanted)
        generations = []
        try:
            for prompt, wanted in pairs:
                generations.append(self.add(prompt, wanted))
            while any(not generation.finish for generation in generations):
                self.step()
        finally:
            for generation in generations:
                self.cancel(generation)
        return generations

    async def stream(
        self, prompt: Sequence[int], parameters: Parameters | None = None
    ) -> AsyncIterator[int]:
        """The tokens of one request as they come. Streams may run side by side; whichever has
        nothing to hand out makes a step for all. Left early, the request is cancelled.

        Raises:
            ValueError: as `add`.
            Exception: what ended the request.
        """
        generation, sent = self.add(prompt, parameters), 0
        try:
            while True:
                for token in generation.output[sent:]:
                    sent += 1
                    yield token
                if generation.finish and sent == len(generation.output):
                    break
                await asyncio.sleep(0)  # the others hand out what the last step gave them
                if sent == len(generation.output) and not generation.finish:
                    self.step()
            if generation.error is not None:
                raise generation.error
        finally:
            self.cancel(generation)

    # A step

    def step(self) -> list[Generation]:
        """One pass; the requests that got a token, or ended without one."""
        chunks = []
        try:
            plan = self.scheduler.plan()
            chunks = sorted(plan.chunks, key=lambda chunk: chunk.end - chunk.start)
            if not chunks:
                return []
            logits = self.read(chunks, plan.copies)
            ready = [row for row, (text, _, end) in enumerate(chunks) if end == len(text.tokens)]
            generations = [chunks[row].request for row in ready]
            if ready:
                self.write(logits if len(ready) == len(chunks) else logits[ready], generations)
            return generations
        except BaseException as problem:
            self.scheduler.undo()
            for text in [text for text in self.scheduler.waiting if text.finish]:
                self.scheduler.release(text)  # it was ending
            if not chunks or not isinstance(problem, Exception):  # Ctrl-C is nobody's fault
                raise
            for text, *_ in chunks:
                if not text.finish:
                    self.end(text, "error", problem)
            return [text for text, *_ in chunks]

    @torch.no_grad()
    def read(self, chunks: list[Chunk], copies: list) -> Float[Tensor, "text vocabulary"]:
        """The pass: logits after each chunk's last token."""
        self.cache.copy(copies)
        if self.graphs is not None and sum(c.end - c.start for c in chunks) <= self.graphs.most:
            return self.graphs(chunks)
        return self.read_batch(Batch.of(chunks, self.cache.page, self.cache.pages.device))

    def write(self, logits: Float[Tensor, "text vocabulary"], texts: list[Generation]) -> None:
        """Each text's next token, and what follows from it; what fails ends its text alone."""
        largest, chosen = (values.tolist() for values in logits.max(-1))
        rows: dict[tuple, list[int]] = defaultdict(list)  # those that are changed alike
        for row, text in enumerate(texts):
            parameters = text.parameters
            if not math.isfinite(largest[row]):
                problem = ValueError(f"the largest logit must be finite, got {largest[row]}")
                self.end(text, "error", problem)
            elif not parameters.plain:
                alone = row if parameters.repetition_penalty != 1 else None
                rows[parameters.sampling, parameters.temperature == 0, alone].append(row)
        groups = list(rows.values())
        for members in groups:
            try:
                tokens = self.choose(logits[members], [texts[row] for row in members])
            except Exception as problem:
                if len(members) > 1:  # whose fault it was shows when each is alone
                    groups += [[row] for row in members]
                else:
                    self.end(texts[members[0]], "error", problem)
            else:
                for row, token in zip(members, tokens, strict=True):
                    chosen[row] = token
        for text, token in zip(texts, chosen, strict=True):
            if not text.finish:
                try:
                    self.append(text, token)
                except Exception as problem:
                    self.end(text, "error", problem)

    def choose(
        self, logits: Float[Tensor, "text vocabulary"], texts: list[Generation]
    ) -> list[int]:
        """A token for each of several texts of the same sampling; the logits are overwritten.

        Raises:
            Exception: one of them has none.
        """
        for row, text in zip(logits, texts, strict=True):
            if text.parameters.constraint is not None:
                remaining = text.longest - len(text.tokens)
                mask = text.parameters.constraint.allowed(text.state, remaining)
                if not mask.any():
                    raise ValueError("the constraint allows no token")
                row.masked_fill_(~mask.to(row.device), -math.inf)
        parameters = texts[0].parameters
        previous = [t.tokens if parameters.repetition_penalty != 1 else [] for t in texts]
        seen = torch.tensor(previous, device=logits.device).long()
        changed = processed(logits, seen, parameters.sampling)
        if parameters.temperature == 0:
            return greedy(changed).tolist()
        places = ((text.parameters.seed, len(text.tokens)) for text in texts)
        u = torch.tensor([uniform(*place) for place in places], dtype=torch.float64)
        return draw(changed.softmax(-1), u.to(logits.device)).tolist()

    def append(self, text: Generation, token: int) -> None:
        """One more token of a text, and its end if it is the last. What may fail, or take long
        enough to be interrupted, comes before the first change or after the last."""
        parameters, ends = text.parameters, text.parameters.stop_tokens
        constraint = parameters.constraint
        if constraint is not None:
            ends = (*ends, constraint.end)
            state = text.state if token in ends else constraint.after(text.state, token)
        finish = ""
        if token in ends or (parameters.stop_strings and self.stopped(text, token)):
            finish = "stop"
        elif len(text.tokens) + 1 >= text.longest:
            finish = "length"
        text.tokens.append(token)
        if constraint is not None:
            text.state = state
        if finish:  # not by `end`: an interrupt at that call would leave a whole text unfinished
            text.finish = finish
            self.scheduler.release(text)

    def stopped(self, text: Generation, token: int) -> bool:
        """Whether what was written holds a stop string with this token."""
        written = self.decode([*text.output, token])
        return any(string in written for string in text.parameters.stop_strings)

    def text(self, generation: Generation) -> str:
        """What a request has written, up to its first stop string.

        Raises:
            ValueError: the engine has no `decode`.
        """
        if self.decode is None:
            raise ValueError("text needs an engine with `decode`, this one has none")
        written = self.decode(generation.output)
        strings = generation.parameters.stop_strings
        return written[: min((written.find(s) for s in strings if s in written), default=None)]

    def end(self, generation: Generation, finish: str, error: Exception | None = None) -> None:
        """Say why, and give its blocks back."""
        generation.finish, generation.error = finish, error
        self.scheduler.release(generation)


def whole(name: str, values: Iterable[int]) -> list[int]:
    """The values as plain integers.

    Raises:
        ValueError: one of them is something else, or there are not several.
    """
    try:
        return [int(operator.index(value)) for value in values]
    except TypeError as problem:
        raise ValueError(f"{name} have to be whole numbers: {problem}") from None


@lru_cache
def check_sampling(settings: SamplingSettings, dtype: torch.dtype) -> None:
    """Raise ValueError unless logits of 100 and 0 can be changed so, the first token being one that
    was seen: what overflows for them would for most. Most requests ask for the same settings."""
    likely, seen = torch.tensor([[100.0, 0.0]], dtype=dtype), torch.zeros(1, 1).long()
    try:
        greedy(processed(likely, seen, settings))
    except ValueError as problem:
        raise ValueError(f"these sampling settings cannot be used: {problem}") from None


def main() -> None:
    from implementations.sources.weights import smollm2_tokenizer

    tokenizer = smollm2_tokenizer()
    engine = Engine(Decoder.from_smollm2(), blocks=64, decode=tokenizer.decode)
    prompts = ["The capital of France is", "Two plus two is", "The opposite of hot is"]
    wanted = [Parameters(12), Parameters(12, temperature=0.8, seed=1), Parameters(12)]
    tokens = [tokenizer.encode(prompt).ids for prompt in prompts]
    for prompt, generation in zip(prompts, engine.generate(tokens, wanted), strict=True):
        print(f"{prompt!r} -> {engine.text(generation)!r} ({generation.finish})")


if __name__ == "__main__":
    main()
