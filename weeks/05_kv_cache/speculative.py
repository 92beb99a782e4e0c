"""Does it pay to guess the next tokens from the text itself?

SmolLM2 goes on greedily with verses of the Bible and with a file of this repository's code, token
by token and with n-gram guesses in turn: what followed the last time that the last tokens stood in
the text. A third task asks for nothing new: it repeats a list.

Expected: every text is the same with and without guesses; in float32 a pass over several tokens
rounds otherwise than a pass over one, so that a near tie may turn. A repetition is guessed nearly
always, code oftener than prose; where little is guessed right, little is gained. On a GPU a pass of
so small a model takes as long for five tokens as for one, so the gain is nearly the tokens a pass.

Run     uv run python weeks/05_kv_cache/speculative.py
        uv run python weeks/05_kv_cache/speculative.py --device cuda --tokens 256 --prompts 4
"""

import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from implementations.attention.rotary_table import RotaryTable
from implementations.attention.vendor import attention_sdpa
from implementations.lab.findings import Finding, at_least
from implementations.lab.script import run
from implementations.lab.timing import over_rounds
from implementations.models.decoder import SMOLLM2, Decoder
from implementations.serving.kv_cache import CachedDecoder, KeyValueCache
from implementations.serving.speculative import NGramDraft, Written, generate_speculative
from implementations.sources.text import bible_verses
from implementations.sources.weights import smollm2_tokenizer
from implementations.text.sampling import generate

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Config:
    """N-gram guesses with the real weights."""

    device: str = "cpu"
    """cpu or cuda; where the decoder is, tokens are chosen on the CPU"""
    tokens: int = 64
    """written for each prompt"""
    prompt: int = 256
    """tokens read before"""
    prompts: int = 2
    """of each kind"""
    guesses: int = 4
    """at most, for each pass"""
    rounds: int = 3
    """how often each prompt is timed both ways, in turn"""


def prompts_of(config: Config) -> dict[str, list[list[int]]]:
    """Prose, code and a repetition, each cut at as many tokens."""
    encode = smollm2_tokenizer().encode
    verses = list(bible_verses("web").values())[:400]
    code = (ROOT / "implementations/attention/positions.py").read_text("utf-8")
    names = "alder, birch, cedar, elm, fir, hazel, larch, maple, oak, pine, rowan, willow; " * 40
    texts = {"prose": " ".join(verses), "code": code, "a repetition": names}
    starts = range(0, config.prompts * config.prompt, config.prompt)
    return {
        kind: [encode(text).ids[start : start + config.prompt] for start in starts]
        for kind, text in texts.items()
    }


def both(
    decoder: Decoder, draft: NGramDraft, prompt: list[int], config: Config, guessed_first: bool
) -> tuple[list[int], Written, float]:
    """The text written alone and with guesses, and how much faster the guesses were. Each model has
    read the prompt before: decoding alone is timed."""

    def alone(model: CachedDecoder) -> list[int]:
        return generate(model, torch.tensor([prompt]), config.tokens)[0].tolist()

    def guessed(model: CachedDecoder) -> Written:
        return generate_speculative(model, draft, prompt, config.tokens, guesses=config.guesses)

    def read(tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        return decoder(tokens.to(config.device), cache).cpu()

    got, seconds = {}, {}
    for write in (guessed, alone) if guessed_first else (alone, guessed):
        model = CachedDecoder(read, decoder.empty_cache(1, config.prompt + config.tokens))
        with torch.no_grad():
            model(torch.tensor([prompt[:-1]]))
        start = time.perf_counter()
        got[write] = write(model)
        seconds[write] = time.perf_counter() - start
    return got[alone], got[guessed], seconds[alone] / seconds[guessed]


def main(config: Config) -> list[Finding]:
    dim, base = SMOLLM2.width // SMOLLM2.heads, SMOLLM2.rotary_base
    rotate = RotaryTable(SMOLLM2.positions, dim, base, device=config.device)
    decoder = Decoder.from_smollm2(attention_sdpa, rotate=rotate).to(config.device)
    draft = NGramDraft(SMOLLM2.vocabulary)
    findings, passes, same, gains = [], {}, 0, {}
    tasks = prompts_of(config)
    for kind, prompts in tasks.items():
        total, ratios = Written([]), []
        for prompt in prompts:
            for turn in range(config.rounds):
                alone, written, gain = both(decoder, draft, prompt, config, turn % 2 == 1)
                ratios.append(gain)
            same += written.tokens == alone
            total.passes += written.passes
            total.guessed += written.guessed
            total.accepted += written.accepted
        passes[kind] = len(prompts) * config.tokens / total.passes
        gain = over_rounds(ratios, f"runs of {len(prompts)} prompts")
        gains[kind] = gain["measured"]
        findings += [
            Finding(f"{kind}: guesses accepted", total.accepted / max(total.guessed, 1)),
            Finding(
                f"{kind}: tokens a pass",
                passes[kind],
                expected=at_least(1.0),
                source="every pass writes at least one",
            ),
            Finding(f"{kind}: faster by", unit="x", **gain),
        ]
    draw(passes, gains)
    texts = sum(map(len, tasks.values()))
    return [
        Finding("texts that are the same with guesses and without", same, f"of {texts}"),
        *findings,
    ]


def draw(passes: dict[str, float], gains: dict[str, float]) -> None:
    _, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axes.margins(y=0.1)
    for shift, (label, values) in enumerate(
        {"tokens a pass of the model": passes, "times faster": gains}.items()
    ):
        places = [place + 0.4 * shift - 0.2 for place in range(len(values))]
        bars = axes.bar(places, values.values(), 0.38, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(passes)), passes)
    axes.set_title("Guessing from the text itself")
    axes.legend()


if __name__ == "__main__":
    run(main, Config(), quick=Config(tokens=4, prompt=24, prompts=1, rounds=1))
