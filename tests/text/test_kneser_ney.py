"""Kneser-Ney against the equation spelled out with dictionaries, and as a distribution."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from implementations.text.kneser_ney import kneser_ney_bits


def by_the_book(train: list[int], context: list[int], token: int, order: int, size: int) -> float:
    """P(token | context), with sets of tuples and no shared code."""

    def count(n: int) -> Counter:
        grams = [tuple(train[i : i + n]) for i in range(len(train) - n + 1)]
        if n == order:
            return Counter(grams)
        before = defaultdict(set)
        for i in range(len(train) - n):
            before[tuple(train[i + 1 : i + 1 + n])].add(train[i])
        return Counter({gram: len(tokens) for gram, tokens in before.items()})

    probability = 1 / size
    for n in range(1, order + 1):
        counts, history = count(n), tuple(context[len(context) - n + 1 :])
        total = sum(c for gram, c in counts.items() if gram[:-1] == history)
        if not total:
            continue
        once = sum(c == 1 for c in counts.values())
        twice = sum(c == 2 for c in counts.values())
        discount = once / (once + 2 * twice) if once else 0.5
        types = sum(gram[:-1] == history for gram in counts)
        direct = max(counts[(*history, token)] - discount, 0) / total
        probability = direct + discount * types / total * probability
    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_equation(order, seed):
    draw = np.random.default_rng(seed)
    train, test = draw.integers(0, 5, 60), draw.integers(0, 7, 25)
    bits = kneser_ney_bits(train, test, order, 7)
    text = [*train.tolist(), *test.tolist()]
    expected = [
        -math.log2(by_the_book(train.tolist(), text[:i], text[i], order, 7))
        for i in range(len(train), len(text))
    ]
    np.testing.assert_allclose(bits, expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_sum_to_one(order):
    """Over every possible next token, seen or not."""
    train = np.random.default_rng(0).integers(0, 6, 200)
    total = sum(2 ** -kneser_ney_bits(train, np.array([t]), order, 9)[0] for t in range(9))
    assert total == pytest.approx(1.0, abs=1e-12)


def test_what_counts_is_the_number_of_contexts():
    """3 occurs more often than 4, but always after 2: in an unknown context 4 is likelier."""
    train = np.array([2, 3, 2, 3, 2, 3, 2, 3, 0, 4, 1, 4, 5, 4, 0, 1, 5])
    after_unknown = [kneser_ney_bits(train, np.array([6, t]), 2, 7)[1] for t in (3, 4)]
    assert after_unknown[0] > after_unknown[1]


@pytest.mark.parametrize(
    "train, test, order, sentence",
    [
        ([1, 2], [1], 0, "order 0 needs"),
        ([1, 2], [1], 3, "order 3 needs at least as many training tokens, got 2"),
        ([1, 2, 9], [1], 2, "tokens are 0 to 4"),
        ([1, 2, 3], [-1], 2, "tokens are 0 to 4"),
    ],
)
def test_bad_input_is_a_sentence(train, test, order, sentence):
    with pytest.raises(ValueError, match=sentence):
        kneser_ney_bits(np.array(train), np.array(test), order, 5)
