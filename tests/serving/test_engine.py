"""The engine against each request alone: any order of operations, bad requests, and accidents."""

import asyncio
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from implementations.models.decoder import Decoder
from implementations.serving.draws import uniform
from implementations.serving.engine import Engine, Generation, Parameters
from implementations.text.sampling import generate, processed

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"


def decode(tokens: list[int]) -> str:
    return "".join(LETTERS[token] for token in tokens)


@torch.no_grad()
def alone(decoder: Decoder, tokens: list[int], parameters: Parameters, count: int) -> list[int]:
    """The text token by token, all of it read again for each: no cache, no batch, no engine.

    The draw is written out once more: the first token whose running sum is above u.
    """
    tokens = list(tokens)
    written: list[int] = []
    for _ in range(count):
        text = torch.tensor([tokens])
        logits = processed(decoder(text)[:, -1], text, parameters.sampling)[0]
        token = int(logits.argmax())
        if parameters.temperature:
            u, total = uniform(parameters.seed, len(tokens)), 0.0
            for token, chance in enumerate(logits.softmax(-1).tolist()):  # noqa: B007
                total += chance
                if total > u:
                    break
        tokens.append(token)
        written.append(token)
        if token in parameters.stop_tokens:
            break
        if any(string in decode(written) for string in parameters.stop_strings):
            break
    return tokens


def used(engine: Engine) -> int:
    return len(engine.manager.references) - len(engine.manager.idle)


