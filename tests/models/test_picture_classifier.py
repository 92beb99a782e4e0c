"""The shared classifiers: trained once, the same pictures for all, no test picture in training."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import implementations.models.picture_classifier as classifier
from implementations.models.picture_classifier import (
    ClassifierConfig,
    Labelled,
    accuracy,
    loss,
    pictures,
    prepared,
    train_or_load,
    untrained,
)

TINY = ClassifierConfig(
    size=14, patch=7, width=8, layers=1, heads=2, hidden=8, steps=10, batch=4, learning_rate=0.01
)


@pytest.fixture
def few(monkeypatch, cache):
    """Forty pictures of noise instead of MNIST: reading that takes longer than the test."""
    generator = torch.Generator().manual_seed(1)
    known = Labelled(torch.rand(40, 1, 14, 14, generator=generator), torch.arange(40) % 10)
    monkeypatch.setattr(classifier, "pictures", lambda config: (known, known))
    return known


def test_is_trained_once_and_then_read(few, monkeypatch):
    first = train_or_load(TINY)
    assert not first.model.training and 0 < first.seconds < 600
    monkeypatch.setattr(classifier, "augment", None)  # training would fail
    again = train_or_load(TINY)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)
    assert again.seconds == first.seconds


def test_training_changes_every_weight_and_depends_on_the_seed(few):
    start, done = untrained(TINY).state_dict(), train_or_load(TINY).model.state_dict()
    other = train_or_load(replace(TINY, seed=1)).model.state_dict()
    for name in start:
        if not name.endswith("attention.key.bias"):  # softmax does not see it
            assert not torch.equal(start[name], done[name]), name
    assert not torch.equal(done["head.weight"], other["head.weight"])


def test_every_setting_has_its_own_folder(few, cache):
    for config in (TINY, replace(TINY, steps=5), replace(TINY, shuffled=True, steps=5)):
        train_or_load(config)
    assert len(list((cache / "runs").iterdir())) == 3


def test_what_is_learnt_is_seen_augmented(few, monkeypatch):
    """Each batch passes through its set's augmentation, by seed and step, unless told not to."""
    seen = []

    def note(pixels, settings, *, seed, step):
        seen.append((settings, seed, step))
        return pixels

    monkeypatch.setattr(classifier, "augment", note)
    train_or_load(replace(TINY, seed=3, steps=2))
    assert {entry[1:] for entry in seen} >= {(3, 0), (3, 1)}
    assert seen[0][0] == classifier.MOVES["mnist_5k"] and not seen[0][0].flip
    seen.clear()
    train_or_load(replace(TINY, seed=4, steps=2, augmented=False))
    assert not seen


def test_the_loss_by_hand():
    """Ten classes, the right one with score 1 and the others 0: p = e / (e + 9). A tenth of the
    label is spread over all ten, so the right one keeps 0.91."""
    scores = torch.eye(10)[[3, 7]].double()
    total, count = loss(lambda pixels: scores, (torch.zeros(2, 1), torch.tensor([3, 7])))
    everything = math.log(math.e + 9)
    by_hand = 0.91 * (everything - 1) + 0.09 * everything
    assert count == 2 and total.item() == pytest.approx(2 * by_hand, rel=1e-10)


def test_accuracy_counts_the_pictures_that_are_named():
    """A model that answers with the brightest corner's number, right on three of four."""

    class Corner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, pixels):
            return pixels[:, 0, 0, :10] * self.weight

    pixels = torch.zeros(4, 1, 14, 14)
    pixels[range(4), 0, 0, [1, 2, 3, 4]] = 1
    part = Labelled(pixels, torch.tensor([1, 2, 3, 5]))
    assert accuracy(TINY, Corner(), part) == 0.75


def test_a_shuffle_is_one_for_all_and_loses_nothing():
    config = replace(TINY, shuffled=True)
    pixels = torch.arange(2 * 196.0).view(2, 1, 14, 14)
    mixed = prepared(config, pixels)
    assert not torch.equal(mixed, pixels) and torch.equal(prepared(TINY, pixels), pixels)
    assert torch.equal(prepared(config, pixels), mixed)
    assert torch.equal(mixed[1] - mixed[0], pixels[1] - pixels[0])  # 196 everywhere
    assert sorted(mixed[0].flatten().tolist()) == list(range(196))
    corners = mixed[0, 0, ::7, ::7].flatten().tolist()
    assert sorted(corners) == [0, 7, 98, 105]  # patches moved whole


def test_no_test_digit_is_in_training():
    known, test = pictures(ClassifierConfig())
    assert known.pixels.shape == (4000, 1, 28, 28) and test.pixels.shape == (1000, 1, 28, 28)
    seen = {picture.numpy().tobytes() for picture in known.pixels}
    assert not any(picture.numpy().tobytes() in seen for picture in test.pixels)
    assert known.pixels.min() == 0 and known.pixels.max() == 1
    assert test.labels.bincount().tolist() == [100] * 10


def test_resized_digits_keep_their_ink():
    """A mean over the picture survives resampling to within a percent: edges are empty."""
    full, half = (pictures(replace(TINY, size=size))[1].pixels for size in (28, 14))
    assert half.shape[-1] == 14
    torch.testing.assert_close(half.mean((1, 2, 3)), full.mean((1, 2, 3)), rtol=0.01, atol=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("change", [{"data": "cats"}, {"size": 4}], ids=str)
def test_unknown_sets_and_sizes_are_refused(change):
    with pytest.raises(ValueError, match="sets are mnist_5k, openmoji, sizes 8 to 256, got"):
        pictures(replace(TINY, **change))


def test_paper_is_black_for_emoji_too(monkeypatch):
    """OpenMoji comes on white; what the models and the augmentation's background see is 0."""

    class Part:
        pixels = torch.tensor([255, 0], dtype=torch.uint8).view(2, 1, 1, 1)
        category = torch.tensor([0, 1])

    class Emoji:
        def split(self):
            return Part, Part

    monkeypatch.setattr(classifier, "openmoji", lambda size: Emoji())
    known, _ = pictures(replace(TINY, data="openmoji"))
    classifier.drawn.cache_clear()
    assert known.pixels.flatten().tolist() == [0.0, 1.0]
