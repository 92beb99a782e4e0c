"""Several scales: nothing is lost in squeezing and splitting, and the noise has its order."""

import pytest
import torch
from torch import nn

from implementations.flows.multi_scale import MultiScale, Squeeze


def test_squeeze_is_torchs_pixel_unshuffle():
    x = torch.randn(2, 3, 4, 6)
    y, log_det = Squeeze()(x)
    assert torch.equal(y, nn.functional.pixel_unshuffle(x, 2)) and not log_det.any()
    assert torch.equal(Squeeze().inverse(y).value, nn.functional.pixel_shuffle(y, 2))


def test_odd_images_cannot_be_halved():
    with pytest.raises(ValueError, match=r"even rows and columns can be halved, got \(4, 3\)"):
        Squeeze()(torch.zeros(1, 1, 4, 3))
    with pytest.raises(ValueError, match="12 rows and 8 columns cannot be halved 3 times"):
        MultiScale((1, 12, 8), scales=3, steps=1, hidden=4)


def test_without_steps_the_noise_is_the_image_in_another_order():
    flow = MultiScale((1, 8, 8), scales=3, steps=0, hidden=4)
    x = torch.arange(64.0).view(1, 1, 8, 8)
    noise, log_det = flow(x)
    assert sorted(noise[0].tolist()) == list(range(64)) and not log_det.any()
    # Half leaves at the finest scale: the upper pixels of each 2 x 2 block, listed first.
    assert sorted(noise[0, :32].tolist()) == sorted(x[0, 0, ::2].flatten().tolist())
    assert torch.equal(flow.inverse(noise).value, x)


def test_what_has_left_is_not_touched_by_later_scales():
    flow = MultiScale((1, 4, 4), scales=2, steps=1, hidden=4)
    x = torch.randn(3, 1, 4, 4)
    before = flow(x).value
    for parameter in flow.stages[1].parameters():
        nn.init.normal_(parameter, std=0.3)
    after = flow(x).value
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.isclose(before[:, 8:], after[:, 8:]).any()


def test_initialise_reaches_every_scale_and_returns_what_forward_does():
    flow = MultiScale((1, 8, 8), scales=3, steps=2, hidden=4).double()
    x = 5 + 3 * torch.randn(40, 1, 8, 8, dtype=torch.float64)
    noise = flow.initialise(x)
    assert torch.equal(noise, flow(x).value)
    norms = [step.steps[0] for stage in flow.stages for step in list(stage.steps)[1:]]
    assert len(norms) == 6 and all((norm.log_scale != 0).all() for norm in norms)
    # New couplings are the identity and mixing is a rotation: unit deviation stays.
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert noise.mean().item() == pytest.approx(0, abs=0.05)


def test_other_shapes_are_refused():
    flow = MultiScale((1, 4, 4), scales=2, steps=1, hidden=4)
    with pytest.raises(ValueError, match=r"for images \(1, 4, 4\), got \(1, 8, 8\)"):
        flow(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="16 numbers an example, got 15"):
        flow.inverse(torch.zeros(2, 15))


def test_a_coarser_scale_is_set_from_the_half_that_reaches_it():
    flow = MultiScale((1, 8, 8), scales=2, steps=1, hidden=4).double()
    x = torch.rand(40, 1, 8, 8, dtype=torch.float64).cumsum(2)
    flow.initialise(x)
    stays = flow.stages[0](x).value[:, 2:]  # the second of its two pairs of channels
    seen = nn.functional.pixel_unshuffle(stays, 2)
    norm = flow.stages[1].steps[1].steps[0]
    torch.testing.assert_close(norm.shift, -seen.mean((0, 2, 3)))
    torch.testing.assert_close(norm.log_scale, -seen.std((0, 2, 3), correction=0).log())
