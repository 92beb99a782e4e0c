"""Schedules are the papers' tables, alpha-bar is diffusers', conversions go both ways."""

import math

import pytest
import torch

from implementations.generative.schedules import (
    SCHEDULES,
    Level,
    alpha_bars,
    cosine_betas,
    levels_of_betas,
    linear_betas,
    variance_preserving,
)

TIMES = torch.linspace(0.01, 0.99, 15, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_grows_and_is_found_again(name):
    schedule = SCHEDULES[name]
    log_snr = schedule.log_snr(TIMES)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(schedule.time_of(log_snr), TIMES, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_the_slopes(name):
    schedule, step = SCHEDULES[name], 1e-5
    for time in (0.1, 0.5, 0.9):
        level = schedule.level(time)
        low, high = schedule.level(time - step), schedule.level(time + step)
        assert level.alpha_rate == pytest.approx((high.alpha - low.alpha) / (2 * step), abs=1e-6)
        slope = (high.sigma - low.sigma) / (2 * step)
        assert level.sigma_rate == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "even"])
def test_variance_is_preserved(name):
    schedule = SCHEDULES[name]
    square = schedule.alpha(TIMES) ** 2 + schedule.sigma(TIMES) ** 2
    torch.testing.assert_close(square, torch.ones_like(square), rtol=1e-12, atol=0)
    alpha, sigma = variance_preserving(schedule.log_snr(TIMES))
    torch.testing.assert_close(alpha, schedule.alpha(TIMES), rtol=1e-9, atol=0)
    torch.testing.assert_close(sigma, schedule.sigma(TIMES), rtol=1e-9, atol=0)


def test_the_ends_by_hand():
    edm = SCHEDULES["edm"].grid(2)
    middle = ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7
    assert [level.sigma for level in edm] == pytest.approx([80.0, middle, 0.002], rel=1e-12)
    half = SCHEDULES["straight"].level(0.25)
    assert half[:5] == pytest.approx((0.75, 0.25, 0.25, -1.0, 1.0))
    assert SCHEDULES["cosine"].level(1.0).alpha < 1e-15
    assert SCHEDULES["even"].log_snr(torch.tensor(0.25).double()).item() == pytest.approx(6.0)


def test_the_linear_schedule_is_ddpms_betas_in_small_steps():
    """-log alpha_bar over its last thousandth is beta_T of 1,000 steps from 1e-4 to 0.02."""
    ours = SCHEDULES["linear"].alpha(torch.tensor([0.999, 1.0]).double()) ** 2
    assert -ours.log().diff().item() == pytest.approx(0.02, rel=1e-3)


def test_betas_are_diffusers():
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    for ours, name in ((linear_betas(1000), "linear"), (cosine_betas(1000), "squaredcos_cap_v2")):
        theirs = DDPMScheduler(1000, beta_schedule=name)
        torch.testing.assert_close(ours, theirs.betas.double(), rtol=1e-4, atol=1e-7)
        bars = theirs.alphas_cumprod.double()
        torch.testing.assert_close(alpha_bars(ours), bars, rtol=2e-3, atol=1e-7)


def test_alpha_bar_by_hand():
    bars = alpha_bars(torch.tensor([0.1, 0.5], dtype=torch.float64))
    torch.testing.assert_close(bars, torch.tensor([0.9, 0.45], dtype=torch.float64))


def test_levels_of_betas_end_at_the_data_and_begin_at_the_last_step():
    betas = linear_betas(10)
    bars = alpha_bars(betas)
    levels = levels_of_betas(betas)
    assert len(levels) == 11 and levels[-1][:2] == (1.0, 0.0)
    assert levels[0].alpha == pytest.approx(math.sqrt(bars[-1]), rel=1e-12)
    assert levels[0].sigma == pytest.approx(math.sqrt(1 - bars[-1]), rel=1e-12)
    few = levels_of_betas(betas, 5)
    assert [level.alpha**2 for level in few[:-1]] == pytest.approx(bars[[9, 7, 5, 3, 1]].tolist())


def test_a_level_without_noise_or_without_data_has_no_finite_log_snr():
    assert Level(1.0, 0.0).log_snr == math.inf and Level(0.0, 1.0).log_snr == -math.inf


def test_grids_by_log_snr_are_even():
    levels = SCHEDULES["cosine"].grid_by_log_snr(4, 0.1, 0.9)
    steps = torch.tensor([level.log_snr for level in levels]).diff()
    torch.testing.assert_close(steps, steps.mean().expand(4), rtol=1e-6, atol=0)
    assert (levels[0].time, levels[-1].time) == (0.9, 0.1)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: SCHEDULES["cosine"].level(1.5), "from t = 0 to t = 1, got 1.5"),
        (lambda: SCHEDULES["cosine"].grid(0), "at least one step"),
        (lambda: SCHEDULES["cosine"].grid(5, last=0.5, first=0.2), "from noise to data"),
        (lambda: alpha_bars(torch.tensor([0.1, 1.0])), "between 0 and 1"),
        (lambda: alpha_bars(torch.tensor([0.1, -0.1])), "between 0 and 1"),
        (lambda: levels_of_betas(linear_betas(10), 11), "all 10 steps can be taken, got 11"),
        (lambda: alpha_bars(torch.full((10,), 1e-9)), "1 - beta in torch.float32 too, got"),
        (lambda: SCHEDULES["cosine"].grid_by_log_snr(3, 0.0), "finite ends, got .* and inf at 0.0"),
        (lambda: SCHEDULES["straight"].grid_by_log_snr(3, 0.1), "finite ends, got -inf at t = 1.0"),
        (lambda: SCHEDULES["cosine"].time_of(torch.tensor([math.nan])), "not a number"),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
