"""Flow matching is the straight schedule: its velocity is the probability flow of the mixture."""

import pytest
import torch

from implementations.generative.flow_matching import (
    flow_matching_loss,
    integrate,
    logit_normal_times,
    on_the_line,
    velocity_of,
)
from implementations.generative.gaussian_mixture import Mixture, transport
from implementations.generative.samplers import SAMPLERS, sample
from implementations.generative.schedules import SCHEDULES


@pytest.fixture
def line():
    parts = ([0.3, 0.7], [[-1.0], [0.8]], [[[0.04]], [[0.09]]])
    return Mixture(*(torch.tensor(part, dtype=torch.float64) for part in parts))


def at_one_time(mixture):
    """A denoiser of batches that all stand at the same time."""

    def denoise(x, alpha, sigma):
        alpha, sigma = (
            torch.as_tensor(n, dtype=x.dtype).flatten()[0].item() for n in (alpha, sigma)
        )
        return mixture.denoised(x, alpha, sigma)

    return denoise


def test_the_line_by_hand():
    data, noise = torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [5.0]])
    assert on_the_line(data, noise, torch.tensor([0.0, 0.25])).tolist() == [[1.0], [2.0]]


def test_velocity_moves_along_the_exact_flow(line):
    """The slope of the transport between two near times."""
    x, time, step = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None], 0.4, 1e-5
    ends = [transport(line, x, (0.6, 0.4), (1 - t, t)) for t in (time - step, time + step)]
    slope = (ends[1] - ends[0]) / (2 * step)
    found = velocity_of(at_one_time(line))(x, torch.full((7,), time, dtype=torch.float64))
    torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-6)


def test_eulers_method_is_ddim(line):
    noise = torch.randn(9, 1, dtype=torch.float64)
    ours = integrate(velocity_of(at_one_time(line)), noise, 12)
    ddim = sample(line.denoised, noise, SCHEDULES["straight"].grid(12), SAMPLERS["ddim"])
    torch.testing.assert_close(ours, ddim, rtol=1e-9, atol=1e-9)


def test_loss_is_smallest_at_the_mean_velocity(line):
    """Of the true velocity, scaled: the mean over 40,000 pairs is smallest at 1."""
    data, _ = line.sample(40_000, torch.Generator().manual_seed(0))
    noise = torch.randn_like(data)
    time = torch.full((len(data),), 0.5, dtype=torch.float64)
    velocity = velocity_of(at_one_time(line))
    losses = [
        flow_matching_loss(lambda x, t, k=k: k * velocity(x, t), data, noise, time).mean()
        for k in (0.9, 1.0, 1.1)
    ]
    assert losses[1] < losses[0] and losses[1] < losses[2]
    wrong = flow_matching_loss(lambda x, t: -velocity(x, t), data, noise, time).mean()
    assert wrong > losses[0]


def test_times_prefer_the_middle():
    times = logit_normal_times(20_000, torch.Generator().manual_seed(0))
    assert times.min() > 0 and times.max() < 1
    inside = ((times > 0.25) & (times < 0.75)).double().mean().item()
    # P(|normal| < log 3), and 5 standard errors.
    assert inside == pytest.approx(0.7281, abs=5 * (0.73 * 0.27 / 20_000) ** 0.5)


def test_no_steps():
    with pytest.raises(ValueError, match="a step at least, got 0"):
        integrate(lambda x, t: x, torch.zeros(1, 1), 0)
