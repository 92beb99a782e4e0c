"""The judge: better than chance at digits, its temperature the best one, its verdict in order."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from implementations.generative.diffusion_config import for_device
from implementations.generative.judge import Judge, candidate
from implementations.generative.trained_diffusion import make


@pytest.fixture
def judge(cache):
    return Judge(size=8, steps=60)


def test_a_judge_knows_real_from_noise(judge):
    right = judge.accuracy(judge.test.pixels, judge.test.labels)
    assert right > 0.5
    scores = judge.scores(judge.real)
    best = cross_entropy(scores / judge.temperature, judge.test.labels)
    for factor in (0.8, 1.25):
        assert best <= cross_entropy(scores / (factor * judge.temperature), judge.test.labels)
    theirs = judge.classifier((judge.test.pixels[:20] + 1) / 2)
    torch.testing.assert_close(scores[:20], theirs.detach(), rtol=1e-4, atol=1e-4)
    real, noise = judge.floor(300), judge.verdict(torch.rand(300, 1, 8, 8) * 2 - 1)
    assert real.frechet < noise.frechet and real.kernel < noise.kernel
    assert real.precision > noise.precision and real.copied > 0.99 > noise.copied
    assert 0 < judge.kernel_floor(200, draws=4) < noise.kernel


def test_a_candidate_is_asked_for_every_digit_in_turn(cache):
    """And is the model of its settings: the averaged one, unless the last weights are asked."""
    writer = candidate("cpu", 12, 20, size=8, steps=30, batch=8)
    assert [look["step"] for look in writer.trained.history] == [25, 30]
    assert writer.judge.size == 8 and writer.labels.tolist() == [*range(10), 0, 1]
    way = {"sampler": "ddim", "steps": 2}
    made = writer.made(**way)
    assert torch.equal(made, make(writer.trained.model, writer.labels, 12, (1, 8, 8), **way))
    assert not torch.equal(made, writer.made(writer.trained.raw, **way))


def test_zero_stands_for_the_devices_own():
    own = for_device("cpu")
    assert for_device("cpu", size=0, steps=0) == own
    changed = for_device("cpu", size=8, steps=3, labelled=False)
    assert (changed.size, changed.steps, changed.labelled) == (8, 3, False)
    assert changed.widths == own.widths and own.labelled
