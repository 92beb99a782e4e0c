"""Can attention be worked out with pencil and paper?

Four tokens, two channels, whole numbers: every score, weight and output is on the screen, and each
is checked against a fraction worked out by hand. The scores are logarithms of 1, 2 and 4, so the
weights are ninths and the like: softmax turns differences of logarithms into ratios.

Expected: the equation gives the hand-worked fractions to the last digit of float64.

Run     uv run python weeks/01_attention/attention_by_hand.py
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch

from implementations.attention_basic import attention_naive, attention_weights
from implementations.lab.compare import error
from implementations.lab.findings import Finding, at_most
from implementations.lab.script import run

WORDS = ["The", "cat", "sat", "down"]
# Each query asks with a multiple of log 2, so every score is log of a power of two.
QUERY = [[0, 0], [1, 0], [0, 1], [1, 1]]
KEY = [[0, 0], [1, 0], [0, 1], [1, 1]]
VALUE = [[8, 0], [0, 8], [4, 4], [12, 0]]


@dataclass(frozen=True)
class Config:
    """Attention on four tokens."""

    causal: bool = False
    """hide the future"""


def by_hand(causal: bool) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
    """Weights and outputs as fractions: powers of two over their sum, without exp or tensors."""
    weights, outputs = [], []
    for i, query in enumerate(QUERY):
        powers = [
            0 if causal and j > i else 2 ** (query[0] * key[0] + query[1] * key[1])
            for j, key in enumerate(KEY)
        ]
        row = [Fraction(power, sum(powers)) for power in powers]
        weights.append(row)
        outputs.append(
            [sum(w * v[channel] for w, v in zip(row, VALUE, strict=True)) for channel in range(2)]
        )
    return weights, outputs


def print_matrix(name: str, matrix: list[list], labels: list[str]) -> None:
    print(f"\n{name}")
    for label, row in zip(labels, matrix, strict=True):
        print(f"  {label:6}" + "".join(f"{number!s:>8}" for number in row))


def main(config: Config) -> list[Finding]:
    query, key, value = (torch.tensor(x, dtype=torch.float64)[None] for x in (QUERY, KEY, VALUE))
    scale = math.log(2)  # the hand works in powers of two; a real layer would use 1 / sqrt(dim)
    weights = attention_weights(query, key, causal=config.causal, scale=scale)
    output = attention_naive(query, key, value, causal=config.causal, scale=scale)
    hand_weights, hand_outputs = by_hand(config.causal)

    print_matrix("query: what each word asks for", QUERY, WORDS)
    print_matrix("key: what each word answers to", KEY, WORDS)
    print_matrix(
        "scores: query · key, in units of log 2", (query @ key.mT).int()[0].tolist(), WORDS
    )
    print_matrix("weights: 2 to the score, over the row's sum", hand_weights, WORDS)
    print_matrix("value: what each word hands over", VALUE, WORDS)
    print_matrix("output: the weighted average of the values", hand_outputs, WORDS)
    print()
    rounding = torch.finfo(torch.float64).eps
    return [
        Finding(
            "weights differ from the fractions worked by hand by at most",
            error(weights[0], as_floats(hand_weights)).largest,
            expected=at_most(4 * rounding),
        ),
        Finding(
            "outputs, averages of values up to 12, differ by at most",
            error(output[0], as_floats(hand_outputs)).largest,
            expected=at_most(12 * 4 * rounding),
        ),
    ]


def as_floats(matrix: list[list[Fraction]]) -> torch.Tensor:
    return torch.tensor([[float(number) for number in row] for row in matrix], dtype=torch.float64)


if __name__ == "__main__":
    run(main, Config(), quick=Config())
