"""The importance-weighted bound: against the exact likelihood, brute force and Jensen."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from implementations.generative.diagonal_gaussian import DiagonalGaussian, standard
from implementations.generative.importance_weighted import (
    effective_samples,
    importance_weighted_bound,
    nested_bounds,
)
from implementations.generative.likelihoods import gaussian_log_likelihood
from implementations.generative.linear_vae import LinearVAE


def linear_log_weights(samples: int, wider: float = -0.5):
    """log p(x, z) - log q(z | x) in a linear model, q beside the posterior and of another width."""
    torch.manual_seed(1)
    model = LinearVAE(
        torch.randn(3, 2).double(), torch.zeros(3).double(), torch.tensor(0.5, dtype=torch.float64)
    )
    x = torch.randn(1, 3).double()
    best = model.best_diagonal(x)
    q = DiagonalGaussian(best.mean + 0.3, best.log_variance + wider)
    z = q.at(torch.randn(samples, 1, 2).double())
    log_likelihood = gaussian_log_likelihood(x, z @ model.weight.mT, model.variance.log().expand(3))
    weights = log_likelihood + standard(z).log_density(z) - q.log_density(z)
    return weights[:, 0], model.log_likelihood(x).item(), model.elbo(x, q).item()


def test_is_the_logarithm_of_the_average_weight():
    """By hand: weights 1, 2 and 6 average to 3; scipy's logsumexp elsewhere."""
    weights = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64).log()
    assert importance_weighted_bound(weights).item() == pytest.approx(math.log(3), rel=1e-14)
    many = 100 * torch.randn(63, 5).double()
    theirs = logsumexp(many.numpy(), axis=0) - math.log(63)
    torch.testing.assert_close(
        importance_weighted_bound(many), torch.tensor(theirs), rtol=1e-12, atol=0
    )


def test_one_sample_is_the_elbo():
    """In the linear model the ELBO is known; 4.5 standard errors: false alarm 7e-6."""
    weights, _, exact = linear_log_weights(100_000)
    error = weights.std() / len(weights) ** 0.5
    assert abs(nested_bounds(weights, (1,))[1] - exact) < 4.5 * error


def test_rises_with_k_from_the_elbo_to_the_exact_likelihood():
    """L_1 < L_2 < L_5 < L_20 < log p(x), each step by more than 5 standard errors of the
    difference, so that noise has no part in it; false alarm below 1e-6 for each of four.
    """
    weights, exact, _ = linear_log_weights(200_000)
    bounds = {}
    for count in (1, 2, 5, 20):
        groups = weights.view(-1, count).T
        bounds[count] = importance_weighted_bound(groups)
    for low, high in ((1, 2), (2, 5), (5, 20)):
        a, b = bounds[low], bounds[high]
        error = math.hypot(a.std() / len(a) ** 0.5, b.std() / len(b) ** 0.5)
        assert b.mean() - a.mean() > 5 * error, (low, high)
    last = bounds[20]
    assert exact - last.mean() > 5 * last.std() / len(last) ** 0.5


def test_the_average_weight_is_unbiased_for_the_likelihood():
    """E w = p(x), for any q wide enough; 4.5 standard errors: false alarm 7e-6."""
    weights, exact, _ = linear_log_weights(200_000)
    w = weights.exp()
    assert abs(w.mean() - math.exp(exact)) < 4.5 * w.std() / len(w) ** 0.5


def test_the_gap_falls_like_the_variance_of_the_average():
    """log p(x) - L_K -> Var(w / p) / 2K (the delta method): at K = 200 within 10 % of it.

    u = mean of w / p(x) has the mean 1, so log u and log u - (u - 1) have the same one, and the
    second is (u - 1)²/2 but for smaller terms: 5,000 groups know it to 2 %, 5 deviations. q is
    wider than the posterior; where it is narrower, a few weights decide the variance.
    """
    weights, exact, _ = linear_log_weights(1_000_000, wider=0.5)
    ratio = importance_weighted_bound(weights.view(-1, 200).T - exact)
    gap = (ratio.exp() - 1 - ratio).mean()
    expected = (weights - exact).exp().var() / 400
    assert 0.9 < gap / expected < 1.1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-300, 300), min_size=12, max_size=12))
def test_nested_bounds_are_ordered_for_the_very_samples(logs):
    """1 divides 2 divides 4 divides 12: Jensen inside every group; 1e-9 is rounding at 300."""
    bounds = nested_bounds(torch.tensor(logs, dtype=torch.float64), (1, 2, 4, 12))
    values = [bound.item() for bound in bounds.values()]
    assert all(low <= high + 1e-9 for low, high in pairwise(values))
    assert values[0] == pytest.approx(sum(logs) / 12, abs=1e-9)


def test_equal_weights_leave_no_gap_and_no_sample_unused():
    weights = torch.full((8, 3), -700.0, dtype=torch.float64)  # exp would be 0 in float32
    bounds = nested_bounds(weights, (1, 8))
    assert torch.equal(bounds[1], weights[0]) and (bounds[8] - weights[0]).abs().max() < 1e-12
    assert effective_samples(weights).tolist() == pytest.approx([8.0] * 3)


def test_one_large_weight_is_one_sample():
    weights = torch.zeros(9, 1).double()
    weights[4] = 60.0
    assert effective_samples(weights).item() == pytest.approx(1.0, abs=1e-9)


def test_gradcheck():
    weights = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(importance_weighted_bound, weights)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: importance_weighted_bound(torch.zeros(0, 3)), "at least one sample, got 0"),
        (lambda: importance_weighted_bound(torch.tensor([0.0, math.nan])), "not finite"),
        (lambda: importance_weighted_bound(torch.tensor([0.0, -math.inf])), "not finite"),
        (lambda: nested_bounds(torch.zeros(10), (1, 3)), "10 samples cannot .* groups of 3"),
        (lambda: nested_bounds(torch.zeros(10), (0,)), "groups of 0"),
    ],
)
def test_what_bounds_nothing_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
