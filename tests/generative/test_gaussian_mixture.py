"""The oracle is itself held to torch's distributions, to autograd, and to an integral on a line."""

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from implementations.generative.gaussian_mixture import Mixture, ring, transport

LEVELS = [(1.0, 0.1), (0.8, 0.6), (0.05, 1.0), (1.0, 30.0)]


@pytest.fixture
def mixture():
    return ring(components=4)


@pytest.fixture
def line():
    parts = ([0.3, 0.7], [[-1.0], [0.8]], [[[0.04]], [[0.09]]])
    return Mixture(*(torch.tensor(part, dtype=torch.float64) for part in parts))


@pytest.mark.parametrize("alpha, sigma", LEVELS)
def test_density_equals_torchs(mixture, alpha, sigma):
    noisy, x = mixture.noised(alpha, sigma), torch.randn(20, 2, dtype=torch.float64)
    covariances = alpha**2 * mixture.covariances + sigma**2 * torch.eye(2, dtype=torch.float64)
    parts = MultivariateNormal(alpha * mixture.means, covariances)
    theirs = MixtureSameFamily(Categorical(mixture.weights), parts).log_prob(x)
    torch.testing.assert_close(noisy.log_density(x), theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha, sigma", LEVELS)
def test_score_is_the_gradient_of_the_log_density(mixture, alpha, sigma):
    noisy, x = mixture.noised(alpha, sigma), torch.randn(20, 2, dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(noisy.log_density(x).sum(), x)
    torch.testing.assert_close(noisy.score(x), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha, sigma", LEVELS)
def test_denoised_is_tweedies(mixture, alpha, sigma):
    """E[x_0 | x] = (x + sigma² score) / alpha: two formulas, one number."""
    x = torch.randn(20, 2, dtype=torch.float64)
    tweedie = (x + sigma**2 * mixture.noised(alpha, sigma).score(x)) / alpha
    torch.testing.assert_close(mixture.denoised(x, alpha, sigma), tweedie, rtol=1e-9, atol=1e-9)


def test_denoised_is_the_integral_that_defines_it(line):
    """On a line: the mean of x_0 under p(x_0) N(x; alpha x_0, sigma²), by a sum over a grid."""
    alpha, sigma = 0.8, 0.6
    grid = torch.linspace(-6, 6, 40_001, dtype=torch.float64)[:, None]
    x = torch.tensor([[-1.2], [0.1], [0.9]], dtype=torch.float64)
    weights = line.log_density(grid)[None] - (x - alpha * grid.mT) ** 2 / (2 * sigma**2)
    mean = (weights.softmax(1) @ grid).flatten()
    torch.testing.assert_close(line.denoised(x, alpha, sigma).flatten(), mean, rtol=1e-9, atol=0)


def test_transport_of_one_gaussian_is_its_closed_form():
    """x_s = alpha_s m + (x_t - alpha_t m) deviation_s / deviation_t."""
    one = Mixture(
        *(torch.tensor(part, dtype=torch.float64) for part in ([1.0], [[0.7]], [[[0.25]]]))
    )
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    start, end = (0.3, 0.9), (0.95, 0.2)
    deviations = [(alpha**2 * 0.25 + sigma**2) ** 0.5 for alpha, sigma in (start, end)]
    wanted = end[0] * 0.7 + (x - start[0] * 0.7) * deviations[1] / deviations[0]
    torch.testing.assert_close(transport(one, x, start, end), wanted, rtol=1e-10, atol=1e-12)


def test_transport_keeps_the_distribution_function(line):
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]
    there = transport(line, x, (0.2, 0.98), (0.99, 0.1))
    before, after = line.noised(0.2, 0.98).cdf(x), line.noised(0.99, 0.1).cdf(there)
    torch.testing.assert_close(before, after, rtol=1e-10, atol=1e-12)


def test_samples_have_the_moments(mixture):
    """Within 5 standard errors: about one false alarm in a million."""
    x, chosen = mixture.sample(20_000, torch.Generator().manual_seed(0))
    mean, covariance = mixture.moments()
    assert ((x.mean(0) - mean).abs() < 5 * (covariance.diagonal() / len(x)).sqrt()).all()
    products = ((x - mean)[:, :, None] * (x - mean)[:, None]).flatten(1)
    error = products.std(0) / len(x) ** 0.5
    assert ((products.mean(0) - covariance.flatten()).abs() < 5 * error).all()
    share = chosen.bincount() / len(x)
    assert ((share - mixture.weights).abs() < 5 * (mixture.weights / len(x)).sqrt()).all()


def test_a_plane_has_no_order(mixture):
    with pytest.raises(ValueError, match="only a line has an order, got 2 dimensions"):
        mixture.cdf(torch.zeros(1, 1, dtype=torch.float64))
