"""Likelihoods: against torch.distributions and scipy, all levels sum to one, far tails hold."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import logistic
from torch.distributions import Bernoulli, Independent, Normal

from implementations.generative.likelihoods import (
    bernoulli_log_likelihood,
    discretized_logistic_log_likelihood,
    gaussian_log_likelihood,
)

SAME = {"rtol": 1e-10, "atol": 1e-12}


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1,), (3, 63), (4, 2, 257)], ids=str)
def test_bernoulli_equals_torch(shape):
    x, logits = (numbers(*shape) > 0).double(), 3 * numbers(*shape)
    theirs = Independent(Bernoulli(logits=logits), 1).log_prob(x)
    torch.testing.assert_close(bernoulli_log_likelihood(x, logits), theirs, **SAME)


def test_bernoulli_between_black_and_white_is_the_cross_entropy_by_hand():
    """¼ log σ(l) + ¾ log σ(-l) at logit log 3: p = ¾."""
    x, logit = (
        torch.tensor([0.25], dtype=torch.float64),
        torch.tensor([math.log(3)], dtype=torch.float64),
    )
    by_hand = 0.25 * math.log(0.75) + 0.75 * math.log(0.25)
    assert bernoulli_log_likelihood(x, logit).item() == pytest.approx(by_hand, rel=1e-14)


@pytest.mark.parametrize("shape", [(1,), (3, 63), (4, 2, 257)], ids=str)
def test_gaussian_equals_torch(shape):
    x, mean, log_variance = numbers(3, *shape)
    theirs = Independent(Normal(mean, (log_variance / 2).exp()), 1).log_prob(x)
    torch.testing.assert_close(gaussian_log_likelihood(x, mean, log_variance), theirs, **SAME)


def test_gaussian_density_integrates_to_one():
    """scipy's quadrature over 20 deviations to either side; its stated error is below 1e-8."""
    mean, log_variance = (
        torch.tensor([0.4], dtype=torch.float64),
        torch.tensor([1.3], dtype=torch.float64),
    )

    def density(x):
        return (
            gaussian_log_likelihood(torch.tensor([x], dtype=torch.float64), mean, log_variance)
            .exp()
            .item()
        )

    assert abs(quad(density, -40, 40, points=[0.4])[0] - 1) < 1e-7


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_discretized_logistic_is_a_difference_of_scipys_distribution_function(levels):
    """cdf(x + ½) - cdf(x - ½), the tails at both ends; 1e-9 is what the subtraction leaves."""
    x = torch.arange(levels).double()
    mean, scale = 0.37 * levels, 0.11 * levels + 0.3
    log_scale = torch.full((levels, 1), math.log(scale), dtype=torch.float64)
    ours = discretized_logistic_log_likelihood(
        x[:, None], torch.full((levels, 1), mean, dtype=torch.float64), log_scale, levels
    )
    edges = [-math.inf, *(k + 0.5 for k in range(levels - 1)), math.inf]
    cdf = logistic.cdf(edges, loc=mean, scale=scale)
    torch.testing.assert_close(ours.exp(), torch.tensor(cdf).diff(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("mean", [-50.0, 0.0, 7.3, 16.5, 300.0])
@pytest.mark.parametrize("scale", [0.02, 1.0, 40.0])
def test_all_levels_sum_to_one_wherever_the_mean_is(mean, scale):
    """Rounding of a sum of 17 terms: 1e-12."""
    x = torch.arange(17).double()[:, None]
    parameters = (
        torch.tensor([mean], dtype=torch.float64),
        torch.tensor([math.log(scale)], dtype=torch.float64),
    )
    total = discretized_logistic_log_likelihood(x, *parameters, 17).exp().sum()
    assert abs(total - 1) < 1e-12


def test_far_tails_are_exact_where_a_difference_of_cdfs_is_zero():
    """A level 3,000 scales away: log P = -3,000 + log 2 sinh(1/2s) ..., never log 0.

    For (mean - x)/s large, σ(a) σ(-b)(1 - e^(-1/s)) -> e^a (1 - e^(-1/s)), a = (x + ½ - mean)/s.
    """
    x, mean = torch.tensor([3.0], dtype=torch.float64), torch.tensor([153.0], dtype=torch.float64)
    scale = 0.05
    ours = discretized_logistic_log_likelihood(
        x, mean, torch.tensor([math.log(scale)], dtype=torch.float64), 9
    )
    by_hand = (3.5 - 153) / scale + math.log(-math.expm1(-1 / scale))
    assert ours.item() == pytest.approx(by_hand, rel=1e-12)


def test_pixels_are_summed_and_never_averaged():
    """Twice the pixels, twice the nats: a mean would not change."""
    x, parameter = torch.ones(1, 5).double(), numbers(5)
    for function, parameters in (
        (bernoulli_log_likelihood, (parameter,)),
        (gaussian_log_likelihood, (parameter, parameter)),
        (lambda *p: discretized_logistic_log_likelihood(*p, 4), (parameter, parameter)),
    ):
        once = function(x, *parameters)
        twice = function(x.repeat(1, 2), *(p.repeat(2) for p in parameters))
        torch.testing.assert_close(twice, 2 * once, **SAME)


def test_gradcheck():
    x = torch.tensor([[0.0, 3.0, 8.0], [5.0, 0.0, 1.0]], dtype=torch.float64)
    mean, log_scale = 4 + numbers(2, 3), numbers(2, 3)
    leaves = [p.requires_grad_() for p in (mean, log_scale)]
    assert torch.autograd.gradcheck(
        lambda m, s: discretized_logistic_log_likelihood(x, m, s, 9), leaves
    )
    assert torch.autograd.gradcheck(lambda m, s: gaussian_log_likelihood(x, m, s), leaves)
    assert torch.autograd.gradcheck(lambda p: bernoulli_log_likelihood(x / 8, p), leaves[:1])


def test_one_picture_meets_many_parameters():
    """Fewer axes of x are broadcast: the same as asking one by one."""
    x, logits = (numbers(2, 5) > 0).double(), numbers(7, 2, 5)
    together = bernoulli_log_likelihood(x, logits)
    alone = torch.stack([bernoulli_log_likelihood(x, each) for each in logits])
    assert together.shape == (7, 2) and torch.equal(together, alone)


ZERO, NAN = torch.zeros(1, 2), torch.tensor([[0.0, math.nan]])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: bernoulli_log_likelihood(ZERO + 2, ZERO), "between 0 and 1, got 2 to 2"),
        (lambda: bernoulli_log_likelihood(ZERO - 0.1, ZERO), "got -0.1 to -0.1"),
        (lambda: bernoulli_log_likelihood(NAN, ZERO), "between 0 and 1, got nan"),
        (lambda: bernoulli_log_likelihood(ZERO, NAN), "finite logits, got nan"),
        (lambda: bernoulli_log_likelihood(ZERO, ZERO - math.inf), "finite logits, got -inf"),
        (lambda: gaussian_log_likelihood(NAN, ZERO, ZERO), "finite x, got nan"),
        (lambda: gaussian_log_likelihood(ZERO, NAN, ZERO), "finite mean"),
        (lambda: gaussian_log_likelihood(ZERO, ZERO, ZERO.log()), "log-variance, got -inf"),
        (lambda: gaussian_log_likelihood(ZERO, ZERO, ZERO - 200), "inverse variance, got inf"),
        (lambda: discretized_logistic_log_likelihood(ZERO + 9, ZERO, ZERO, 9), "0 and 8, got 9"),
        (lambda: discretized_logistic_log_likelihood(ZERO + 0.5, ZERO, ZERO, 9), "whole numbers"),
        (lambda: discretized_logistic_log_likelihood(NAN, ZERO, ZERO, 9), "got nan to nan"),
        (lambda: discretized_logistic_log_likelihood(ZERO, NAN, ZERO, 9), "finite mean"),
        (lambda: discretized_logistic_log_likelihood(ZERO, ZERO, ZERO.log(), 9), "log-scale, got"),
        (lambda: discretized_logistic_log_likelihood(ZERO, ZERO, ZERO, 1), "two levels, got 1"),
    ],
)
def test_what_has_no_likelihood_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
