"""The flow's likelihood against the mixture's, to 1e-4, and its path against scipy's solver."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from implementations.generative.flow_likelihood import flow_log_likelihood
from implementations.generative.gaussian_mixture import ring
from implementations.generative.samplers import SAMPLERS, sample
from implementations.generative.schedules import SCHEDULES


@pytest.mark.parametrize("start", [(1.0, 0.1), (0.8, 0.6)])
def test_equals_the_mixtures_density(start):
    mixture = ring()
    x = mixture.noised(*start).sample(30, torch.Generator().manual_seed(0))[0]
    options = {"mean": mixture.moments()[0], "steps": 120, "highest": 1000.0}
    found = flow_log_likelihood(mixture.denoised, x, start, **options)
    exact = mixture.noised(*start).log_density(x)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


def test_probes_are_right_on_average():
    """A mean over 400 draws of one probe, within 5 standard errors of the exact trace."""
    mixture, start = ring(), (1.0, 0.5)
    x = torch.tensor([[1.0, 0.4]], dtype=torch.float64)
    options = {"mean": mixture.moments()[0], "steps": 30}
    exact = flow_log_likelihood(mixture.denoised, x, start, **options)
    many = flow_log_likelihood(mixture.denoised, x.expand(400, 2), start, probes=1, **options)
    assert many.std() > 1e-3
    assert (many.mean() - exact).abs() < 5 * many.std() / 20


def test_the_probability_flow_is_what_scipy_solves():
    """dx/dt = f x - g² score / 2 in the schedule's time, as Song et al. write it."""
    mixture, curve = ring(), SCHEDULES["linear"]
    x = torch.tensor([[0.3, -1.2]], dtype=torch.float64)

    def change(time, flat):
        level = curve.level(float(time))
        f = level.alpha_rate / level.alpha
        g_squared = 2 * level.sigma * (level.sigma_rate - f * level.sigma)
        place = torch.from_numpy(np.array(flat)).reshape(1, 2)
        score = mixture.noised(level.alpha, level.sigma).score(place)
        return (f * place - g_squared * score / 2).flatten().numpy()

    solved = solve_ivp(change, (0.9, 0.05), x.flatten().numpy(), rtol=1e-8, atol=1e-10)
    ours = sample(mixture.denoised, x, curve.grid_by_log_snr(600, 0.05, 0.9), SAMPLERS["heun"])
    torch.testing.assert_close(ours[0], torch.from_numpy(solved.y[:, -1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.0, 400.0])
def test_bad_start(sigma):
    with pytest.raises(ValueError, match=f"got alpha 1.0 and sigma {sigma}"):
        flow_log_likelihood(ring().denoised, torch.zeros(1, 2), (1.0, sigma))


@pytest.mark.usefixtures("unchecked")
def test_pictures_are_laid_out_in_one_row():
    with pytest.raises(ValueError, match=r"in one row, got \(2, 1, 2, 2\)"):
        flow_log_likelihood(lambda x, alpha, sigma: 0 * x, torch.zeros(2, 1, 2, 2), (0.5, 1.0))


def test_without_data_the_density_is_the_noises():
    """A denoiser that always says 0: x is normal with variance s² at every level."""
    x = torch.randn(5, 3, dtype=torch.float64)
    found = flow_log_likelihood(lambda x, alpha, sigma: 0 * x, x, (0.5, 1.0), steps=400)
    wanted = torch.distributions.Normal(0, 1.0).log_prob(x).sum(1)
    assert math.isfinite(found.sum())
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
