"""Kneser-Ney smoothing: the best a table of counts can do, and the baseline a language model must
beat.

    P_n(w | h) = max(c(h w) - D, 0) / c(h) + D types(h) / c(h) · P_{n-1}(w | h, one shorter)

Every seen n-gram gives up a discount D, and what is saved goes to shorter contexts. There a token
does not count as often as it occurs but in how many contexts it occurs: "Francisco" is common, yet
only after "San", so it is a bad guess elsewhere. c is the count of n-grams at the highest order;
below it, the number of different tokens seen before the shorter one. P_0 is 1 / vocabulary. D = n_1
/ (n_1 + 2 n_2), with n_k the number of n-grams counted k times.

Paper   Kneser & Ney 1995; interpolated, one discount an order: Chen & Goodman 1999, section 2.7
Shapes  tokens [position]
Run     uv run python implementations/text/kneser_ney.py
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Grams(NamedTuple):
    """The n-grams of one order in a text, numbered; entry t ends at token t."""

    number: Int[np.ndarray, " position"]
    """which n-gram ends here; the first n - 1 entries repeat the text's end and are not used"""
    count: int
    """how many different ones there are"""


def grams_of_all_orders(tokens: Int[np.ndarray, " position"], order: int) -> list[Grams]:
    """Orders 1 to `order`: an n-gram is the pair of the (n-1)-gram before and a token."""
    size = int(tokens.max()) + 1
    _, number = np.unique(tokens, return_inverse=True)
    grams = [Grams(number, number.max() + 1)]
    for _ in range(order - 1):
        pairs = np.roll(grams[-1].number, 1).astype(np.int64) * size + tokens
        _, number = np.unique(pairs, return_inverse=True)
        grams.append(Grams(number, number.max() + 1))
    return grams


def kneser_ney_bits(
    train: Int[np.ndarray, " position"],
    test: Int[np.ndarray, " token"],
    order: int,
    vocabulary: int,
) -> Float[np.ndarray, " token"]:
    """-log2 of the probability of every test token after the order - 1 tokens before it.

    The first test token follows the last training token.

    Raises:
        ValueError: the order is under 1, the training text is shorter than it, or a token is not in
            the vocabulary.
    """
    if order < 1 or len(train) < order:
        raise ValueError(f"order {order} needs at least as many training tokens, got {len(train)}")
    both = np.concatenate([train, test])
    if len(both) and not 0 <= both.min() <= both.max() < vocabulary:
        raise ValueError(f"tokens are 0 to {vocabulary - 1}, got {both.min()} to {both.max()}")
    grams = grams_of_all_orders(both, order)
    counts = [count_below(grams, n, len(train)) for n in range(1, order)]
    seen = grams[-1].number[order - 1 : len(train)]
    counts.append(np.bincount(seen, minlength=grams[-1].count))

    here = np.arange(len(train), len(both))
    probability = np.full(len(test), 1 / vocabulary)
    for n in range(1, order + 1):
        probability = interpolate(grams, counts[n - 1], n, here, len(train), probability)
    return -np.log2(probability)


def count_below(grams: list[Grams], n: int, length: int) -> Int[np.ndarray, " gram"]:
    """For every n-gram, how many different tokens the training text has before it."""
    longer = grams[n].number[n:length]
    _, first = np.unique(longer, return_index=True)  # one place for each different (n+1)-gram
    return np.bincount(grams[n - 1].number[n:length][first], minlength=grams[n - 1].count)


def interpolate(
    grams: list[Grams],
    count: Int[np.ndarray, " gram"],
    n: int,
    here: Int[np.ndarray, " token"],
    length: int,
    shorter: Float[np.ndarray, " token"],
) -> Float[np.ndarray, " token"]:
    """One order of the equation above, at the places `here`."""
    number = grams[n - 1].number
    once, twice = (count == 1).sum(), (count == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.5
    _, first = np.unique(number[n - 1 : length], return_index=True)
    first += n - 1  # one place of the training text for each different n-gram
    if n == 1:
        context, before, size = np.zeros(len(number), int), np.zeros(len(here), int), 1
    else:
        context, size = np.roll(grams[n - 2].number, 1), grams[n - 2].count
        before = context[here]
    total = np.bincount(context[first], weights=count[number[first]], minlength=size)
    types = np.bincount(context[first], weights=count[number[first]] > 0, minlength=size)
    known = total[before] > 0
    safe = np.where(known, total[before], 1)
    direct = np.maximum(count[number[here]] - discount, 0) / safe
    return np.where(known, direct + discount * types[before] / safe * shorter, shorter)


def main() -> None:
    from implementations.sources.text import bible_verses

    data = np.frombuffer("\n".join(bible_verses("web").values()).encode(), np.uint8).astype(int)
    train, test = data[:-100_000], data[-100_000:]
    print("bits per byte of the end of the World English Bible, from counts in what comes before")
    for order in range(1, 8):
        print(f"  {order}-grams of bytes  {kneser_ney_bits(train, test, order, 256).mean():.3f}")


if __name__ == "__main__":
    main()
