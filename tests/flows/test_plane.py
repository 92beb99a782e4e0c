"""The densities that flows are measured by are what scikit-learn and scipy say they are."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.datasets import make_moons
from torch.distributions import Independent, Normal

from implementations.flows.plane import divergence, grid, log_density, two_modes, two_moons


def test_two_moons_are_scikit_learns():
    """Without noise make_moons gives the centres; our mixture's means are the same points."""
    points, _ = make_moons(200, shuffle=False, noise=0.0)
    ours = two_moons(0.1, points=100).component_distribution.base_dist.loc
    np.testing.assert_allclose(ours.numpy(), points, atol=1e-12)


def test_their_density_is_scipys_sum():
    moons, x = two_moons(0.2, points=7), torch.randn(5, 2, dtype=torch.float64)
    points, _ = make_moons(14, shuffle=False, noise=0.0)
    parts = [stats.multivariate_normal(point, 0.2**2).pdf(x.numpy()) for point in points]
    np.testing.assert_allclose(moons.log_prob(x).exp().numpy(), np.mean(parts, 0), rtol=1e-10)


def test_two_modes_by_hand():
    """At the origin both parts are equal: the density of one normal, 2 standard deviations away."""
    expected = stats.norm(0, 0.5).pdf(1.0) * stats.norm(0, 0.5).pdf(0.0)
    found = two_modes(2.0).log_prob(torch.zeros(1, 2, dtype=torch.float64)).exp().item()
    assert found == pytest.approx(expected)


def test_a_divergence_is_the_closed_form_of_two_normals():
    """KL of N(0, 1) from N(1/2, 1.5²) in each of two directions, and not the other way around."""
    cells = grid(-9, 9, -9, 9, 300)
    p = Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    q = Independent(Normal(torch.full((2,), 0.5).double(), torch.full((2,), 1.5).double()), 1)
    log_p, log_q = (log_density(each.log_prob, cells.points) for each in (p, q))
    exact = torch.distributions.kl_divergence(p, q).item()
    assert divergence(cells, log_p, log_q) == pytest.approx(exact, rel=1e-9)
    assert divergence(cells, log_p, log_p) == 0


def test_the_midpoint_rule_is_scipys_integral():
    cells = grid(0, 2, -1, 2, 400)
    values = (cells.points[:, 0] ** 2 * torch.exp(cells.points[:, 1])).double()
    exact, _ = integrate.dblquad(lambda y, x: x**2 * np.exp(y), 0, 2, -1, 2)
    assert cells.integral(values) == pytest.approx(exact, rel=1e-5)  # h² / 24 of it


def test_a_picture_has_its_top_row_first():
    cells = grid(0, 2, 0, 20, 2)
    picture = cells.picture(cells.points[:, 0] + cells.points[:, 1])
    assert picture.tolist() == [[15.5, 16.5], [5.5, 6.5]]


def test_points_are_read_in_parts():
    moons, x = two_moons(), torch.randn(11, 2, dtype=torch.float64)
    torch.testing.assert_close(log_density(moons.log_prob, x, rows=3), moons.log_prob(x))
