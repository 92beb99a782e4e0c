"""How long does the first token of an answer take when everybody's prompt starts alike?

SmolLM2 gets questions that all follow the same long system prompt, here the first verses of the
Bible. The first request reads all of it. The others find its blocks by their digests and read their
own question only.

Expected: time to the first token falls by about the share of the prompt that is found; only whole
blocks are, so at most one block less a token of the common part is read again. A GPU reads a long
prompt in one go: with a model of this size, launching kernels is what takes time, and there is less
to gain. The weights and prompts there are random.

Run     uv run python weeks/05_kv_cache/prefix_caching.py
        uv run python weeks/05_kv_cache/prefix_caching.py --device cuda --budget 2048 --questions 9
"""

import statistics
import time
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch

from implementations.lab.findings import Finding, at_least, at_most
from implementations.lab.script import run
from implementations.lab.timing import over_rounds
from implementations.models.decoder import SMOLLM2, Decoder
from implementations.serving.engine import Engine, Parameters
from implementations.sources.text import bible_verses
from implementations.sources.weights import smollm2_tokenizer

QUESTIONS = [
    "What was made on the first day?",
    "Who is Cain?",
    "How old was Adam?",
    "What did Noah build, and of what?",
]


@dataclass(frozen=True)
class Config:
    """Time to the first token with and without a known prefix."""

    device: str = "cpu"
    """cpu, or cuda: random weights, bfloat16, this repository's kernels and CUDA graphs"""
    system: int = 2000
    """tokens of the system prompt"""
    layers: int = 30
    """of SmolLM2, its first ones"""
    questions: int = 4
    """how many, of the four on a CPU"""
    page: int = 16
    """tokens a block"""
    budget: int = 512
    """tokens a pass reads at most"""


def first_token(engine: Engine, prompt: list[int]) -> tuple[float, int]:
    """Seconds until it is there, and how many tokens were read for it."""
    request, passes = engine.add(prompt, Parameters(1)), []
    start = time.perf_counter()
    plan = engine.scheduler.plan

    def counted():
        passes.append(plan())
        return passes[-1]

    engine.scheduler.plan = counted
    while not request.finish:
        engine.step()
    engine.scheduler.plan = plan
    seconds = time.perf_counter() - start
    return seconds, sum(end - begin for made in passes for _, begin, end in made.chunks)


def prompts_of(config: Config) -> list[list[int]]:
    """The system prompt with each question after it."""
    if config.device != "cpu":
        system, *questions = (
            torch.randint(SMOLLM2.vocabulary, (count,)).tolist()
            for count in (config.system, *range(6, 6 + config.questions))
        )
        return [[*system, *question] for question in questions]
    encode = smollm2_tokenizer().encode
    system = encode(" ".join(list(bible_verses("web").values())[:200])).ids[: config.system]
    questions = QUESTIONS[: config.questions]
    return [[*system, *encode(f"\n{question}\n").ids] for question in questions]


def model_of(config: Config) -> dict:
    """The decoder and its attention, as the engine takes them."""
    shape = replace(SMOLLM2, layers=config.layers)
    if config.device == "cpu":
        whole = config.layers == SMOLLM2.layers
        return {"decoder": Decoder.from_smollm2() if whole else Decoder(shape).eval()}
    from implementations.attention.paged_triton import attention_paged_triton
    from implementations.models.decoder_triton import decoder_triton

    decoder = decoder_triton(shape).to(config.device, torch.bfloat16).eval()
    return {"decoder": decoder, "attention": attention_paged_triton, "graphs": True}


def changed(prompt: list[int], token: int) -> list[int]:
    """With another first token no block of it is known: keys depend on all tokens before."""
    return [token, *prompt[1:]]


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    model, prompts = model_of(config), prompts_of(config)
    blocks = len(prompts) + (config.system + 100) // config.page * 2
    sizes = {"blocks": blocks, "page": config.page, "batch": 4, "budget": config.budget}
    shared, alone = (Engine(**model, **sizes) for _ in range(2))
    warm = 48 if config.device == "cpu" else len(prompts[0])
    for each in (shared, alone):  # compiles, and knows nothing that is asked for later
        for length in (warm, 8):
            first_token(each, changed(prompts[0][:length], length))
    first, later, apart = first_token(shared, prompts[0]), [], []
    for turn, prompt in enumerate(prompts[1:]):  # in turn
        later.append(first_token(shared, prompt))
        apart.append(first_token(alone, changed(prompt, turn)))
    draw(first, later)
    least = max(len(prompt) for prompt in prompts) - config.system + config.page
    gains = [alone / known for (alone, _), (known, _) in zip(apart, later, strict=True)]
    return [
        Finding("tokens of a prompt", len(prompts[1])),
        Finding("the first request reads", first[1], "tokens"),
        Finding(
            "a later one reads at most",
            max(count for _, count in later),
            "tokens",
            expected=at_most(least),
            source="its question, and less than a block of the common part",
        ),
        Finding("first token without the cache", statistics.median(t for t, _ in apart), "s"),
        Finding("first token with it", statistics.median(t for t, _ in later), "s"),
        Finding(
            "the cache brings the first token sooner by",
            unit="x",
            goal=at_least(10),
            **over_rounds(gains, "questions"),
        ),
    ]


def draw(first: tuple[float, int], later: list[tuple[float, int]]) -> None:
    _, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    seconds = [first[0], *(seconds for seconds, _ in later)]
    bars = axes.bar(range(1, len(seconds) + 1), seconds)
    counts = [first[1], *(count for _, count in later)]
    axes.bar_label(bars, [f"{count:,}" for count in counts], fontsize=8)
    axes.margins(y=0.12)
    axes.set_xticks(range(1, len(seconds) + 1))
    axes.set(xlabel="request", ylabel="seconds to the first token")
    axes.set_title("The same long system prompt again and again: tokens read", fontsize=10)


if __name__ == "__main__":
    run(main, Config(), quick=Config(system=120, layers=2, questions=2))
