"""Dequantization: probabilities of whole numbers from a density, bounded from below, in bits."""

import math

import pytest
import torch
from scipy import integrate, stats
from torch import distributions as D
from torch import nn

from implementations.flows.bijection import Bijection, Flow, Mapped
from implementations.flows.dequantization import (
    Dequantized,
    Logit,
    VariationalNoise,
    bits_per_dimension,
    uniform_noise,
)


class Identity(Bijection):
    def forward(self, x):
        return Mapped(x, x.new_zeros(len(x)))

    def inverse(self, y):
        return Mapped(y, y.new_zeros(len(y)))


def beta_flow(a, b, dim=1):
    """A density on the unit cube that is known: independent Beta(a, b)."""
    base = D.Beta(torch.full((dim,), float(a)).double(), torch.full((dim,), float(b)).double())
    flow = Flow(Identity(), (dim,), D.Independent(base, 1))
    flow.bijection.register_parameter("kind", nn.Parameter(torch.zeros(1).double()))
    return flow


def probabilities(a, b, levels):
    """What a Beta leaves in each of `levels` equal parts of [0, 1], by scipy."""
    return torch.from_numpy(stats.beta(a, b).cdf(torch.arange(levels + 1) / levels)).diff()


@pytest.mark.parametrize("levels, bits", [(256, 8.0), (2, 1.0), (17, math.log2(17))])
def test_a_uniform_guess_costs_log2_of_the_levels(levels, bits):
    x = torch.randint(levels, (50, 3))
    found = bits_per_dimension(Dequantized(beta_flow(1, 1, 3), levels).log_prob(x), 3)
    torch.testing.assert_close(
        found, torch.full((50,), bits, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_bits_by_hand():
    """A probability of 1/16 for two numbers: two bits each."""
    assert bits_per_dimension(torch.tensor([1 / 16]).log(), 2).item() == pytest.approx(2)


def test_the_ratio_averages_to_the_probability():
    """Mean over 40,000 draws of p(x + u), five standard errors for each of four levels."""
    model = Dequantized(beta_flow(2, 3), 4)
    for level, expected in enumerate(probabilities(2, 3, 4).tolist()):
        ratio = model.log_prob(torch.full((40_000, 1), level)).exp()
        assert abs(ratio.mean().item() - expected) < 5 * ratio.std().item() / 200


def test_one_draw_is_jensens_bound():
    """Its mean is the integral of log p(x + u) over u, scipy's, and lies below log P(x).

    Five standard errors: a false alarm in 2 million.
    """
    model = Dequantized(beta_flow(2, 3), 4)
    x = torch.zeros(40_000, 1).long()
    draws = model.log_prob(x)
    mean = integrate.quad(lambda u: stats.beta(2, 3).logpdf(u / 4) - math.log(4), 0, 1)[0]
    assert abs(draws.mean().item() - mean) < 5 * draws.std().item() / 200
    assert mean < probabilities(2, 3, 4)[0].log().item() - 0.1


def test_more_draws_come_closer_from_below():
    model, exact = Dequantized(beta_flow(2, 3), 4), probabilities(2, 3, 4)[0].log().item()
    means = [model.log_prob(torch.zeros(20_000, 1).long(), k).mean().item() for k in (1, 4, 64)]
    assert means[0] < means[1] < means[2]
    # The bias of 64 draws is 1/128 of the ratio's relative variance, 0.3: about 0.002.
    assert exact - 0.01 < means[2] < exact + 1e-3


class Fixed(nn.Module):
    """The same shift and log_scale for every pixel."""

    def __init__(self, shift, log_scale):
        super().__init__()
        self.values = torch.tensor([shift, log_scale], dtype=torch.float64)

    def forward(self, x):
        return self.values.expand(*x.shape, 2)


def test_variational_noise_has_the_density_it_says():
    """Against the logit-normal of torch.distributions."""
    noise = VariationalNoise(Fixed(0.4, -0.8), 256)
    u, log_q = noise(torch.zeros(1000, 2, dtype=torch.float64))
    normal = D.Normal(*torch.tensor([0.4, 1.7 * math.exp(-0.8)], dtype=torch.float64))
    other = D.TransformedDistribution(normal, D.SigmoidTransform())
    torch.testing.assert_close(log_q, other.log_prob(u).sum(1), rtol=1e-8, atol=1e-8)
    assert u.min() > 0 and u.max() < 1


def test_new_variational_noise_is_nearly_uniform():
    noise = VariationalNoise(Fixed(0.0, 0.0), 256)
    u, log_q = noise(torch.zeros(100_000, 1, dtype=torch.float64))
    # sigmoid(1.7 normal) is within 0.01 of uniform in distribution, the probit's approximation.
    assert stats.kstest(u[:, 0].numpy(), "uniform").statistic < 0.02
    assert abs(log_q.mean().item()) < 0.05


def test_the_right_noise_closes_the_bound():
    """q = p(x + u) / P(x) leaves nothing between one draw and log P(x). Beta(1, 2) on [0, 1/2]:

    p(u/2) = 2 (1 - u/2), P(0) = 3/4, so q(u) = (2 - u) / 1.5, drawn by its inverse.
    """

    def posterior(x):
        u = 2 - (4 - 3 * torch.rand_like(x)).sqrt()
        return u, ((2 - u) / 1.5).log().sum(1)

    bound = Dequantized(beta_flow(1, 2), 2, posterior).log_prob(torch.zeros(100, 1).long())
    torch.testing.assert_close(bound, torch.full((100,), math.log(3 / 4), dtype=torch.float64))


def test_uniform_noise_fills_the_unit_interval():
    """Kolmogorov and Smirnov over 10,000 numbers; false alarm 1 in 1,000, once."""
    u, log_q = uniform_noise(torch.full((10_000, 1), 7.0))
    assert stats.kstest(u[:, 0].numpy(), "uniform").pvalue > 1e-3
    assert log_q.shape == (10_000,) and not log_q.any()


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_logit_is_torchs(margin):
    x = torch.rand(20, 3, dtype=torch.float64)
    inner = D.AffineTransform(margin, 1 - 2 * margin)
    transform = D.ComposeTransform([inner, D.SigmoidTransform().inv])
    y, log_det = Logit(margin)(x)
    torch.testing.assert_close(y, transform(x), rtol=1e-10, atol=1e-10)
    expected = transform.log_abs_det_jacobian(x, y).sum(1)
    torch.testing.assert_close(log_det, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(Logit(margin).inverse(y).value, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("outside", [-0.1, 1.1, torch.nan])
def test_data_outside_the_unit_cube_are_refused(outside):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Logit(0.05)(torch.tensor([[0.5, outside]]))


def test_the_edges_need_a_margin():
    edges = torch.tensor([[0.0, 1.0]])
    assert Logit(0.01)(edges).log_det.isfinite().all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        Logit()(edges)


def test_samples_are_levels_in_their_proportions():
    """20,000 samples, chi-square against scipy's cells; false alarm 1 in 1,000, once."""
    x = Dequantized(beta_flow(2, 3), 5).sample(20_000)
    assert x.dtype == torch.int64 and x.shape == (20_000, 1)
    counts = torch.bincount(x[:, 0], minlength=5).numpy()
    expected = probabilities(2, 3, 5).numpy() * 20_000
    assert stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize(
    "x, arguments, sentence",
    [
        ([[-1]], {}, "levels are 0 to 3, got -1 to -1"),
        ([[0], [4]], {}, "levels are 0 to 3, got 0 to 4"),
        ([[0]], {"draws": 0}, "one draw at least, got 0"),
    ],
)
def test_bad_input(x, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Dequantized(beta_flow(1, 1), 4).log_prob(torch.tensor(x), **arguments)


def test_bad_settings():
    with pytest.raises(ValueError, match="two levels at least, got 1"):
        Dequantized(beta_flow(1, 1), 1)
    with pytest.raises(ValueError, match=r"less than 1/2, got 0\.5"):
        Logit(0.5)


def test_bytes_are_read_as_they_are():
    """uint8 pixels, as files hold them, must not wrap around."""
    x = torch.tensor([[255], [0]], dtype=torch.uint8)
    torch.manual_seed(1)
    bytes_ = Dequantized(beta_flow(2, 3), 256).log_prob(x)
    torch.manual_seed(1)
    torch.testing.assert_close(bytes_, Dequantized(beta_flow(2, 3), 256).log_prob(x.long()))
