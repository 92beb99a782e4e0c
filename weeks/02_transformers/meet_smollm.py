"""What does a real language model say, and how sure is it?

SmolLM2-135M goes on with a text, answers a question in its chat template, shows what it expects
after "The capital of France is", and what each token of a sentence costs it. Then its query and key
weights are put back into the interleaved rotary layout that their file has, and everything is asked
again: the trap of reading a model in the wrong layout. Nothing fails, and one prompt shows little.

Expected: " Paris" comes first, and the wrong layout costs at least 0.3 nats a token.

Paper   Ben Allal et al. 2025, arXiv:2502.02737
Run     uv run python weeks/02_transformers/meet_smollm.py
"""

from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from implementations.attention.positions import convert_projection, half_split_to_interleaved
from implementations.lab.findings import Finding, at_least, equals
from implementations.lab.script import run
from implementations.models.decoder import SMOLLM2, Decoder
from implementations.sources.text import bible_verses
from implementations.sources.weights import smollm2_tokenizer
from implementations.text.sampling import generate

FRANCE = "The capital of France is"
# The model's chat template, with the system message that it takes where none is given.
CHAT = (
    "<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
END = "<|im_end|>"


@dataclass(frozen=True)
class Config:
    """Prompts for SmolLM2, a sentence to price, and a passage to measure both layouts on."""

    prompt: str = "Once upon a time, in a village by the sea,"
    """a text to go on with"""
    question: str = "What is the capital of France?"
    """what to ask in the chat template"""
    sentence: str = "The animal didn't cross the street because it was too tired."
    """whose tokens are priced one by one"""
    count: int = 32
    """how many tokens to write, at most"""
    verse: int = 8001001
    """where the measured passage starts: book, chapter and verse; this is Ruth 1:1"""
    tokens: int = 512
    """length of that passage"""


class Reading(NamedTuple):
    """What one model makes of it all."""

    next_token: Float[Tensor, " vocabulary"]
    """probabilities after FRANCE"""
    text: str
    """the prompt, gone on with"""
    answer: str
    sentence: Float[Tensor, " token"]
    """nats for each token after the first"""
    passage: float
    """nats a token"""


class Reader:
    """A decoder that is spoken to in text."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.tokenizer = decoder, smollm2_tokenizer()

    def tokens(self, text: str) -> Int[Tensor, "1 token"]:
        return torch.tensor([self.tokenizer.encode(text).ids])

    def spelled(self, tokens: Int[Tensor, " token"]) -> list[str]:
        """The text of each token, alone."""
        return [self.tokenizer.decode([token]) for token in tokens.tolist()]

    def go_on(self, text: str, count: int) -> str:
        """The likeliest next token, again and again, until the model ends its message."""
        tokens = self.tokens(text)
        whole = generate(self.decoder, tokens, count, stop=self.tokenizer.token_to_id(END))
        return self.tokenizer.decode(whole[0, tokens.shape[1] :].tolist())

    @torch.no_grad()
    def losses(self, tokens: Int[Tensor, "1 token"]) -> Float[Tensor, " next"]:
        """What every token after the first costs, in nats: it had no text before it."""
        logits = self.decoder(tokens)[0, :-1]
        return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")

    def read(self, config: Config, passage: Int[Tensor, "1 token"]) -> Reading:
        with torch.no_grad():
            next_token = self.decoder(self.tokens(FRANCE))[0, -1].softmax(-1)
        return Reading(
            next_token,
            self.go_on(config.prompt, config.count),
            self.go_on(CHAT.format(question=config.question), config.count),
            self.losses(self.tokens(config.sentence)),
            self.losses(passage).mean().item(),
        )


@torch.no_grad()
def into_the_wrong_layout(decoder: Decoder) -> None:
    """Undo, in place, what `from_smollm2` does to the queries and keys of its file."""
    for block in decoder.blocks:
        heads = {block.attention.query: SMOLLM2.heads, block.attention.key: SMOLLM2.key_value_heads}
        for projection, count in heads.items():
            weight = convert_projection(projection.weight, count, half_split_to_interleaved)
            projection.weight.copy_(weight)


def passage_tokens(reader: Reader, config: Config) -> Int[Tensor, "1 token"]:
    """The first tokens of the World English Bible from the verse on."""
    verses = bible_verses("web")
    if config.verse not in verses:
        raise ValueError(f"there is no verse {config.verse}: 8001001 is Ruth 1:1")
    start = list(verses).index(config.verse)
    text = " ".join(list(verses.values())[start : start + config.tokens // 5 + 1])
    return reader.tokens(text)[:, : config.tokens]


def draw(reader: Reader, config: Config, right: Reading, wrong: Reading) -> None:
    """The next token's distribution, and the price of each token in both layouts."""
    _, (left, bars) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    best = right.next_token.topk(12)
    names = [repr(name) for name in reader.spelled(best.indices)]
    left.bar_label(left.barh(range(12), best.values.numpy()), fmt="%.3f", padding=3)
    left.margins(x=0.1)
    left.set_yticks(range(12), names, parse_math=False)
    left.invert_yaxis()
    left.set(title=f"{FRANCE} …", xlabel="probability")

    words = reader.spelled(reader.tokens(config.sentence)[0])[1:]
    place = np.arange(len(words))
    for shift, name, prices in ((-0.2, "as trained", right), (0.2, "wrong rotary layout", wrong)):
        label = f"{name}: {prices.sentence.mean():.2f} nats a token"
        bars.bar(place + shift, prices.sentence.numpy(), 0.4, label=label)
    bars.set_xticks(place, words, rotation=60, parse_math=False)
    bars.set(title="what each token costs, given those before it", ylabel="nats")
    bars.legend()


def main(config: Config) -> list[Finding]:
    reader = Reader(Decoder.from_smollm2())
    passage = passage_tokens(reader, config)
    right = reader.read(config, passage)
    into_the_wrong_layout(reader.decoder)
    wrong = reader.read(config, passage)
    for name, reading in {"as trained": right, "in the wrong layout": wrong}.items():
        print(f"\n{name}\n  {config.prompt} |{reading.text}")
        print(f"  {config.question} |{reading.answer}")
    print()
    draw(reader, config, right, wrong)

    paris = reader.tokens(" Paris").item()
    best = torch.stack([right.next_token.argmax(), wrong.next_token.argmax()])
    first, first_wrong = reader.spelled(best)
    return [
        Finding(f"likeliest after {FRANCE!r}", repr(first), expected=equals(repr(" Paris"))),
        Finding("probability of ' Paris'", right.next_token[paris].item()),
        Finding("likeliest in the wrong rotary layout", repr(first_wrong)),
        Finding("probability of ' Paris' there", wrong.next_token[paris].item()),
        Finding(f"loss of {passage.shape[1]} tokens of real text", right.passage, "nats a token"),
        Finding("the same in the wrong rotary layout", wrong.passage, "nats a token"),
        Finding(
            "what the wrong layout costs",
            wrong.passage - right.passage,
            "nats a token",
            expected=at_least(0.3),
            source="positions.py: the scores of other channels",
        ),
        Finding("loss of the sentence in the figure", right.sentence.mean().item(), "nats a token"),
        Finding(
            "the same in the wrong rotary layout", wrong.sentence.mean().item(), "nats a token"
        ),
    ]


if __name__ == "__main__":
    run(main, Config(), quick=Config(count=4, tokens=64))
