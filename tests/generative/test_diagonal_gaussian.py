"""Diagonal Gaussians: against torch.distributions, NumPyro, scipy's integration and hand's work."""

import math

import numpyro.distributions as numpyro_distributions
import pytest
import torch
from scipy.integrate import quad
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from implementations.generative.diagonal_gaussian import (
    DiagonalGaussian,
    kl_monte_carlo,
    standard,
)


def gaussian(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean, log_variance = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return DiagonalGaussian(mean, log_variance)


def as_torch(q):
    return Independent(Normal(q.mean, (q.log_variance / 2).exp()), 1)


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 63)], ids=str)
def test_equals_torchs_distributions(shape):
    q, p = gaussian(*shape), gaussian(*shape, seed=1)
    z = torch.randn(11, *shape, dtype=torch.float64)
    same = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(q.log_density(z), as_torch(q).log_prob(z), **same)
    torch.testing.assert_close(q.kl_to(p), kl_divergence(as_torch(q), as_torch(p)), **same)
    prior = as_torch(standard(q.mean))
    torch.testing.assert_close(q.kl_to_standard(), kl_divergence(as_torch(q), prior), **same)


def test_equals_numpyros_divergence():
    """NumPyro computes in float32 here, whose rounding is 6e-8 of values of order 1."""
    q = gaussian(5, 3)
    theirs = numpyro_distributions.Normal(q.mean.numpy(), q.deviation.numpy())
    kl = numpyro_distributions.kl_divergence(theirs, numpyro_distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(
        q.kl_by_coordinate().float(), torch.tensor(kl.tolist()), rtol=1e-5, atol=1e-5
    )


def test_divergence_is_the_integral_that_defines_it():
    """∫ q log(q / p) by scipy's quadrature, which states an error below 1e-8."""
    mean, log_variance = 0.7, -0.9
    q = DiagonalGaussian(
        torch.tensor([mean], dtype=torch.float64), torch.tensor([log_variance], dtype=torch.float64)
    )
    deviation = math.exp(log_variance / 2)

    def integrand(z):
        log_q = -0.5 * ((z - mean) / deviation) ** 2 - math.log(deviation)
        return math.exp(log_q) / math.sqrt(2 * math.pi) * (log_q + 0.5 * z * z)

    assert abs(quad(integrand, -12, 12)[0] - q.kl_to_standard().item()) < 1e-8


def test_divergence_by_hand():
    """mean 1, variance e: ½ (1 + e - 1 - 1) = (e - 1) / 2; two such coordinates have twice that."""
    q = DiagonalGaussian(torch.ones(2).double(), torch.ones(2).double())
    assert q.kl_to_standard().item() == pytest.approx(math.e - 1, rel=1e-14)
    assert q.kl_by_coordinate().tolist() == pytest.approx([(math.e - 1) / 2] * 2, rel=1e-14)


def test_divergence_from_itself_is_nothing_and_otherwise_something():
    q = gaussian(4, 5)
    assert q.kl_to(q).abs().max() == 0.0
    assert standard(q.mean).kl_to_standard().abs().max() == 0.0
    assert (q.kl_by_coordinate() > 0).all()


def test_samples_have_the_covariance_of_the_log_variance():
    """200,000 samples; variance and mean within 5 standard errors: 6 asked: false alarm 3e-6."""
    q = DiagonalGaussian(torch.tensor([0.0, 2.0, -1.0]), torch.tensor([-2.0, 0.0, 1.5]))
    z = q.at(torch.randn(200_000, 3))
    variance = q.log_variance.exp()
    assert ((z.mean(0) - q.mean).abs() < 5 * (variance / 200_000).sqrt()).all()
    assert ((z.var(0) - variance).abs() < 5 * variance * (2 / 200_000) ** 0.5).all()


def test_a_gradient_passes_the_sample():
    """d z/d mean = 1, d z/d log_variance = ½ deviation · noise, by gradcheck and by hand."""
    q = gaussian(3)
    noise = torch.randn(3, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in q]
    assert torch.autograd.gradcheck(lambda m, v: DiagonalGaussian(m, v).at(noise), leaves)
    DiagonalGaussian(*leaves).at(noise).sum().backward()
    assert leaves[0].grad.tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(leaves[1].grad, q.deviation * noise / 2, rtol=1e-12, atol=0)


def test_gradcheck_of_densities_and_divergences():
    leaves = [x.clone().requires_grad_() for x in (*gaussian(2, 3), *gaussian(2, 3, seed=1))]
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def both(m, v, n, w, z):
        q, p = DiagonalGaussian(m, v), DiagonalGaussian(n, w)
        return q.kl_to(p), q.log_density(z), q.kl_to_standard()

    assert torch.autograd.gradcheck(both, (*leaves, z))


def test_samples_estimate_the_divergence_without_bias():
    """Mean of 200,000 differences within 4.5 standard errors: false alarm 7e-6 for each of 4."""
    q, p = gaussian(4, 2), gaussian(4, 2, seed=1)
    noise = torch.randn(200_000, 4, 2, dtype=torch.float64)
    z = q.at(noise)
    spread = (as_torch(q).log_prob(z) - as_torch(p).log_prob(z)).std(0)
    estimate = kl_monte_carlo(q, p, noise)
    assert ((estimate - q.kl_to(p)).abs() < 4.5 * spread / 200_000**0.5).all()


def test_full_covariance_agrees_for_a_diagonal_one():
    """torch's MultivariateNormal knows nothing of diagonals."""
    q = gaussian(5)
    full = MultivariateNormal(q.mean, q.log_variance.exp().diag())
    other = MultivariateNormal(torch.zeros(5).double(), torch.eye(5).double())
    torch.testing.assert_close(q.kl_to_standard(), kl_divergence(full, other), rtol=1e-10, atol=0)


@pytest.mark.usefixtures("unchecked")
def test_an_average_over_no_samples_is_refused():
    q = gaussian(3)
    with pytest.raises(ValueError, match="at least one sample, got 0"):
        kl_monte_carlo(q, standard(q.mean), torch.zeros(0, 3))
