"""How can one take a softmax without having seen all its scores?

Eight scores arrive two at a time, each with a value, and nothing that has gone by may be looked at
again. Three numbers are kept: the largest score m so far, the sum l of exp(score - m), and the sum
a of exp(score - m) · value. When a larger score arrives, the sums were made with the wrong m: they
are multiplied by exp(m_old - m_new), and are right again. At the end the answer is a / l.

Expected: the scores are logarithms of whole numbers, so the answer is a fraction known by hand, and
it comes out to the last digits, in every one of the 8! orders. Without the rescaling the answer
depends on the order. Without the maximum it overflows.

Run     uv run python weeks/04_flash_attention/online_softmax.py
"""

from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from implementations.attention.flash import Summary, merge, summarize
from implementations.lab.findings import Finding, at_least, at_most, equals
from implementations.lab.script import run

SCORES = (1, 3, 2, 5, 4, 7, 12, 6)  # the scores are their logarithms: weights 1/40, 3/40, ...
VALUES = (8, 4, 0, 2, 6, 5, 3, 7)


@dataclass(frozen=True)
class Config:
    """Softmax in one pass, eight numbers."""

    tile: int = 2
    """scores that arrive together: 1, 2 or 4"""
    offset: float = 1000.0
    """added to every score, which changes no weight, to overflow what has no maximum"""


def without_rescaling(left: Summary, right: Summary) -> Summary:
    """The mistake: old sums are taken for sums made with the new maximum."""
    maximum = torch.maximum(left.maximum, right.maximum)
    new = torch.exp(right.maximum - maximum)
    return Summary(maximum, left.total + right.total * new, left.weighted + right.weighted * new)


def steps(scores: Tensor, value: Tensor, tile: int, join=merge) -> list[Summary]:
    """What is remembered after each tile; scores and value are [..., 8]."""
    tiles = zip(scores[..., None, :].split(tile, -1), value[..., None].split(tile, -2), strict=True)
    seen: list[Summary] = []
    for some_scores, some_values in tiles:
        new = summarize(some_scores, some_values)
        seen.append(join(seen[-1], new) if seen else new)
    return seen


def answer(summary: Summary) -> Tensor:
    return (summary.weighted / summary.total).flatten()


def print_steps(scores: Tensor, tile: int, seen: list[Summary]) -> None:
    """One line a tile: what arrives, by what the old sums are multiplied, what is kept."""
    print("scores           largest m   old sums times       l        a     a / l")
    before = None
    for part, (maximum, total, weighted) in zip(scores.split(tile), seen, strict=True):
        factor = "" if before is None else f"{torch.exp(before - maximum).item():.4f}"
        arriving = " ".join(f"{score:.3f}" for score in part)
        print(
            f"{arriving:16} {maximum.item():9.4f} {factor:>16} {total.item():7.4f} "
            f"{weighted.item():8.4f}  {(weighted / total).item():8.4f}"
        )
        before = maximum


def draw(exact: float, right: list[Summary], wrong: list[Summary]) -> None:
    """The running sums and the running average, with the rescaling and without."""
    _, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    tiles = range(1, len(right) + 1)
    for seen, style, name in ((right, "o-", "rescaled"), (wrong, "s--", "not rescaled")):
        panels[0].plot(tiles, [s.total.item() for s in seen], style, label=name)
        panels[1].plot(tiles, [answer(s).item() for s in seen], style, label=name)
    panels[0].set(title="sum l of exp(score - m)", xlabel="tiles seen")
    panels[1].set(title="average a / l", xlabel="tiles seen")
    panels[1].axhline(exact, color="0.6", zorder=0, label="softmax of all eight")
    for axes in panels:
        axes.set_xticks(tiles)
        axes.legend()


def main(config: Config) -> list[Finding]:
    if config.tile not in (1, 2, 4):
        raise ValueError(f"a tile is 1, 2 or 4 scores, got {config.tile}")
    by_hand = Fraction(sum(s * v for s, v in zip(SCORES, VALUES, strict=True)), sum(SCORES))
    scores, value = torch.tensor(SCORES).double().log(), torch.tensor(VALUES).double()
    right = steps(scores, value, config.tile)
    wrong = steps(scores, value, config.tile, without_rescaling)
    print_steps(scores, config.tile, right)
    print(f"by hand: {by_hand} = {float(by_hand):.4f}\n")
    draw(float(by_hand), right, wrong)

    orders = torch.tensor(list(permutations(range(8))))
    ends = {
        join: answer(steps(scores[orders], value[orders], config.tile, join)[-1])
        for join in (merge, without_rescaling)
    }
    high = (scores + config.offset).float()
    bare = (high.exp() * value).sum() / high.exp().sum()
    shifted = answer(steps(high, value.float(), config.tile)[-1])
    worst = {join: (found - float(by_hand)).abs().max().item() for join, found in ends.items()}
    spread = ends[without_rescaling]
    return [
        Finding("orders of the eight scores", len(orders), expected=equals(40320), source="8!"),
        Finding(
            "the answer by hand is missed, in any order, by at most",
            worst[merge],
            expected=at_most(1e-14),
        ),
        Finding("without rescaling, by up to", worst[without_rescaling], expected=at_least(0.1)),
        Finding(
            "without rescaling, the answer changes with the order by up to",
            (spread.max() - spread.min()).item(),
            expected=at_least(0.1),
        ),
        Finding(
            "without the maximum, scores of a thousand give",
            str(bare.item()),
            expected=equals("nan"),
            source="inf / inf",
        ),
        Finding(
            "with it, in float32, the answer is missed by",
            (shifted - float(by_hand)).abs().item(),
            # The scores themselves are rounded at 1000: a unit in the last place is 6e-5.
            expected=at_most(8 * 6e-5),
        ),
    ]


if __name__ == "__main__":
    run(main, Config(), quick=Config())
