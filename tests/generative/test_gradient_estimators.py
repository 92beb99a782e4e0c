"""Gradient estimators: unbiased against closed forms, and as noisy as the formulas say."""

import pytest
import torch

from implementations.generative.diagonal_gaussian import DiagonalGaussian
from implementations.generative.gradient_estimators import (
    leave_one_out_gradients,
    reparameterized_gradients,
    score_function_gradients,
    variances_of_a_parabola,
)

SAMPLES = 200_000


def cubic(z):
    """E of Σ z³ + z_0 z_1 has the gradient 3 (mean² + variance), plus the other's mean."""
    return z.pow(3).sum(-1) + z[:, 0] * z[:, 1]


def parabola(z):
    return z.square().sum(-1) / 2


ESTIMATORS = {
    "reparameterized": reparameterized_gradients,
    "score function": score_function_gradients,
    "with a baseline": lambda *a: score_function_gradients(*a, baseline=3.0),
    "leave one out": leave_one_out_gradients,
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_unbiased_for_a_gradient_known_in_closed_form(name):
    """Mean of 200,000 within 4.5 standard errors: false alarm 7e-6 for each of two coordinates.

    Leave-one-out samples are correlated by 1/n only, so the same standard error holds.
    """
    mean, log_variance = torch.tensor([0.5, -1.0]), torch.tensor([-0.4, 0.3])
    q = DiagonalGaussian(mean.double(), log_variance.double())
    expected = 3 * (q.mean.square() + q.log_variance.exp()) + q.mean.flip(0)
    gradients = ESTIMATORS[name](cubic, q, torch.randn(SAMPLES, 2, dtype=torch.float64))
    error = gradients.std(0) / SAMPLES**0.5
    assert ((gradients.mean(0) - expected).abs() < 4.5 * error).all()


@pytest.mark.parametrize("latent", [1, 4, 25])
def test_variances_are_those_of_the_closed_form(latent):
    """Within 4 %: the relative error of a variance over 200,000 samples and all coordinates is
    below 1 % (kurtosis below 20 here), so the false-alarm rate is below 1e-4.
    """
    q = DiagonalGaussian(torch.zeros(latent).double(), torch.zeros(latent).double())
    noise, theory = torch.randn(SAMPLES, latent).double(), variances_of_a_parabola(latent)
    seen = {
        "reparameterized": reparameterized_gradients(parabola, q, noise),
        "score function": score_function_gradients(parabola, q, noise),
        "its mean as baseline": score_function_gradients(parabola, q, noise, latent / 2),
        "best baseline": score_function_gradients(parabola, q, noise, latent / 2 + 1),
    }
    for name, expected in theory.items():
        assert seen[name].var(0).mean().item() == pytest.approx(expected, rel=0.04), name


def test_variances_by_hand_in_one_coordinate():
    """Moments 1, 3, 15 of a standard normal: Var(½ z³) = 15/4; with b = ½: (15 - 6 + 1)/4;
    with b = 3/2: (15 - 18 + 9)/4.
    """
    assert list(variances_of_a_parabola(1).values()) == [1.0, 15 / 4, 10 / 4, 6 / 4]


def test_no_baseline_is_better_than_the_best():
    noise = torch.randn(SAMPLES, 5).double()
    q = DiagonalGaussian(torch.zeros(5).double(), torch.zeros(5).double())

    def variance(baseline):
        return score_function_gradients(parabola, q, noise, baseline).var(0).mean()

    assert variance(3.5) < min(variance(2.5), variance(4.5))


def test_leaving_one_out_is_the_mean_of_the_others():
    """Three samples by hand, sample by sample."""
    q = DiagonalGaussian(torch.tensor([0.3]).double(), torch.tensor([0.2]).double())
    noise = torch.tensor([[0.5], [-1.0], [2.0]]).double()
    values = parabola(q.at(noise))
    by_hand = [
        (values[i] - (values.sum() - values[i]) / 2) * noise[i] / q.deviation for i in range(3)
    ]
    torch.testing.assert_close(
        leave_one_out_gradients(parabola, q, noise), torch.stack(by_hand), rtol=1e-12, atol=0
    )


def test_the_score_function_needs_no_derivative():
    """A step function: the score estimates the gradient Φ'(mean) of P(z > 0); the sample's
    slope is 0 everywhere, and reparameterization is silently wrong. 4.5 standard errors.
    """
    q = DiagonalGaussian(torch.tensor([0.4]).double(), torch.tensor([0.0]).double())
    noise = torch.randn(SAMPLES, 1).double()
    gradients = score_function_gradients(lambda z: (z[:, 0] > 0).double(), q, noise)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(0.4)).exp()
    assert abs(gradients.mean() - expected) < 4.5 * gradients.std() / SAMPLES**0.5


@pytest.mark.usefixtures("unchecked")
def test_one_sample_cannot_be_left_out():
    q = DiagonalGaussian(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        leave_one_out_gradients(parabola, q, torch.zeros(1, 1))
