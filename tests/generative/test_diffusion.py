"""Targets and posteriors against algebra by hand, Bayes' rule, and diffusers' DDPM."""

import math

import pytest
import torch
from torch.distributions import Normal

from implementations.generative.diffusion import (
    TARGETS,
    Parts,
    ddpm_step,
    loss_ratio,
    noised,
    parts_of,
    posterior,
    target,
)
from implementations.generative.gaussian_mixture import ring
from implementations.generative.schedules import Level, alpha_bars, levels_of_betas, linear_betas

LEVELS = [(0.6, 0.8), (0.99, 0.1), (1.0, 3.0), (0.3, 0.7)]


@pytest.fixture
def parts():
    return Parts(*torch.randn(2, 5, 3, dtype=torch.float64))


def test_targets_by_hand(parts):
    data, noise = parts
    wanted = {
        "data": data,
        "noise": noise,
        "v": 0.6 * noise - 0.8 * data,
        "score": -noise / 0.8,
        "flow": noise - data,
    }
    for kind, value in wanted.items():
        torch.testing.assert_close(target(kind, parts, 0.6, 0.8), value)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("alpha, sigma", LEVELS)
def test_every_target_gives_back_what_it_was_made_of(kind, alpha, sigma, parts):
    x = noised(*parts, alpha, sigma)
    found = parts_of(kind, target(kind, parts, alpha, sigma), x, alpha, sigma)
    for ours, wanted in zip(found, parts, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("measured", TARGETS)
def test_losses_differ_by_the_ratio(kind, measured, parts):
    """A wrong answer to one question, read as an answer to another."""
    alpha, sigma = 0.3, 0.7
    x = noised(*parts, alpha, sigma)
    answer = target(kind, parts, alpha, sigma) + torch.randn_like(x)
    own = (answer - target(kind, parts, alpha, sigma)).square().mean()
    read = target(measured, parts_of(kind, answer, x, alpha, sigma), alpha, sigma)
    theirs = (read - target(measured, parts, alpha, sigma)).square().mean()
    ratio = torch.as_tensor(loss_ratio(kind, measured, alpha, sigma), dtype=torch.float64)
    torch.testing.assert_close(theirs / own, ratio, rtol=1e-10, atol=0)


def test_the_best_answer_of_each_kind_is_one_denoiser():
    """E[target | x] of the mixture leads to E[x_0 | x], whatever the target."""
    mixture, (alpha, sigma) = ring(), (0.8, 0.6)
    x = torch.randn(50, 2, dtype=torch.float64)
    denoised, score = mixture.denoised(x, alpha, sigma), mixture.noised(alpha, sigma).score(x)
    best = Parts(denoised, -sigma * score)  # the noise by the score alone
    for kind in TARGETS:
        found = parts_of(kind, target(kind, best, alpha, sigma), x, alpha, sigma)
        torch.testing.assert_close(found.data, denoised, rtol=1e-9, atol=1e-9)


def test_posterior_is_bayes_rule():
    """q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s) q(x_s | x_0), at any x_s."""
    now, then = Level(0.5, 0.8), Level(0.9, 0.4)
    x, data = torch.tensor([[0.7]]).double(), torch.tensor([[-0.4]]).double()
    mean, variance = posterior(x, data, now, then)
    added = math.sqrt(now.sigma**2 - (now.alpha / then.alpha) ** 2 * then.sigma**2)
    for place in (-1.0, 0.2, 1.3):
        s = torch.tensor([[place]]).double()
        left = Normal(mean, math.sqrt(variance)).log_prob(s)
        left = left + Normal(now.alpha * data, now.sigma).log_prob(x)
        right = Normal(now.alpha / then.alpha * s, added).log_prob(x)
        right = right + Normal(then.alpha * data, then.sigma).log_prob(s)
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_at_the_data_the_posterior_is_the_data():
    x, data = torch.randn(2, 3, 2, dtype=torch.float64)
    mean, variance = posterior(x, data, Level(0.5, 0.8), Level(1.0, 0.0))
    assert torch.equal(mean, data) and variance == 0


@pytest.mark.parametrize("step", [1000, 437, 2, 1])
def test_a_step_of_ddpm_is_diffusers(step):
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(1000, clip_sample=False)
    scheduler.betas, scheduler.alphas = (
        linear_betas(1000),
        1 - linear_betas(1000),
    )  # in float64, to compare more than rounding
    scheduler.alphas_cumprod = alpha_bars(linear_betas(1000))
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    x, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    theirs = scheduler.step(noise, step - 1, x, generator=generator).prev_sample
    fresh = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = ddpm_step(linear_betas(1000), step, x, noise, fresh)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_step_of_ddpm_is_a_draw_from_the_posterior():
    betas = linear_betas(1000)
    levels = levels_of_betas(betas)
    for step in (1000, 300, 2, 1):
        now, then = levels[1000 - step], levels[1001 - step]
        x, noise, fresh = torch.randn(3, 4, 3, dtype=torch.float64)
        data = parts_of("noise", noise, x, now.alpha, now.sigma).data
        mean, variance = posterior(x, data, now, then)
        ours = ddpm_step(betas, step, x, noise, fresh)
        torch.testing.assert_close(ours, mean + math.sqrt(variance) * fresh, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("step", [0, 1001, -1])
def test_a_step_out_of_range(step):
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=f"steps count from 1 to 1000, got {step}"):
        ddpm_step(linear_betas(1000), step, x, x, x)


def test_unknown_targets_and_steps_to_more_noise():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="targets are data, noise, v, score, flow, got 'epsilon'"):
        target("epsilon", Parts(x, x), 0.6, 0.8)
    with pytest.raises(ValueError, match="a step leads to less noise"):
        posterior(x, x, Level(0.9, 0.4), Level(0.5, 0.8))