PARAMETERS = st.builds(
    Parameters,
    max_tokens=st.integers(1, 8),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([None, 5]),
    top_p=st.sampled_from([None, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 3),
    stop_tokens=st.sampled_from([(), (7,)]),
    stop_strings=st.sampled_from([(), ("k",), ("ab", "m.")]),
)
# Two letters first: equal starts, which share blocks, are frequent.
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


class Serving(RuleBasedStateMachine):
    """Any order of operations in a memory too small for all requests."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self.engine = Engine(decoder, blocks=14, page=3, batch=4, budget=7, chunk=5, decode=decode)
        self.expected: dict[Generation, list[int]] = {}
        self.ended: set[Generation] = set()

    def alone(self, tokens: list[int], parameters: Parameters) -> list[int]:
        return alone(self.decoder, tokens, parameters, parameters.max_tokens)

    def running(self) -> list[Generation]:
        return list(self.engine.scheduler.running)

    @rule(prompt=PROMPTS, parameters=PARAMETERS)
    def add(self, prompt, parameters):
        request = self.engine.add(prompt, parameters)
        self.expected[request] = self.alone(prompt, parameters)

    @precondition(lambda self: self.expected)
    @rule(steps=st.integers(1, 4))
    def step(self, steps):
        for _ in range(steps):
            self.engine.step()

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def preempt(self, data):
        self.engine.scheduler.preempt(data.draw(st.sampled_from(self.running())))

    @precondition(lambda self: set(self.expected) - self.ended)
    @rule(data=st.data())
    def cancel(self, data):
        request = data.draw(st.sampled_from([r for r in self.expected if r not in self.ended]))
        self.engine.cancel(request)
        assert request.finish == "cancelled" and request.text is None

    @precondition(lambda self: set(self.expected) - self.ended)
    @rule(data=st.data(), parameters=PARAMETERS)
    def fork(self, data, parameters):
        request = data.draw(st.sampled_from([r for r in self.expected if r not in self.ended]))
        parameters = replace(parameters, max_tokens=min(parameters.max_tokens, 8))
        if len(request.tokens) + parameters.max_tokens <= 40:
            twin = self.engine.fork(request, parameters)
            self.expected[twin] = alone(
                self.decoder, request.tokens, parameters, parameters.max_tokens
            )

    @invariant()
    def every_text_is_the_start_of_what_it_would_be_alone(self):
        for request, expected in self.expected.items():
            if request not in self.ended:
                assert request.error is None
                assert request.tokens == expected[: len(request.tokens)]
                if request.finish:
                    self.ended.add(request)
                    if request.finish != "cancelled":
                        assert request.tokens == expected

    @invariant()
    def blocks_are_those_of_running_texts(self):
        manager, scheduler = self.engine.manager, self.engine.scheduler
        uses = Counter(block for request in scheduler.running for block in request.text.table)
        assert manager.references == [uses[block] for block in range(len(manager.references))]
        assert len(scheduler.running) <= scheduler.batch
        unfinished = [request for request in self.expected if not request.finish]
        queued = [*scheduler.running, *scheduler.waiting]
        assert sorted(r.number for r in queued) == sorted(r.number for r in unfinished)

    def teardown(self):
        """Left alone, everybody comes to an end, and the memory is empty."""
        for _ in range(600):
            if set(self.expected) == self.ended:
                break
            self.engine.step()
            self.every_text_is_the_start_of_what_it_would_be_alone()
        assert set(self.expected) == self.ended and used(self.engine) == 0


def test_any_order_of_operations(tiny, unchecked):
    """50 runs of 40 steps: 2,000 operations, each followed by both invariants."""
    sizes = settings(max_examples=50, stateful_step_count=40, deadline=None, derandomize=True)
    run_state_machine_as_test(lambda: Serving(tiny), settings=sizes)


# By hand


def test_greedy_is_generate(tiny):
    """Four prompts of several lengths in one batch: what `generate` writes of each alone."""
    prompts = [torch.randint(29, (n,)).tolist() for n in (1, 4, 9, 4)]
    engine = Engine(tiny, blocks=40, page=4)
    for prompt, got in zip(prompts, engine.generate(prompts, Parameters(10)), strict=True):
        assert got.tokens == generate(tiny, torch.tensor([prompt]), 10)[0].tolist()
        assert got.finish == "length" and got.output == got.tokens[len(prompt) :]
    assert used(engine) == 0


def test_the_same_draws_alone_and_together(tiny):
    """Twelve sampled requests of two seeds in one batch, and in the other order."""
    prompts = [torch.randint(29, (n,)).tolist() for n in range(1, 13)]
    wanted = [Parameters(8, temperature=1.2, seed=i % 2) for i in range(12)]
    expected = [alone(tiny, p, q, 8) for p, q in zip(prompts, wanted, strict=True)]
    engine = Engine(tiny, blocks=60, page=4)
    assert [g.tokens for g in engine.generate(prompts, wanted)] == expected
    backwards = engine.generate(prompts[::-1], wanted[::-1])
    assert [g.tokens for g in backwards] == expected[::-1]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 30])
def test_prompts_are_read_in_chunks_of_any_size(tiny, chunk):
    prompts = [torch.randint(29, (n,)).tolist() for n in (23, 5, 17)]
    engine = Engine(tiny, blocks=40, page=4, batch=3, budget=30, chunk=chunk)
    for prompt, got in zip(prompts, engine.generate(prompts, Parameters(6)), strict=True):
        assert got.tokens == generate(tiny, torch.tensor([prompt]), 6)[0].tolist()


def test_a_preempted_request_loses_nothing(tiny):
    """Memory for one and a half texts: the younger is stopped, and both end as they would alone."""
    prompts, wanted = [[1, 2, 3], [4, 5]], Parameters(16, temperature=0.9)
    engine = Engine(tiny, blocks=7, page=4)
    got = engine.generate(prompts, wanted)
    assert engine.scheduler.preemptions > 0
    assert [g.tokens for g in got] == [alone(tiny, p, wanted, 16) for p in prompts]
    assert used(engine) == 0


def test_a_cancelled_request_gives_its_blocks_back(tiny):
    engine = Engine(tiny, blocks=20, page=4)
    stays, goes, waits = (engine.add([i] * 9, Parameters(8)) for i in range(3))
    engine.step()
    engine.cancel(goes)
    assert goes.finish == "cancelled" and used(engine) == 6
    engine.cancel(waits)
    engine.cancel(waits)
    while not stays.finish:
        engine.step()
    assert used(engine) == 0 and stays.tokens == alone(tiny, [0] * 9, Parameters(8), 8)


def test_a_stop_string_is_looked_for_in_its_own_text(tiny):
    """Each of two texts ends with the first three letters that it wrote; together as alone."""
    prompts = [[3, 8, 1], [20, 11]]
    free = [alone(tiny, prompt, Parameters(12), 12) for prompt in prompts]
    marks = [decode(text[len(p) + 3 : len(p) + 5]) for text, p in zip(free, prompts, strict=True)]
    engine = Engine(tiny, blocks=20, page=4, decode=decode)
    # Asked for the other's letters, and for a string that only both texts in a row would hold.
    across = [decode(free[0][-1:] + free[1][2:3]), decode(free[1][-1:] + free[0][3:4])]
    for strings in ([marks[:1], marks[1:]], [marks[1:], marks[:1]], [across, across]):
        wanted = [Parameters(12, stop_strings=tuple(string)) for string in strings]
        expected = [alone(tiny, p, w, 12) for p, w in zip(prompts, wanted, strict=True)]
        got = engine.generate(prompts, wanted)
        assert [g.tokens for g in got] == expected
        for g, w in zip(got, wanted, strict=True):
            assert not any(string in engine.text(g) for string in w.stop_strings)


def test_a_text_ends_at_the_first_of_its_stop_strings(tiny):
    engine = Engine(tiny, blocks=20, page=4, decode=decode)
    generation = engine.add([3, 8], Parameters(12))
    generation.tokens += [1, 2, 9, 4, 9]
    written = decode(generation.output)
    late, early, absent = decode([4, 9]), decode([2]), decode([7])
    for strings in ((late, early, absent), (early, late), (absent, early, late)):
        generation.parameters = Parameters(12, stop_strings=strings)
        assert engine.text(generation) == written[: written.index(early)]


def test_a_shared_start_is_read_once(tiny):
    engine = Engine(tiny, blocks=40, page=4, budget=64)
    start = torch.randint(29, (20,)).tolist()
    engine.generate([[*start, 1]], Parameters(2))
    twins = [engine.add([*start, i], Parameters(2)) for i in (2, 3)]
    assert [chunk[1:] for chunk in engine.scheduler.plan().chunks] == [(20, 21), (20, 21)]
    del twins


def test_two_requests_share_what_is_written_in_the_same_pass(tiny):
    prompts = [[5] * 13, [5] * 12 + [6]]
    engine = Engine(tiny, blocks=40, page=4, budget=64)
    got = engine.generate(prompts, Parameters(6))
    assert [g.tokens for g in got] == [alone(tiny, p, Parameters(6), 6) for p in prompts]


class Broken:
    """A constraint that fails at its third token, in one of several ways."""

    start, end = 0, 28

    def __init__(self, way: str):
        self.way = way

    def shortest(self, state):
        return 0

    def allowed(self, state, remaining):
        if state == 2 and self.way == "raises":
            raise RuntimeError("the third token is too much")
        size = 31 if state == 2 and self.way == "another vocabulary" else 29
        mask = torch.ones(size, dtype=torch.bool)
        mask[28] = False
        return mask & (state != 2 or self.way != "nothing")

    def after(self, state, token):
        if state == 2:
            raise RuntimeError("the third token is too much")
        return state + 1


BAD = {
    "at least one token": ([], {}),
    "tokens have to be whole numbers: 'float'": ([1.5, 2.5], {}),
    "tokens have to be whole numbers: 'str'": ("ab", {}),
    "max_tokens have to be whole": ([1], {"max_tokens": 2.5}),
    "stop tokens have to be whole": ([1], {"stop_tokens": 3}),
    "tuple of strings, got 'abc'": ([1], {"stop_strings": "abc"}),
    "settings cannot be used: .* inf": ([1], {"temperature": 1e-320}),
    "cannot be used: .*, got inf": ([1], {"repetition_penalty": 1e-320}),
    "ends its text alone": ([1], {"constraint": Broken("raises"), "stop_tokens": (3,)}),
    "0 to 28": ([29], {}),
    "at most 64": ([1] * 60, {"max_tokens": 5}),
    "max_tokens = 0": ([1], {"max_tokens": 0}),
    "greedy": ([1], {"temperature": -0.5}),
    "top-p": ([1], {"temperature": 1.0, "top_p": 1.5}),
    "top-k": ([1], {"temperature": 1.0, "top_k": 0}),
    "min-p": ([1], {"min_p": 2.0}),
    "penalty": ([1], {"repetition_penalty": 0.0}),
    "need an engine with `decode`": ([1], {"stop_strings": ("a",)}),
    "needs? .* blocks": ([1] * 40, {"max_tokens": 20}),
}


@pytest.mark.parametrize("sentence", BAD)
def test_a_bad_request_is_refused_and_nothing_else_is_lost(tiny, sentence, unchecked):
    engine = Engine(tiny, blocks=14, page=4)
    other = engine.add([1, 2], Parameters(4))
    prompt, parameters = BAD[sentence][0], Parameters(**BAD[sentence][1])
    with pytest.raises(ValueError, match=sentence):
        engine.add(prompt, parameters)
    with pytest.raises(ValueError, match=sentence):
        engine.generate([[3], prompt], [Parameters(), parameters])
    assert engine.scheduler.waiting == [other]
    with pytest.raises(ValueError, match="parameters"):
        engine.generate([[3]], [])
    with pytest.raises(ValueError, match="GPU"):
        Engine(tiny, blocks=4, graphs=True)


@pytest.mark.parametrize("way", ["raises", "another vocabulary", "nothing", "afterwards"])
def test_an_exception_inside_one_request_stops_only_that(tiny, way):
    """All three are sampled alike, in one call."""
    engine = Engine(tiny, blocks=40, page=4)
    plain = Parameters(6, temperature=1.0)
    wanted = [plain, replace(plain, constraint=Broken(way)), plain]
    prompts = [[1], [2, 3], [4, 5, 6]]
    first, broken, last = engine.generate(prompts, wanted)
    assert broken.finish == "error" and broken.error is not None
    assert len(broken.output) == 2
    for got, prompt in ((first, [1]), (last, [4, 5, 6])):
        assert got.tokens == alone(tiny, prompt, plain, 6)
    assert used(engine) == 0


def test_logits_that_are_not_numbers_stop_only_their_request(tiny):
    """Token 9's vector is NaN: a text that holds it has no logits, the others have theirs."""
    engine = Engine(tiny, blocks=40, page=4)
    expected = alone(tiny, [1, 2], Parameters(3), 3)
    assert 9 not in expected
    logits = tiny.logits
    with torch.no_grad():
        tiny.embedding.weight[9] = torch.nan
    tiny.logits = lambda hidden: torch.where(
        hidden.isnan().any(-1, keepdim=True), torch.nan, logits(hidden).nan_to_num(nan=-1e4)
    )
    good, bad = engine.generate([[1, 2], [9, 2]], Parameters(3))
    assert bad.finish == "error" and "finite" in str(bad.error)
    assert good.tokens == expected


@pytest.mark.parametrize(
    "wanted",
    [
        Parameters(3, temperature=1e-306, seed=1),
        Parameters(3, temperature=1e-306, top_k=5),
        Parameters(3, repetition_penalty=1e-306),
    ],
    ids=["drawn", "filtered", "penalised"],
)
def test_settings_under_which_one_text_overflows_stop_only_that(tiny, wanted):
    """Token 9 makes logits of 10,000, and 10,000 / 1e-306 is infinite. All are sampled alike."""
    logits = tiny.logits
    with torch.no_grad():
        tiny.embedding.weight[9] = torch.nan
    tiny.logits = lambda hidden: torch.where(
        hidden.isnan().any(-1, keepdim=True), 1e4, logits(hidden).nan_to_num(nan=-1.0)
    )
    engine = Engine(tiny, blocks=40, page=4)
    first, bad, last = engine.generate([[1, 2], [9, 2], [3]], [wanted, wanted, wanted])
    assert bad.finish == "error" and "finite" in str(bad.error) and not bad.output
    for got, prompt in ((first, [1, 2]), (last, [3])):
        assert got.tokens == alone(tiny, prompt, wanted, 3) and 9 not in got.output
    assert used(engine) == 0


@pytest.mark.parametrize("kind", ["torch", "numpy", "bool"])
def test_tokens_of_other_integer_types_are_the_same_text(tiny, kind, unchecked):
    prompts = {"torch": torch.arange(5), "numpy": np.arange(5), "bool": (False, True, 2, 3, 4)}
    prompt = prompts[kind]
    engine = Engine(tiny, blocks=40, page=2)
    engine.generate([list(range(5))], Parameters(1))
    got = engine.add(prompt, Parameters(4))
    assert engine.scheduler.known(got) == 4
    while not got.finish:
        engine.step()
    assert got.tokens == alone(tiny, list(range(5)), Parameters(4), 4)
    assert {type(token) for token in got.tokens} == {int}


class Steps:
    """A constraint that allows one token more after each token, and counts up to twelve."""

    start, end = 0, 28

    def shortest(self, state):
        return 0

    def allowed(self, state, remaining):
        return torch.arange(29) < 3 + state

    def after(self, state, token):
        return min(state + 1, 12)


SERVING = str(Path(sys.modules[Engine.__module__].__file__).parent)


class Interrupt:
    """Ctrl-C at the `count`-th call of a function of serving/, since that is where it strikes.

    Not in a generator that is closed: there Python reports it and goes on.
    """

    def __init__(self, count: int):
        self.left = count

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if code.co_filename.startswith(SERVING) and code.co_name != "<genexpr>":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def serve(decoder: Decoder, interrupt: Interrupt | None) -> list[list[int]]:
    """Five texts of all kinds in too little memory, with an interrupt in one of the steps."""
    wanted = [
        Parameters(6),
        Parameters(6, temperature=1.0, top_k=9),
        Parameters(6, temperature=0.7, constraint=Steps()),
        Parameters(6, stop_strings=("q", "e")),
        Parameters(4, repetition_penalty=1.3),
    ]
    engine = Engine(decoder, blocks=7, page=2, batch=4, budget=7, decode=decode)
    texts = [engine.add([1, 2, i][: 1 + i], w) for i, w in enumerate(wanted)]
    before, steps = sys.gettrace(), 0
    while not all(text.finish for text in texts):
        steps += 1
        assert steps < 60, "somebody hangs"
        sys.settrace(interrupt)
        try:
            engine.step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
    assert all(text.finish in ("stop", "length") for text in texts)
    assert used(engine) == 0 and (interrupt is not None or engine.scheduler.preemptions > 0)
    return [text.tokens for text in texts]


def test_an_interrupt_anywhere_in_a_step_loses_nothing(tiny, unchecked):
    """In planning, reading, choosing or appending: every 29th call, once each."""
    expected, counter = serve(tiny, None), Interrupt(0)
    assert serve(tiny, counter) == expected
    calls = -counter.left
    assert calls > 400
    for count in range(1, calls, 29):
        assert serve(tiny, Interrupt(count)) == expected, count


def test_what_fails_in_the_engine_itself_ends_the_pass_and_no_more(tiny):
    """The logits cannot be looked at: who was to get a token gets the error, nobody hangs."""
    engine = Engine(tiny, blocks=40, page=4, batch=2, budget=4)
    first, second, waits = (engine.add([i, i], Parameters(3)) for i in range(3))
    write = engine.write

    def fail(*_):
        raise RuntimeError("the device is lost")

    engine.write = fail
    assert engine.step() == [first, second]
    engine.write = write
    assert [text.finish for text in (first, second, waits)] == ["error", "error", ""]
    while not waits.finish:
        engine.step()
    assert waits.tokens == alone(tiny, [2, 2], Parameters(3), 3) and used(engine) == 0


def test_generate_that_is_left_cancels_what_it_queued(tiny, monkeypatch):
    engine = Engine(tiny, blocks=40, page=4)
    other = engine.add([5], Parameters(3))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1], [2]], Parameters(4))
    assert engine.scheduler.waiting == [other] and not engine.scheduler.running


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt])
def test_a_failed_pass_leaves_no_block_that_can_be_found(tiny, problem):
    """What was planned and never written is not taken for a known prefix."""
    engine, prompt = Engine(tiny, blocks=40, page=4), list(range(13))
    hidden = tiny.hidden

    def fail(*_):
        raise problem("the GPU fell off the bus")

    tiny.hidden = fail
    request = engine.add(prompt, Parameters(4))
    if problem is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        assert request in engine.scheduler.waiting and not engine.manager.found
    else:
        assert engine.step() == [request] and request.finish == "error"
    assert used(engine) == 0 and not engine.manager.found
    tiny.hidden = hidden
    (again,) = engine.generate([prompt], Parameters(4))
    assert again.tokens == alone(tiny, prompt, Parameters(4), 4)


