"""Composition, turning around, the base density; and what is said when the data are wrong."""

import math

import pytest
import torch
from scipy import stats
from torch import distributions as D

from implementations.flows.bijection import (
    Bijection,
    Compose,
    Flow,
    Inverse,
    Mapped,
    Permute,
    negative_log_likelihood,
    normal_log_density,
)
from implementations.flows.glow import ActNorm

X = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 0.0]], dtype=torch.float64)


def actnorm(shift, log_scale):
    layer = ActNorm(2).double()
    layer.load_state_dict({"shift": torch.tensor(shift), "log_scale": torch.tensor(log_scale)})
    return layer


def test_the_base_is_scipys_normal():
    expected = stats.multivariate_normal(mean=[0, 0]).logpdf(X.numpy())
    torch.testing.assert_close(
        normal_log_density(X), torch.from_numpy(expected), rtol=1e-12, atol=0
    )
    image = X.view(3, 2, 1, 1)  # images are summed over all their axes
    torch.testing.assert_close(normal_log_density(image), normal_log_density(X))


def test_a_flow_is_torchs_transformed_distribution():
    """z = (x + shift) scale, so x = z / scale - shift."""
    layer = actnorm([0.3, -1.0], [0.7, -0.2])
    scale, shift = layer.log_scale.exp().detach(), layer.shift.detach()
    base = D.Independent(D.Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    other = D.TransformedDistribution(base, D.AffineTransform(-shift, 1 / scale, event_dim=1))
    torch.testing.assert_close(Flow(layer, (2,)).log_prob(X), other.log_prob(X), rtol=1e-12, atol=0)


def test_composition_applies_the_first_first_and_adds_log_dets():
    """Stretch by 2 after a shift of 1: (x + 1) 2, and log 4 in the plane. By hand."""
    both = Compose(actnorm([1.0, 1.0], [0.0, 0.0]), actnorm([0.0, 0.0], [math.log(2)] * 2))
    y, log_det = both(X)
    torch.testing.assert_close(y, 2 * X + 2)
    torch.testing.assert_close(log_det, torch.full((3,), math.log(4)).double())
    torch.testing.assert_close(both.inverse(y).value, X)
    torch.testing.assert_close(Inverse(both)(y).value, X)
    torch.testing.assert_close(Inverse(both)(y).log_det, -log_det)


def test_a_permutation_by_hand():
    order = Permute(torch.tensor([2, 0, 1]))
    y, log_det = order(torch.tensor([[10.0, 11.0, 12.0]]))
    assert y.tolist() == [[12.0, 10.0, 11.0]] and log_det.tolist() == [0.0]
    assert order.inverse(y).value.tolist() == [[10.0, 11.0, 12.0]]
    with pytest.raises(ValueError, match=r"every column once, got \[0, 0\]"):
        Permute(torch.tensor([0, 0]))


def test_another_base_is_used_for_the_density_and_for_samples():
    base = D.Independent(D.Uniform(torch.zeros(2), torch.ones(2)), 1)
    flow = Flow(actnorm([0.0, 0.0], [math.log(4)] * 2).float(), (2,), base)
    assert flow.log_prob(torch.full((1, 2), 0.1)).item() == pytest.approx(math.log(16))
    samples = flow.sample(500)
    assert samples.min() >= 0 and 0.2 < samples.max() <= 0.25


def test_temperature_scales_the_noise_and_seeds_repeat_it():
    flow = Flow(actnorm([0.0, 0.0], [0.0, 0.0]), (2,))
    one, half = (
        flow.sample(3, temperature=t, generator=torch.Generator().manual_seed(5)) for t in (1, 0.5)
    )
    torch.testing.assert_close(half, one / 2)
    assert one.dtype == torch.float64
    with pytest.raises(ValueError, match="not negative, got -1"):
        flow.sample(1, temperature=-1)


def test_the_loss_is_a_sum_and_a_count():
    total, count = negative_log_likelihood(Flow(actnorm([0.0, 0.0], [0.0, 0.0]), (2,)), X)
    expected = -stats.multivariate_normal(mean=[0, 0]).logpdf(X.numpy()).sum()
    assert count == 3 and total.item() == pytest.approx(expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_data_that_are_not_finite_are_named(bad):
    x = X.clone()
    x[1, 0] = bad
    with pytest.raises(ValueError, match=f"data must be finite: row 1 holds {bad}"):
        Flow(actnorm([0.0, 0.0], [0.0, 0.0]), (2,)).log_prob(x)


def test_a_likelihood_that_is_not_finite_is_named():
    """A scale of zero: nothing that the base has seen could have come from there."""
    with pytest.raises(ValueError, match="log density must be finite: row 0 holds -inf"):
        Flow(actnorm([0.0, 0.0], [-math.inf, 0.0]), (2,)).log_prob(X)


def test_data_outside_the_bases_support_are_named():
    base = D.Independent(D.Uniform(torch.zeros(2), torch.ones(2), validate_args=False), 1)
    flow = Flow(actnorm([0.0, 0.0], [0.0, 0.0]).float(), (2,), base)
    with pytest.raises(ValueError, match="log density must be finite: row 0 holds -inf"):
        flow.log_prob(X.float())


def test_a_bijection_without_an_inverse_says_so():
    class OneWay(Bijection):
        def forward(self, x):
            return Mapped(x, x.new_zeros(len(x)))

    assert Flow(OneWay(), (2,)).log_prob(X.float()).shape == (3,)
    with pytest.raises(NotImplementedError):
        Flow(OneWay(), (2,)).sample(1)
