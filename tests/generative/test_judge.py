"""The judge: better than chance at digits, its temperature the best one, its verdict in order."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from implementations.generative.judge import Judge


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
