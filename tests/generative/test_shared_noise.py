"""One noise for all pixels: its best size, what a sum of squares means, and where it goes."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import nn

from implementations.generative.likelihoods import gaussian_log_likelihood
from implementations.generative.shared_noise import SharedNoise, best_variance
from implementations.generative.vae import VAE


def test_best_variance_is_where_scipys_minimizer_ends():
    """scipy's own density and its bounded minimizer, asked for 1e-10; it ends within 1e-6."""
    x, mean = torch.randn(2, 40, 7, dtype=torch.float64)

    def loss(log_variance):
        return -norm.logpdf(x.numpy(), mean.numpy(), math.exp(log_variance / 2)).sum()

    found = minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-10})
    assert math.exp(found.x) == pytest.approx(best_variance(x, mean).item(), rel=1e-6)


def test_a_sum_of_squared_errors_is_a_variance_of_one_half():
    """-log N - constant = |x - mean|² for σ² = ½, and the mean over 64 pixels for σ² = 32."""
    x, mean = torch.randn(2, 3, 64, dtype=torch.float64)
    squares = (x - mean).square()
    for variance, error in ((0.5, squares.sum(-1)), (32.0, squares.mean(-1))):
        log_variance = torch.full((64,), math.log(variance), dtype=torch.float64)
        constant = 32 * math.log(2 * math.pi * variance)
        loss = -gaussian_log_likelihood(x, mean, log_variance) - constant
        torch.testing.assert_close(loss, error, rtol=1e-10, atol=1e-10)


def test_every_pixel_has_the_mean_of_the_network_and_one_variance():
    decoder = SharedNoise(nn.Linear(2, 5), 0.25)
    vae = VAE(nn.Linear(5, 4), decoder, "gaussian", levels=2)
    z = torch.randn(3, 2)
    outputs = vae.outputs(z)
    assert torch.equal(outputs[..., 0], decoder.mean(z)) and torch.equal(
        vae.mean(z), decoder.mean(z)
    )
    assert outputs[..., 1].exp().flatten().tolist() == pytest.approx([0.25] * 15)


@pytest.mark.parametrize("learnt", [True, False])
def test_learnt_noise_ends_at_the_mean_squared_error(learnt):
    """Gradient steps on σ² alone; fixed noise stays. Adam's last steps move it by 1e-3."""
    decoder = SharedNoise(nn.Linear(1, 3), 1.0, learnt=learnt)
    vae = VAE(nn.Linear(3, 2), decoder, "gaussian", levels=2)
    x, z = 0.2 * torch.randn(100, 3), torch.zeros(100, 1)
    decoder.mean.requires_grad_(False)
    if learnt:
        optimizer = torch.optim.Adam([decoder.log_variance], 0.05)
        for _ in range(300):
            optimizer.zero_grad()
            (-vae.log_likelihood(x, z).mean()).backward()
            optimizer.step()
    expected = best_variance(x, decoder.mean(z)).item() if learnt else 1.0
    assert decoder.log_variance.exp().item() == pytest.approx(expected, rel=0.01)
    assert decoder.log_variance.requires_grad == learnt


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf])
def test_a_variance_that_is_none_is_refused(variance):
    with pytest.raises(ValueError, match=f"positive variance, got {variance}"):
        SharedNoise(nn.Identity(), variance)
