"""The judge: better than chance at digits, its temperature the best one, its verdict in order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from torch import nn
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


@pytest.fixture
def by_hand():
    """A judge without training: a picture is a row of three pixels, which are its features."""
    judge = object.__new__(Judge)
    head = nn.Linear(3, 10).requires_grad_(False)
    rows = {"stages": lambda unit: unit.reshape(-1, 3, 1, 1), "head": head}
    judge.size, judge.device, judge.temperature = 3, "cpu", 0.2
    judge.classifier = SimpleNamespace(**rows)
    train, test = (torch.rand(count, 1, 1, 3) * 2 - 1 for count in (60, 50))
    judge.train, judge.test = SimpleNamespace(pixels=train), SimpleNamespace(pixels=test)
    judge.real = judge.features(test)
    return judge


def unit(pixels):
    """What `by_hand` sees in pictures, in numpy."""
    return (pixels.reshape(-1, 3).double().numpy() + 1) / 2


def mmd(a, b):
    """The kernel distance without bias, by scikit-learn's kernel."""
    own = [polynomial_kernel(points, degree=3, gamma=1 / 3, coef0=1) for points in (a, b)]
    among = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in own]
    return sum(among) - 2 * polynomial_kernel(a, b, degree=3, gamma=1 / 3, coef0=1).mean()


def test_a_verdict_is_scikit_learns(by_hand):
    """Made pictures are a corner of the real ones: what is made is real, but not all is made."""
    made = torch.rand(40, 1, 1, 3) - 0.2
    features, real, train = (unit(p) for p in (made, by_hand.test.pixels, by_hand.train.pixels))

    def inside(points, among):
        radii = NearestNeighbors(n_neighbors=4).fit(among).kneighbors(among)[0][:, 3]
        apart = np.linalg.norm(points[:, None] - among[None], axis=2)
        return (apart <= radii).any(1).mean()

    found = by_hand.verdict(made)
    assert found.precision == pytest.approx(inside(features, real))
    assert found.recall == pytest.approx(inside(real, features))
    assert found.precision > found.recall + 0.3
    assert found.kernel == pytest.approx(mmd(real, features), abs=1e-6)
    apart = NearestNeighbors(n_neighbors=1).fit(train)
    limit = np.quantile(apart.kneighbors(real)[0], 0.05)
    assert found.copied == pytest.approx((apart.kneighbors(features)[0] < limit).mean())
    scores = features @ by_hand.classifier.head.weight.double().numpy().T
    scores = (scores + by_hand.classifier.head.bias.double().numpy()) / 0.2
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    sure = (shares.max(1) > 0.9).mean()
    assert 0 < sure < 1 and found.confident == pytest.approx(sure)


def test_half_of_the_classes_are_precise_and_recalled_by_half(by_hand):
    by_hand.test.pixels = torch.cat(
        (torch.rand(20, 1, 1, 3) / 9, 0.8 + torch.rand(20, 1, 1, 3) / 9)
    )
    by_hand.real = by_hand.features(by_hand.test.pixels)
    found = by_hand.verdict(by_hand.test.pixels[:20] + 1e-3)
    assert found.precision == 1.0
    assert found.recall == pytest.approx(0.5)


def test_the_size_of_chance_is_that_between_training_and_test_digits(by_hand):
    """The root of a mean of squares, by scikit-learn's kernel on the same draws."""
    by_hand.train.pixels = by_hand.train.pixels / 2  # so that it matters between which sets
    train, real = unit(by_hand.train.pixels), unit(by_hand.test.pixels)
    assert by_hand.kernel_floor(60, draws=2) == pytest.approx(abs(mmd(train, real)), abs=1e-6)
    generator, squares = torch.Generator().manual_seed(0), []
    for _ in range(5):
        first, second = (torch.randperm(count, generator=generator)[:20] for count in (60, 50))
        squares.append(mmd(train[first], real[second]) ** 2)
    assert by_hand.kernel_floor(20, draws=5) == pytest.approx(np.mean(squares) ** 0.5, abs=1e-6)
