"""Draws by place: uniform, apart from each other, and with the chances asked for."""

import pytest
import torch
from scipy.stats import chisquare, kstest

from implementations.serving.draws import draw, uniform


def test_numbers_are_uniform_and_belong_to_their_place():
    """Three ways to count 4,000 of them; false alarms 1 in 100,000, and nothing here is random."""
    by = {
        "place": [uniform(3, place) for place in range(4000)],
        "seed": [uniform(seed, 5) for seed in range(4000)],
        "purpose": [uniform(0, place, "accept") for place in range(4000)],
    }
    for numbers in by.values():
        assert kstest(numbers, "uniform").pvalue > 1e-5
        assert min(numbers) >= 0 and max(numbers) < 1
        neighbours = torch.tensor([numbers[:-1], numbers[1:]]).corrcoef()[0, 1]
        assert abs(neighbours) < 4.4 / 4000**0.5
    assert len({*by["place"], *by["seed"], *by["purpose"]}) >= 11_999
    assert uniform(3, 7) == by["place"][7] and uniform(1, 12) != uniform(11, 2)


def test_a_draw_by_hand():
    """Sums .5, .5, .8, 1 and, not summing to one, 2, 2, 3: a token of no chance is never drawn."""
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    u = torch.tensor([0.0, 0.49, 0.5, 0.79, 0.81, 1 - 2**-52], dtype=torch.float64)
    assert draw(p.expand(6, -1), u).tolist() == [0, 0, 2, 2, 3, 3]
    p = torch.tensor([[2.0, 0.0, 1.0, 0.0]]).expand(4, -1)
    u = torch.tensor([0.0, 0.66, 0.67, 1 - 2**-52], dtype=torch.float64)
    assert draw(p, u).tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("chance", [0.0, torch.nan, torch.inf])
def test_there_is_nothing_to_draw(chance):
    """The sum of the second row is zero, NaN or infinite: no token is the first above it."""
    p = torch.tensor([[0.5, 0.5], [0.0, chance]])
    with pytest.raises(ValueError, match=f"positive and finite, got {chance}"):
        draw(p, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("total", [0.6, 1.0, 1.7])
def test_shares_are_the_chances(total):
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    u = torch.tensor([uniform(1, place) for place in range(5000)])
    counts = draw(total * p.expand(5000, -1), u).bincount(minlength=4)
    assert chisquare(counts.numpy(), 5000 * p.numpy(), sum_check=False).pvalue > 1e-5
