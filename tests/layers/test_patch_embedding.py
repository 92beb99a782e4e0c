"""Patches: a strided convolution, read like a page, with sentences for pictures that do not fit."""

import pytest
import torch
from torch.nn.functional import conv2d

from implementations.lab.compare import assert_same_function
from implementations.layers.patch_embedding import (
    PatchEmbedding,
    embed_patches,
    join_patches,
    patch_grid,
    split_patches,
)


def test_patches_by_hand():
    """A picture of 2 channels, 2 x 4 pixels, cut into two squares."""
    pixels = torch.tensor([[[0, 1, 2, 3], [4, 5, 6, 7]], [[10, 11, 12, 13], [14, 15, 16, 17]]])
    first, second = split_patches(pixels, 2).tolist()
    assert first == [0, 1, 4, 5, 10, 11, 14, 15]
    assert second == [2, 3, 6, 7, 12, 13, 16, 17]


@pytest.mark.parametrize(
    "channels, size, rows, columns", [(1, 1, 1, 1), (3, 4, 2, 5), (2, 7, 3, 1)], ids=str
)
def test_is_a_strided_convolution(channels, size, rows, columns):
    """Output and gradients of pixels, weight and bias, on pictures that are not square."""

    def convolved(pixels, weight, bias):
        return conv2d(pixels, weight, bias, stride=size).flatten(2).mT

    inputs = (
        torch.randn(3, channels, rows * size, columns * size),
        torch.randn(6, channels, size, size),
        torch.randn(6),
    )
    assert_same_function(embed_patches, convolved, *(x.double() for x in inputs))


def test_gradients_are_those_of_finite_differences():
    inputs = torch.randn(2, 2, 4, 6), torch.randn(3, 2, 2, 2), torch.randn(3)
    wide = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(embed_patches, wide)


@pytest.mark.parametrize("size, rows, columns", [(1, 3, 2), (2, 3, 5), (4, 1, 2)])
def test_joining_undoes_splitting(size, rows, columns):
    pixels = torch.randn(2, 3, rows * size, columns * size)
    assert torch.equal(join_patches(split_patches(pixels, size), size, rows), pixels)
    assert patch_grid(*pixels.shape[-2:], size) == (rows, columns)


def test_the_layer_uses_its_weights():
    layer = PatchEmbedding(3, 8, 4).double()
    torch.nn.init.normal_(layer.bias)
    pixels = torch.randn(2, 3, 8, 12).double()
    expected = conv2d(pixels, layer.weight, layer.bias, stride=4).flatten(2).mT
    torch.testing.assert_close(layer(pixels), expected, rtol=1e-10, atol=1e-12)


def test_tokens_start_as_large_as_pixels():
    """Weights of variance 1 / inputs: a token's variance is the mean square of its pixels.

    Of 64 tokens x 512 channels the variance's standard error is 1% if channels are independent
    given the pixels; the pixels' own mean square varies by sqrt(2 / 48 / 64), 2.5%.
    """
    tokens = PatchEmbedding(3, 512, 4)(torch.randn(1, 3, 32, 32))
    assert tokens.var().item() == pytest.approx(1.0, rel=0.15)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "height, width, size", [(30, 32, 4), (32, 30, 4), (3, 3, 4), (0, 4, 4)], ids=str
)
def test_pictures_that_patches_do_not_tile_are_refused(height, width, size):
    with pytest.raises(ValueError, match=f"{size} do not tile a picture of {height} x {width}"):
        PatchEmbedding(1, 8, size)(torch.rand(1, 1, height, width))


@pytest.mark.usefixtures("unchecked")
def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="for 3 channels, got 1"):
        PatchEmbedding(3, 8, 4)(torch.rand(1, 1, 8, 8))


@pytest.mark.usefixtures("unchecked")
def test_a_patch_has_pixels():
    with pytest.raises(ValueError, match="at least one pixel wide, got 0"):
        patch_grid(8, 8, 0)
