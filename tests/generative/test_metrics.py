"""Metrics against scipy, scikit-learn and distances worked by hand."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from implementations.generative.metrics import (
    copied,
    frechet_distance,
    kernel_distance,
    nearest,
    precision_and_recall,
)


@pytest.fixture
def sets():
    real, made = torch.randn(60, 5, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    return real, 0.7 * made @ torch.randn(5, 5, dtype=torch.float64) + 0.3


def test_frechet_distance_is_the_formula_with_scipys_square_root(sets):
    real, made = (part.numpy() for part in sets)
    left, right = np.cov(real.T), np.cov(made.T)
    apart = ((real.mean(0) - made.mean(0)) ** 2).sum()
    root = scipy.linalg.sqrtm(left @ right).real
    assert frechet_distance(*sets) == pytest.approx(apart + np.trace(left + right - 2 * root))


def test_frechet_distance_by_hand():
    """On a line: the difference of means squared, and of deviations squared."""
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [7.0]])
    wanted = (4 - 1) ** 2 + (2**0.5 - 18**0.5) ** 2
    assert frechet_distance(a, b) == pytest.approx(wanted)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_scikit_learns_kernel(sets):
    real, made = (part.numpy() for part in sets)
    kernels = [
        polynomial_kernel(a, b, degree=3, gamma=1 / 5, coef0=1)
        for a, b in ((real, real), (made, made), (real, made))
    ]
    off = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernels[:2]]
    assert kernel_distance(*sets) == pytest.approx(sum(off) - 2 * kernels[2].mean())


def test_kernel_distance_has_no_bias():
    """Sets of 20 from one distribution: the mean of 400 distances within 5 standard errors of 0."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, 2, 20, 4, generator=generator)
    found = torch.tensor([kernel_distance(a, b) for a, b in draws])
    assert found.mean().abs() < 5 * found.std() / 20


def test_precision_and_recall_are_scikit_learns_neighbours(sets):
    real, made = (part.numpy() for part in sets)

    def share(inside, among):
        neighbours = NearestNeighbors(n_neighbors=4).fit(among)
        radii = neighbours.kneighbors(among)[0][:, 3]
        apart = np.linalg.norm(inside[:, None] - among[None], axis=2)
        return (apart <= radii).any(1).mean()

    found = precision_and_recall(*sets, neighbours=3)
    assert found.precision == pytest.approx(share(made, real))
    assert found.recall == pytest.approx(share(real, made))


def test_a_missing_half_costs_recall_and_an_outlier_precision():
    real = torch.cat((torch.randn(50, 2), torch.randn(50, 2) + 20))
    half = real[:50] + 0.01
    assert precision_and_recall(real, half).precision == 1.0
    assert precision_and_recall(real, half).recall == pytest.approx(0.5, abs=0.1)
    wide = torch.cat((real, torch.full((100, 2), 500.0)))
    assert precision_and_recall(real, wide).precision == pytest.approx(0.5, abs=0.01)


def test_copies_are_counted():
    train, held_out, new = torch.randn(3, 200, 6)
    assert copied(train + 1e-3, train, held_out) == 1.0
    assert copied(held_out, train, held_out) == pytest.approx(0.05, abs=0.005)
    assert copied(new, train, held_out) < 0.12


def test_copies_are_counted_where_real_pictures_repeat_themselves():
    """A quarter of the held-out points are training points: the limit is 0, and copies are at it.
    A hundred points of a hundred numbers, because a large cdist says that a copy is 0.01 away."""
    train, fresh, new = torch.randn(3, 100, 100)
    held_out = torch.cat((train[:25], fresh[:75]))
    assert nearest(train, train).max() == 0
    assert copied(train, train, held_out) == 1.0
    assert copied(held_out, train, held_out) == 0.25
    assert copied(new, train, held_out) == 0.0


def test_nearest_by_hand():
    points, among = torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [7.0]])
    assert nearest(points, among, at_once=1).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_and_recall])
def test_points_that_are_no_numbers_are_refused(metric, bad, sets):
    real, made = sets
    made[3, 1] = bad
    for pair in ((real, made), (made, real)):
        with pytest.raises(ValueError, match="points are finite"):
            metric(*pair)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_number_is_not_counted_as_no_copy(which):
    parts = torch.randn(3, 20, 4)
    parts[which, 3, 1] = math.nan
    with pytest.raises(ValueError, match="points are finite"):
        copied(*parts)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_and_recall])
def test_sets_of_two_spaces_are_refused(metric):
    for made in (torch.zeros(9, 3), torch.zeros(9), torch.zeros(9, 1, 2, 2), torch.zeros(9, 0)):
        with pytest.raises(ValueError, match=r"one dim, got \(9, 2\), \(9,"):
            metric(torch.zeros(9, 2), made)


def test_too_few_points():
    few = torch.zeros(1, 2)
    for metric in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="2 points at least, got 1 and 1"):
            metric(few, few)
    with pytest.raises(ValueError, match="3 neighbours need more points"):
        precision_and_recall(torch.zeros(3, 2), torch.zeros(9, 2))
