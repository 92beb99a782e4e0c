"""Every sampler against the exact flow, the exact moments, and diffusers' schedulers."""

import math

import pytest
import torch

from implementations.generative.diffusion import ddpm_step, parts_of
from implementations.generative.gaussian_mixture import Mixture, ring, transport
from implementations.generative.samplers import SAMPLERS, sample
from implementations.generative.schedules import SCHEDULES, levels_of_betas, linear_betas

ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpm++": 2}


@pytest.fixture
def line():
    parts = ([0.3, 0.7], [[-1.0], [0.8]], [[[0.04]], [[0.09]]])
    return Mixture(*(torch.tensor(part, dtype=torch.float64) for part in parts))


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("schedule", ["cosine", "straight"])
def test_order_of_convergence(name, schedule, line):
    """Measured on halved steps against the flow that keeps the distribution function."""
    curve = SCHEDULES[schedule]
    start, end = curve.level(0.95), curve.level(0.05)
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    exact = transport(line, x, start[:2], end[:2])
    errors = []
    for steps in (160, 320):
        levels = curve.grid_by_log_snr(steps, 0.05, 0.95)
        found = sample(line.denoised, x, levels, SAMPLERS[name])
        errors.append((found - exact).abs().mean().item())
    assert errors[1] < 0.05
    # What is left of the next order's term: a quarter at these steps, and no method is off by one.
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_mixtures_moments(name):
    """Mean and second moments of 4,000 samples within 5 standard errors; steps' bias is below."""
    mixture, generator = ring(), torch.Generator().manual_seed(0)
    curve = SCHEDULES["cosine"]
    ends = curve.time_of(torch.tensor([-13.8, 8.0], dtype=torch.float64)).tolist()
    levels = curve.grid_by_log_snr(250, ends[1], ends[0])
    noise = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    made = sample(mixture.denoised, noise, levels, SAMPLERS[name], generator)
    mean, covariance = mixture.noised(levels[-1].alpha, levels[-1].sigma).moments()
    products = ((made - mean)[:, :, None] * (made - mean)[:, None]).flatten(1)
    for values, wanted in ((made, mean), (products, covariance.flatten())):
        error = values.std(0) / len(values) ** 0.5
        assert ((values.mean(0) - wanted).abs() < 5 * error).all()