def test_streams_hand_out_each_token_once_and_cancel_when_left(tiny):
    engine = Engine(tiny, blocks=40, page=4)

    async def read(prompt, most):
        tokens = []
        stream = engine.stream(prompt, Parameters(8, temperature=1.0))
        async for token in stream:
            tokens.append(token)
            if len(tokens) == most:
                break
        await stream.aclose()
        return tokens

    async def both():
        return await asyncio.gather(read([1, 2], 99), read([3], 3))

    whole, left = asyncio.run(both())
    wanted = Parameters(8, temperature=1.0)
    assert whole == alone(tiny, [1, 2], wanted, 8)[2:]
    assert left == alone(tiny, [3], wanted, 8)[1:4]
    assert used(engine) == 0


def test_a_slow_reader_gets_all_tokens_of_a_request_that_has_ended(tiny):
    """The fast reader makes the steps; the slow one's tokens wait for it beyond the last."""
    engine, ended = Engine(tiny, blocks=40, page=4), []

    async def read(prompt, pauses):
        tokens = []
        async for token in engine.stream(prompt, Parameters(8)):
            tokens.append(token)
            for _ in range(pauses):
                await asyncio.sleep(0)
            ended.append((prompt[0], used(engine) == 0))
        return tokens

    async def both():
        return await asyncio.gather(read([1, 2], 0), read([3, 5], 40))

    fast, slow = asyncio.run(both())
    assert fast == alone(tiny, [1, 2], Parameters(8), 8)[2:]
    assert slow == alone(tiny, [3, 5], Parameters(8), 8)[2:]
    assert (3, True) in ended[:-1]  # it was over, and tokens were still to come


def test_a_stream_raises_what_ended_its_request(tiny):
    engine = Engine(tiny, blocks=40, page=4)

    async def read():
        return [
            token async for token in engine.stream([1], Parameters(6, constraint=Broken("raises")))
        ]

    with pytest.raises(RuntimeError, match="third"):
        asyncio.run(read())


@pytest.mark.full
@torch.no_grad()
def test_smollm2_writes_what_it_would_alone():
    """The real weights in float32: prompts of several lengths, chunks, too little memory."""
    decoder = Decoder.from_smollm2()
    prompts = [torch.randint(1000, 20000, (n,)).tolist() for n in (3, 40, 17, 90)]
    engine = Engine(decoder, blocks=14, page=16, budget=32)
    for prompt, got in zip(prompts, engine.generate(prompts, Parameters(24)), strict=True):
        assert got.tokens == generate(decoder, torch.tensor([prompt]), 24)[0].tolist()
