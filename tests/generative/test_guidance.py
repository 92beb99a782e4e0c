"""Guidance against the score of p(x) p(label | x)^scale, which the mixture knows."""

import pytest
import torch

from implementations.generative.gaussian_mixture import ring
from implementations.generative.guidance import guide, guided, leave_out

ALPHA, SIGMA = 0.8, 0.6


def conditional(mixture):
    components = len(mixture.weights)

    def denoise(x, alpha, sigma, labels):
        every = [mixture.given(k).denoised(x, alpha, sigma) for k in range(components)]
        every.append(mixture.denoised(x, alpha, sigma))
        return torch.stack(every)[labels, torch.arange(len(x))]

    return denoise


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guided_score_is_that_of_the_sharpened_posterior(scale):
    """grad log p(x) + scale grad log p(label | x), by autograd, at one level of noise."""
    mixture, x = ring(deviation=0.4), torch.randn(8, 2, dtype=torch.float64)
    labels = torch.arange(8) % 5
    x.requires_grad_()
    noisy = mixture.noised(ALPHA, SIGMA)
    chosen = noisy.component_log_density(x).log_softmax(1)[torch.arange(8), labels]
    (score,) = torch.autograd.grad((noisy.log_density(x) + scale * chosen).sum(), x)
    x = x.detach()
    found = guided(conditional(mixture), labels, scale, 5)(x, ALPHA, SIGMA)
    wanted = (x + SIGMA**2 * score) / ALPHA
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_the_two_conventions_by_hand():
    """Ho and Salimans' w = 0.5 is the scale 1.5."""
    with_label, without = torch.tensor([3.0]), torch.tensor([1.0])
    assert guide(with_label, without, 1.5).tolist() == [(1 + 0.5) * 3.0 - 0.5 * 1.0]
    assert guide(with_label, without, 1.0).tolist() == [3.0]
    assert guide(with_label, without, 0.0).tolist() == [1.0]


def test_labels_are_left_out_at_the_rate():
    chance = torch.tensor([0.05, 0.5, 0.0999, 0.1])
    assert leave_out(torch.tensor([3, 4, 5, 6]), chance, 0.1, 10).tolist() == [10, 4, 10, 6]


@pytest.mark.parametrize(
    "labels, classes, sentence",
    [
        ([0, 1], 0, "needs a model that was trained with labels"),
        ([0, 5], 5, "labels are 0 to 4, got 0 to 5"),
        ([-1, 2], 5, "labels are 0 to 4, got -1 to 2"),
    ],
)
def test_bad_labels(labels, classes, sentence):
    with pytest.raises(ValueError, match=sentence):
        guided(conditional(ring()), torch.tensor(labels), 2.0, classes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("labels", [torch.zeros(2), torch.tensor([True, False])])
def test_labels_that_are_no_whole_numbers(labels):
    with pytest.raises(ValueError, match=f"labels are whole numbers, got {labels.dtype}"):
        guided(conditional(ring()), labels, 2.0, 5)
