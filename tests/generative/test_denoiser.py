"""The denoiser around an exact network: every kind gives the mixture's guess on every schedule."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from implementations.generative.denoiser import (
    Denoiser,
    asked,
    dequantized,
    generate,
    levels_for,
    log_snr_at,
    to_signed,
    to_unit,
    training_loss,
)
from implementations.generative.diffusion import Parts, loss_ratio, target
from implementations.generative.samplers import SAMPLERS
from implementations.generative.schedules import SCHEDULES

KINDS = ("data", "noise", "v", "flow")
MEAN, DEVIATION = 0.3, 0.5


class Exact(nn.Module):
    """The best network for pixels that are N(0.3, 0.25), each by itself."""

    config = SimpleNamespace(classes=0)

    def __init__(self, kind):
        super().__init__()
        self.kind, self.dropout = kind, nn.Dropout(0.5)

    def forward(self, x, position, labels=None):
        angle = position.reshape(-1, 1, 1, 1) * math.pi / 2
        alpha, sigma = angle.cos(), angle.sin()
        variance = alpha**2 * DEVIATION**2 + sigma**2
        data = MEAN + alpha * DEVIATION**2 / variance * (x - alpha * MEAN)
        parts = Parts(data, (x - alpha * data) / sigma)
        return self.dropout(target(self.kind, parts, alpha, sigma))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha, sigma", [(0.6, 0.8), (1.0, 3.0), (0.3, 0.7)])
def test_the_guess_does_not_depend_on_kind_or_schedule(kind, alpha, sigma):
    x = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    numbers = [torch.full((4,), n, dtype=torch.float64) for n in (alpha, sigma)]
    _, parts = Denoiser(Exact(kind), kind).eval()(x, *numbers)
    variance = alpha**2 * DEVIATION**2 + sigma**2
    wanted = MEAN + alpha * DEVIATION**2 / variance * (x - alpha * MEAN)
    torch.testing.assert_close(parts.data, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_the_best_network_is_the_posteriors_variance(kind):
    """In the data's currency: deviation² sigma² / (alpha² deviation² + sigma²), 5 errors wide."""
    denoiser, generator = Denoiser(Exact(kind), kind).eval(), torch.Generator().manual_seed(0)
    noise = torch.randn(500, 1, 4, 4, generator=generator, dtype=torch.float64)
    data = torch.randn(noise.shape, generator=generator, dtype=torch.float64)
    data = MEAN + DEVIATION * data
    log_snr = torch.full((500,), 1.2, dtype=torch.float64)
    alpha, sigma = log_snr[0].sigmoid().sqrt(), (-log_snr[0]).sigmoid().sqrt()
    wanted = DEVIATION**2 * sigma**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    losses = training_loss(denoiser, data, noise, log_snr, measured="data")
    assert (losses.mean() - wanted).abs() < 5 * losses.std() / 500**0.5
    own = training_loss(denoiser, data, noise, log_snr)
    ratio = loss_ratio(kind, "data", alpha, sigma)
    torch.testing.assert_close(losses, own * ratio, rtol=1e-9, atol=0)


def test_sampling_switches_dropout_off():
    """A network in training mode, asked twice: the same pictures, and those of eval mode."""
    denoiser, noise = Denoiser(Exact("v"), "v").train(), torch.randn(3, 1, 2, 2)
    way = (noise, SCHEDULES["cosine"], 6, SAMPLERS["ddim"])
    first, again = generate(denoiser, *way), generate(denoiser.train(), *way)
    assert torch.equal(first, again)


