"""The U-Net has diffusers' layout: with the same weights, the same outputs and gradients."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from implementations.attention.vendor import attention_sdpa
from implementations.attention_basic import attention_naive
from implementations.models.unet import UNet, UNetConfig, to_diffusers, waves

SMALL = UNetConfig(
    channels=2, widths=(8, 16, 24), parts=2, attends=(False, True, True), head=4, groups=4
)


def shaken(network: nn.Module) -> nn.Module:
    """All weights random: what starts at zero hides mistakes."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.double().eval()


@pytest.mark.parametrize("attention", [attention_naive, attention_sdpa])
def test_equals_diffusers(attention):
    from diffusers.models.unets.unet_2d import UNet2DModel

    theirs = UNet2DModel(
        sample_size=12,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16, 24),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    theirs = theirs.double().eval()
    ours = shaken(UNet(SMALL, attention))
    theirs.load_state_dict(to_diffusers(ours.state_dict(), SMALL))
    x = torch.randn(3, 2, 12, 8, dtype=torch.float64, requires_grad=True)
    position = torch.tensor([0.02, 0.5, 0.97], dtype=torch.float64)
    upstream = torch.randn(3, 2, 12, 8, dtype=torch.float64)
    found = []
    for answer in (ours(x, position), theirs(x, 1000 * position).sample):
        found.append((answer, torch.autograd.grad(answer, x, upstream)[0]))
    for mine, other in zip(*found, strict=True):
        # Their waves are in float32.
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_waves_by_hand():
    position = torch.tensor([0.25], dtype=torch.float64)
    angle = 250 * torch.tensor([1.0, 0.01], dtype=torch.float64)
    wanted = torch.cat((angle.cos(), angle.sin()))[None]
    torch.testing.assert_close(waves(position, 4), wanted)


def test_labels_matter_and_none_is_one_of_them():
    network = shaken(UNet(UNetConfig(**{**SMALL.__dict__, "classes": 3})))
    x, position = torch.randn(2, 2, 8, 8).double(), torch.tensor([0.1, 0.9]).double()
    answers = [network(x, position, torch.full((2,), label)) for label in range(4)]
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(answers))
    torch.testing.assert_close(network(x, position), answers[3])


def test_at_first_the_answer_is_constant():
    network = UNet(SMALL)
    assert (network(torch.randn(1, 2, 8, 8), torch.rand(1)).std((-2, -1)) < 1e-6).all()


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"attends": (True,)}, "each height has a width"),
        ({"groups": 5}, "5 groups cannot share 8 channels evenly"),
    ],
)
def test_bad_sizes(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        UNet(UNetConfig(**{**SMALL.__dict__, **change}))


def test_bad_input():
    network = UNet(SMALL)
    with pytest.raises(ValueError, match="multiples of 4, got 10 x 8"):
        network(torch.zeros(1, 2, 10, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="made without labels"):
        network(torch.zeros(1, 2, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
