"""Alignment, uniformity and effective rank: SciPy's distances and Bessel series, known spectra."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.special import hyp0f1
from scipy.stats import entropy
from torch.nn.functional import normalize
from torch.testing import assert_close

from implementations.contrastive.geometry import (
    alignment,
    effective_rank,
    uniformity,
    uniformity_of_the_sphere,
)

SAME = {"rtol": 1e-10, "atol": 1e-12}


def rows(count: int = 20, dim: int = 5) -> torch.Tensor:
    return torch.randn(count, dim, dtype=torch.float64)


def test_alignment_is_two_minus_two_cosines():
    first, second = rows(), rows()
    cosines = torch.nn.functional.cosine_similarity(first, second)
    assert_close(alignment(first, second), (2 - 2 * cosines.mean()).item(), **SAME)
    assert_close(alignment(first, 3 * first), 0.0, rtol=0, atol=1e-12)
    assert_close(alignment(first, -first), 4.0, **SAME)


@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity_is_that_of_scipys_distances(t):
    """Each pair once, and no row with itself: pdist's list."""
    x = rows()
    squares = pdist(normalize(x).numpy()) ** 2
    assert_close(uniformity(x, t), float(np.log(np.exp(-t * squares).mean())), **SAME)


@pytest.mark.parametrize("dim", [2, 3, 64])
def test_the_spheres_uniformity_is_scipys_series(dim):
    expected = float(np.log(hyp0f1(dim / 2, 4.0)) - 4.0)
    assert_close(uniformity_of_the_sphere(dim), expected, **SAME)


def test_random_directions_are_as_uniform_as_the_sphere():
    """300 batches of 50 directions in 3 dimensions; the mean potential is unbiased: |z| < 3.3."""
    potentials = torch.tensor([math.exp(uniformity(rows(50, 3))) for _ in range(300)])
    z = (potentials.mean() - math.exp(uniformity_of_the_sphere(3))) / potentials.std()
    assert abs(z * math.sqrt(300)) < 3.3


def test_opposite_points_are_as_far_as_can_be_and_equal_ones_as_near():
    assert_close(uniformity(torch.tensor([[1.0], [-1.0]])), -8.0, rtol=1e-6, atol=0)
    assert_close(uniformity(torch.ones(5, 3)), 0.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equal_use_of_some_directions_is_their_number(rank):
    x = torch.eye(8, dtype=torch.float64)[:rank].repeat(4, 1)
    assert_close(effective_rank(x), float(rank), **SAME)


def test_effective_rank_is_scipys_entropy_of_the_spectrum():
    x = rows() * torch.tensor([5.0, 3, 1, 0.1, 0.01])
    values = np.linalg.svd(normalize(x).numpy(), compute_uv=False)
    assert_close(effective_rank(x), float(np.exp(entropy(values))), **SAME)


def test_rows_around_one_vector_have_collapsed():
    """Their differences have full rank, however small they are; they must not count."""
    x = torch.ones(100, 16, dtype=torch.float64) + 1e-9 * rows(100, 16)
    assert effective_rank(x) < 1.001


@pytest.mark.parametrize(
    "measure, arguments, sentence",
    [
        (alignment, (torch.ones(3, 2), torch.ones(2, 2)), "shapes agree"),
        (alignment, (torch.ones(0, 2), torch.ones(0, 2)), "shapes agree"),
        (alignment, (torch.ones(3, 2), torch.zeros(3, 2)), "no direction"),
        (uniformity, (torch.ones(1, 2),), "at least 2 rows, got 1"),
        (effective_rank, (torch.ones(0, 2),), "no rows"),
        (effective_rank, (torch.full((2, 2), math.nan),), "not finite"),
    ],
)
def test_bad_input(measure, arguments, sentence, unchecked):
    with pytest.raises(ValueError, match=sentence):
        measure(*arguments)