def test_made_pixels_have_the_datas_mean_and_deviation():
    """2,000 pixels of a narrow normal; the guess is cut to [-1, 1], which hardly touches it."""
    noise = torch.randn(500, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for name in ("ddpm", "dpm++"):
        made = generate(Denoiser(Exact("v"), "v"), noise, SCHEDULES["cosine"], 60, SAMPLERS[name])
        # Of the cut normal: mean 0.29 and deviation 0.47, and steps that are not infinitely many.
        assert made.mean().item() == pytest.approx(0.29, abs=0.05)
        assert made.std().item() == pytest.approx(0.47, abs=0.05)


def test_pixels_are_scaled_and_back():
    levels = torch.tensor([0, 128, 255], dtype=torch.uint8)
    signed = to_signed(levels, 256)
    assert signed.tolist() == pytest.approx([-1.0, 1 / 255, 1.0], abs=1e-6)
    assert (to_unit(signed) * 255).tolist() == pytest.approx([0, 128, 255], abs=1e-3)
    assert to_unit(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]


def test_dequantized_levels_fill_the_range_evenly():
    signed = to_signed(torch.tensor([0, 3], dtype=torch.uint8), 4)
    low, high = (dequantized(signed, 4, torch.full((2,), u)) for u in (0.0, 1.0))
    assert low.tolist() == pytest.approx([-1.0, 0.5])
    assert high.tolist() == pytest.approx([-0.5, 1.0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_ways_stay_where_the_network_was_trained(name):
    levels = levels_for(SCHEDULES[name], 7)
    assert len(levels) == 8 and levels[-1].sigma == 0
    assert all(-12.01 < level.log_snr < 12.01 for level in levels[:-1])
    assert log_snr_at(SCHEDULES[name], torch.tensor([0.0, 1.0])).abs().max() <= 12


@pytest.mark.parametrize("steps", [1, 100, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_any_number_of_steps_is_a_way(name, steps):
    """Where even steps would be shorter than the quietest level is away from none, too."""
    levels = levels_for(SCHEDULES[name], steps)
    assert len(levels) == steps + 1
    log_snrs = [level.log_snr for level in levels]
    assert all(a < b for a, b in pairwise(log_snrs))
    times = torch.tensor([level.time for level in levels[:-1]])
    torch.testing.assert_close(times.diff(), times.diff().mean().expand(steps - 1))
    assert max(log_snrs[:-1]) < 12.01


def test_a_way_without_steps():
    with pytest.raises(ValueError, match="one step at least, got 0"):
        levels_for(SCHEDULES["cosine"], 0)


def test_guidance_without_labels():
    with pytest.raises(ValueError, match=r"guidance by 2\.0 needs labels to follow"):
        asked(Denoiser(Exact("v"), "v"), None, 2.0)
    with pytest.raises(ValueError, match="this one has none"):
        asked(Denoiser(Exact("v"), "v"), torch.zeros(1, dtype=torch.long), 2.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_both_ends_are_the_schedules_own_or_the_networks(name):
    """An edm schedule begins at a sigma of 80, the linear betas at a log SNR of -10.05."""
    noisiest = {"edm": -2 * math.log(80), "linear": -10.05}.get(name, -12)
    found = log_snr_at(SCHEDULES[name], torch.tensor([0.0, 1.0]))
    assert found.tolist() == pytest.approx([12, noisiest], abs=0.01)
    assert levels_for(SCHEDULES[name], 2)[0].log_snr == pytest.approx(noisiest, abs=0.01)


@pytest.mark.parametrize("name", ["edm", "straight"])
def test_many_steps_end_at_the_quietest_level(name):
    """500 even ones would pass it: they begin after 114 and 404 to do so."""
    assert levels_for(SCHEDULES[name], 500)[-2].log_snr == pytest.approx(12, abs=0.01)


class Loud(nn.Module):
    """A network that always answers 0.8 for label 0 and 0.2 without one, and 3 times its size."""

    config = SimpleNamespace(classes=1)

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x, position, labels=None):
        answers = torch.full_like(x, 0.8)
        if labels is not None:
            answers[labels == 1] = 0.2
        return self.size * answers


@pytest.mark.parametrize("size, cut", [(1, 0.8), (-1, -0.8), (3, 1.0), (-3, -1.0)])
def test_guesses_are_cut_to_the_range_of_pixels(size, cut):
    """And guided ones after they are guided: 0.2 + 3 · (0.8 - 0.2) is 2."""
    denoiser, x = Denoiser(Loud(size), "data"), torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(asked(denoiser)(x, 0.6, 0.8), torch.full_like(x, cut))
    labels = torch.zeros(2, dtype=torch.long)
    guided = asked(denoiser, labels, 3.0)(x, 0.6, 0.8)
    torch.testing.assert_close(guided, torch.full_like(x, math.copysign(1, size)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_samples_start_as_noisy_as_the_schedule_does(name):
    """At a sigma of 80 as well: 8,000 pixels of the cut normal, within 5 standard errors."""
    noise = torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    made = generate(Denoiser(Exact("v"), "v"), noise, SCHEDULES[name], 60, SAMPLERS["ddim"])
    quantiles = scipy.stats.norm(MEAN, DEVIATION).ppf((np.arange(8000) + 0.5) / 8000)
    wanted = quantiles.clip(-1, 1)
    error = wanted.std() / 8000**0.5
    assert made.mean().item() == pytest.approx(wanted.mean(), abs=5 * error)
    assert made.std().item() == pytest.approx(wanted.std(), abs=5 * error)