def test_ancestral_sampling_is_ddpm_step_by_step():
    betas, generator = linear_betas(20, last=0.3), torch.Generator().manual_seed(0)
    mixture, x = ring(), torch.randn(6, 2, dtype=torch.float64)
    levels = levels_of_betas(betas)
    made = sample(mixture.denoised, x, levels, SAMPLERS["ddpm"], generator)
    generator.manual_seed(0)
    for step, level in zip(range(20, 0, -1), levels, strict=False):
        data = mixture.denoised(x, level.alpha, level.sigma)
        noise = (x - level.alpha * data) / level.sigma
        fresh = torch.zeros_like(x)
        if step > 1:
            fresh = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = ddpm_step(betas, step, x, noise, fresh)
    torch.testing.assert_close(made, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_adds_no_noise(name):
    """To a level without noise: what comes out is the last guess of the data."""
    mixture, seen = ring(), []
    x = torch.randn(6, 2, dtype=torch.float64)
    levels = SCHEDULES["cosine"].grid(8, 0.0, 0.95)
    made = sample(mixture.denoised, x, levels, SAMPLERS[name], watch=lambda *now: seen.append(now))
    assert torch.equal(made, seen[-1][2])
    assert len(seen) == 8


def test_euler_on_straight_lines_is_ddim():
    mixture, x = ring(), torch.randn(6, 2, dtype=torch.float64)
    levels = SCHEDULES["straight"].grid(9)
    made = [sample(mixture.denoised, x, levels, SAMPLERS[name]) for name in ("euler", "ddim")]
    torch.testing.assert_close(*made, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_schedules_are_one_path(name):
    """Divided by alpha, and at the same log SNR, cosine and edm are the same way."""
    mixture, found = ring(), []
    y = torch.randn(6, 2, dtype=torch.float64)
    for schedule in ("cosine", "edm"):
        curve = SCHEDULES[schedule]
        ends = curve.time_of(torch.tensor([-5.0, 5.0], dtype=torch.float64)).tolist()
        levels = curve.grid_by_log_snr(11, ends[1], ends[0])
        made = sample(mixture.denoised, levels[0].alpha * y, levels, SAMPLERS[name])
        found.append(made / levels[-1].alpha)
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def theirs_in_steps(scheduler, noise_of, x, steps):
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        x = scheduler.step(noise_of(x, int(timestep)), timestep, x).prev_sample
    return x


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_steps_are_diffusers(name):
    """The same betas, and as noise estimate any function of x and the step."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    options = {"timestep_spacing": "trailing", "beta_schedule": "linear"}
    scheduler = {
        "ddim": lambda: DDIMScheduler(1000, clip_sample=False, set_alpha_to_one=True, **options),
        "dpm++": lambda: DPMSolverMultistepScheduler(
            1000, algorithm_type="dpmsolver++", final_sigmas_type="zero", **options
        ),
    }[name]()
    levels, x = levels_of_betas(linear_betas(1000), 20), torch.randn(5, 3)
    log_snrs = [level.log_snr for level in levels_of_betas(linear_betas(1000))]

    def noise_of(x, timestep):
        return torch.sin(x) * (0.5 + 0.4 * timestep / 1000)

    def denoise(x, alpha, sigma):
        wanted = 2 * math.log(alpha / sigma)
        place = min(range(1000), key=lambda index: abs(log_snrs[index] - wanted))
        return parts_of("noise", noise_of(x, 999 - place), x, alpha, sigma).data

    ours = sample(denoise, x.double(), levels, SAMPLERS[name])
    theirs = theirs_in_steps(scheduler, noise_of, x, 20)
    # They keep their tables in float32; x is of size one to ten here.
    torch.testing.assert_close(ours, theirs.double(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "levels, name, sentence",
    [
        (SCHEDULES["cosine"].grid(3, 0.1, 0.9)[::-1], "ddim", "noise falls from level to level"),
        (SCHEDULES["cosine"].grid(3, 0.1, 0.9)[:1], "ddim", "two levels at least, got 1"),
        (levels_of_betas(linear_betas(5)), "heun", "follows a clock"),
        (SCHEDULES["straight"].grid(2), "sde", "divides by alpha"),
    ],
)
def test_bad_levels(levels, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample(ring().denoised, torch.zeros(1, 2, dtype=torch.float64), levels, SAMPLERS[name])


def test_a_guess_of_another_size_is_refused():
    """Broadcasting would turn one guess into everybody's."""
    with pytest.raises(ValueError, match=r"as large as x, got \(1, 3\) for \(4, 3\)"):
        sample(
            lambda x, alpha, sigma: x[:1],
            torch.zeros(4, 3),
            SCHEDULES["cosine"].grid(2),
            SAMPLERS["ddim"],
        )


@pytest.mark.parametrize("name", SAMPLERS)
def test_who_watches_sees_each_level_with_its_x_and_its_guess(name):
    """The level that is left, not the one that comes."""
    mixture, levels, seen = ring(), SCHEDULES["cosine"].grid(6, 0.0, 0.95), []
    x = torch.randn(3, 2, dtype=torch.float64)
    sample(mixture.denoised, x, levels, SAMPLERS[name], watch=lambda *now: seen.append(now))
    assert [level for level, _, _ in seen] == levels[:-1]
    assert torch.equal(seen[0][1], x)
    for level, noisy, guess in seen:
        assert torch.equal(guess, mixture.denoised(noisy, level.alpha, level.sigma))
