"""The small convolutional network: counted by hand, one stage against torch, shifts by eight."""

import pytest
import torch
from torch.nn.functional import batch_norm, conv2d, max_pool2d

from implementations.models.convolutional_network import ConvolutionalNetwork


def test_parameters_counted_by_hand():
    """9·32 + 9·32·64 + 9·64·128 weights, two a channel for each norm, 128·10 + 10 for the head."""
    model = ConvolutionalNetwork(1, 10)
    by_hand = 9 * 32 + 9 * 32 * 64 + 9 * 64 * 128 + 2 * (32 + 64 + 128) + 128 * 10 + 10
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand


def test_scores_are_those_of_torchs_functions():
    model = ConvolutionalNetwork(3, 4, width=8).double().eval()
    x = pixels = torch.randn(2, 3, 17, 12).double()
    for convolution, norm, _, _ in model.stages:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        x = conv2d(x, convolution.weight, padding=1)
        x = batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        x = max_pool2d(x.clamp(min=0), 2)
    expected = x.mean((2, 3)) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(pixels), expected, rtol=1e-10, atol=1e-12)


def test_a_shift_by_eight_pixels_changes_nothing():
    """Three halvings: shifted by 8, every stage sees the same, shifted. In float64, to rounding."""
    model = ConvolutionalNetwork(1, 10).double().eval()
    picture = torch.zeros(1, 1, 40, 40).double()
    picture[..., 16:21, 16:21] = torch.rand(5, 5)
    here, there = model(picture), model(picture.roll((8, -8), (-2, -1)))
    torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-12)
    assert (model(picture.roll(3, -1)) - here).abs().max() > 1e-6


@pytest.mark.usefixtures("unchecked")
def test_pictures_too_small_for_three_halvings_are_refused():
    with pytest.raises(ValueError, match=r"at least 8 x 8 pixels, got \[7, 9\]"):
        ConvolutionalNetwork(1, 10)(torch.rand(1, 1, 7, 9))
