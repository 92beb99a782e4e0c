"""The diffusion transformer: closed gates at first, then the condition's norm as written."""

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from implementations.layers.patch_embedding import join_patches, split_patches
from implementations.models.diffusion_transformer import (
    DiffusionTransformer,
    TransformerConfig,
    modulated,
)

SMALL = TransformerConfig(
    image=8, channels=2, patch=4, width=8, layers=2, heads=2, hidden=16, classes=3
)


@pytest.fixture
def network():
    return DiffusionTransformer(SMALL).double()


@pytest.fixture
def shaken(network):
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def test_every_block_begins_as_the_identity(network):
    x, condition = torch.randn(2, 4, 8).double(), torch.randn(2, 8).double()
    for block in network.blocks:
        assert torch.equal(block(x, condition), x)
    pixels = torch.randn(2, 2, 8, 8).double()
    assert torch.equal(network(pixels, torch.rand(2).double()), torch.zeros_like(pixels))


def test_a_block_is_its_equation(shaken):
    """With scale, shift and gate taken from the condition by hand."""
    block, x, condition = shaken.blocks[0], torch.randn(2, 4, 8).double(), torch.randn(2, 8)
    condition = condition.double()
    weight, bias = block.modulation.linear.weight, block.modulation.linear.bias
    parts = (silu(condition) @ weight.mT + bias).reshape(2, 6, 1, 8)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts.unbind(1)

    def norm(y):
        centred = y - y.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    wanted = x + gate1 * block.attention(norm(x) * (1 + scale1) + shift1)
    wanted = wanted + gate2 * block.feed_forward(norm(wanted) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, condition), wanted, rtol=1e-10, atol=1e-10)


def test_modulation_with_nothing_to_say_is_torchs_layer_norm():
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    zero = torch.zeros(2, 1, 8, dtype=torch.float64)
    theirs = nn.functional.layer_norm(x, (8,), eps=1e-6)
    torch.testing.assert_close(modulated(x, zero, zero), theirs)


def test_patches_go_back_where_they_came_from():
    pixels = torch.arange(2 * 2 * 64.0).reshape(2, 2, 8, 8)
    assert torch.equal(join_patches(split_patches(pixels, 4), 4, 2), pixels)


def test_noise_and_labels_matter(shaken):
    pixels, position = torch.randn(2, 2, 8, 8).double(), torch.tensor([0.3, 0.4]).double()
    labels = torch.tensor([0, 1])
    answer = shaken(pixels, position, labels)
    assert answer.shape == pixels.shape
    for other in (shaken(pixels, position + 0.01, labels), shaken(pixels, position, labels + 1)):
        assert (answer - other).abs().max() > 1e-4
    assert torch.equal(shaken(pixels, position), shaken(pixels, position, torch.full((2,), 3)))


def test_bad_input(network):
    with pytest.raises(ValueError, match="pictures are 8 x 8, got"):
        network(torch.zeros(1, 2, 12, 12).double(), torch.zeros(1).double())
    with pytest.raises(ValueError, match="patches of 3 do not tile"):
        DiffusionTransformer(TransformerConfig(image=8, patch=3))
