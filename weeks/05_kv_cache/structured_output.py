"""How often does a small model write the JSON that it is asked for, and what does a mask cost?

SmolLM2 is asked for a record of a person as JSON, several times with different seeds: as it is, and
with a mask that allows only tokens which the schema can still go on with.

Expected: with the mask every answer is valid, also where the tokens run out; without it hardly any
answer of a model of this size is. The mask costs little next to a pass of the model; the automaton
is made once.

Run     uv run python weeks/05_kv_cache/structured_output.py
        uv run python weeks/05_kv_cache/structured_output.py --device cuda --answers 16
"""

import json
import statistics
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt

from implementations.attention.vendor import attention_sdpa
from implementations.lab.findings import Finding, equals
from implementations.lab.script import run
from implementations.models.decoder import Decoder
from implementations.serving.engine import Engine, Parameters
from implementations.serving.structured import Automaton, expression_of, smollm2_bytes
from implementations.sources.weights import smollm2_tokenizer, smollm2_vocabulary

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 16},
        "age": {"type": "integer"},
        "married": {"type": "boolean"},
    },
    "required": ["name", "age", "married"],
}
TYPES = {"name": str, "age": int, "married": bool}
QUESTION = (
    "<|im_start|>user\nDescribe a person as JSON with the keys name, age (a number) and married "
    "(true or false). Write the JSON only.<|im_end|>\n<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class Config:
    """JSON with and without a mask."""

    device: str = "cpu"
    """cpu or cuda"""
    answers: int = 4
    """how many of each at once"""
    rounds: int = 4
    """how often, with a mask and without in turn"""
    tokens: int = 40
    """at most, for each answer"""
    temperature: float = 0.8


def valid(text: str) -> bool:
    """Whether it is JSON that the schema holds for, checked without the automaton."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    if not isinstance(value, dict) or set(value) != set(TYPES):
        return False
    types = all(type(value[key]) is kind for key, kind in TYPES.items())
    return types and 1 <= len(value["name"]) <= 16


def main(config: Config) -> list[Finding]:
    decoder = Decoder.from_smollm2(attention_sdpa).to(config.device)
    tokenizer = smollm2_tokenizer()
    end, prompt = smollm2_vocabulary().end, tokenizer.encode(QUESTION).ids
    start = time.perf_counter()
    automaton = Automaton(expression_of(SCHEMA), smollm2_bytes(), end)
    building = time.perf_counter() - start
    engine = Engine(
        decoder, blocks=config.answers * 12, batch=config.answers, decode=tokenizer.decode
    )
    masks = {"without a mask": None, "with the mask": automaton}
    texts = {name: [] for name in masks}
    seconds = {name: [] for name in masks}
    for turn in range(config.rounds):
        for name in list(masks)[:: -1 if turn % 2 else 1]:
            wanted = [
                Parameters(
                    config.tokens,
                    config.temperature,
                    seed=turn * config.answers + answer,
                    stop_tokens=(end,),
                    constraint=masks[name],
                )
                for answer in range(config.answers)
            ]
            start = time.perf_counter()
            got = engine.generate([prompt] * config.answers, wanted)
            seconds[name].append((time.perf_counter() - start) / sum(len(g.output) for g in got))
            texts[name] += [tokenizer.decode(g.output).strip() for g in got]
    for name, answers in texts.items():
        print(f"{name}: {answers[0]!r}")
    shares = {name: statistics.mean(map(valid, answers)) for name, answers in texts.items()}
    each = {name: statistics.median(times) for name, times in seconds.items()}
    state = automaton.start
    start = time.perf_counter()
    for _ in range(100):
        automaton.allowed(state, config.tokens)
    mask = (time.perf_counter() - start) / 100
    draw(shares)
    return [
        Finding("valid answers with the mask", shares["with the mask"], expected=equals(1.0)),
        Finding("valid answers without", shares["without a mask"]),
        Finding("fewest tokens of a valid answer", automaton.shortest(automaton.start)),
        Finding("making the automaton", building, "s"),
        Finding("its states", len(automaton.next)),
        Finding("making one mask", mask * 1e3, "ms"),
        Finding("a token without a mask", each["without a mask"] * 1e3, "ms"),
        Finding("a token with one", each["with the mask"] * 1e3, "ms"),
    ]


def draw(shares: dict[str, float]) -> None:
    _, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    bars = axes.barh(list(shares), list(shares.values()))
    axes.bar_label(bars, [f"{share:.0%}" for share in shares.values()], padding=3)
    axes.set(xlim=(0, 1.12), xlabel="share of answers that are valid")
    axes.set_title("A small model asked for JSON")


if __name__ == "__main__":
    run(main, Config(), quick=Config(answers=1, rounds=1, tokens=24))
