"""Augmentation: pixels by SciPy and Pillow, draws of (seed, step) alone, each picture its own."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy.ndimage import map_coordinates
from scipy.stats import binomtest
from torch.testing import assert_close

from implementations.contrastive.augmentation import (
    DRAWS,
    Augmentation,
    augment,
    moved,
    recoloured,
    two_views,
)
from implementations.training.batches import raw_numbers

STILL = Augmentation(
    area=(1, 1), stretch=1, flip=False, brightness=0, contrast=0, saturation=0, background=0.25
)
HALF = 0.5  # the draw that changes nothing: no stretch, no shift, no turn, no mirror


def picture(rows: int = 6, columns: int = 9, count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, rows, columns, dtype=torch.float64)


def draws(*changed: tuple[int, float]) -> torch.Tensor:
    """The eight draws of one picture's place, all `HALF` but those given."""
    numbers = torch.full((8, 1), HALF, dtype=torch.float64)
    for i, value in changed:
        numbers[i] = value
    return numbers


def changed(**settings) -> Augmentation:
    return Augmentation(**(STILL.__dict__ | settings))


def test_without_changes_a_picture_stays():
    x = picture(count=4)
    assert_close(augment(x, STILL, seed=0, step=0), x, rtol=0, atol=1e-12)  # two roundings


def test_pixels_are_scipys_at_the_coordinates_of_the_equation():
    """Crop, stretch, mirror, turn and shift at once, against SciPy's own bilinear sampling."""
    x, numbers = picture(7, 7, count=20), torch.rand(8, 20, dtype=torch.float64)
    settings = changed(area=(0.4, 1.3), stretch=1.5, turn=30, shift=0.1, flip=True)
    ours = moved(x, settings, numbers)
    for i, d in enumerate(numbers.T.tolist()):
        area, ratio = 0.4 + 0.9 * d[0], 1.5 ** (2 * d[1] - 1)
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        across = (2 * d[2] - 1) * abs(1 - width) + 0.2 * (2 * d[4] - 1)
        down = (2 * d[3] - 1) * abs(1 - height) + 0.2 * (2 * d[5] - 1)
        angle, side = math.radians(60 * d[7] - 30), -1 if d[6] < 0.5 else 1
        row, column = np.mgrid[:7, :7] * 2 / 7 + 1 / 7 - 1  # centres of pixels in [-1, 1]
        stretched, tall = side * width * column, height * row
        from_column = math.cos(angle) * stretched - math.sin(angle) * tall + across
        from_row = math.sin(angle) * stretched + math.cos(angle) * tall + down
        at = [(from_row + 1) * 3.5 - 0.5, (from_column + 1) * 3.5 - 0.5]
        for channel in range(3):
            theirs = map_coordinates(
                x[i, channel].numpy(), at, order=1, mode="grid-constant", cval=0.25
            )
            assert_close(ours[i, channel], torch.from_numpy(theirs), rtol=0, atol=1e-12)


def test_a_mirror_is_torchs_flip_and_a_quarter_turn_torchs_rotation():
    x = picture(6, 6)
    mirrored = moved(x, changed(flip=True), draws((6, 0.1)))
    assert_close(mirrored, x.flip(-1), rtol=0, atol=1e-12)
    turned = moved(x, changed(turn=90), draws((7, 1.0)))
    assert_close(turned, x.rot90(1, (-2, -1)), rtol=0, atol=1e-12)


def test_a_shift_by_whole_pixels_moves_and_shows_the_background():
    x = picture(5, 10)
    shifted = moved(x, changed(shift=0.2), draws((4, 1.0)))  # 0.2 of ten columns
    assert_close(shifted[..., :-2], x[..., 2:], rtol=0, atol=1e-12)
    assert_close(shifted[..., -2:], torch.full((1, 3, 5, 2), 0.25).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("draw", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "name, theirs",
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_colours_are_pillows(name, theirs, draw):
    """Within two levels of 256: Pillow rounds the grey, and then the blend."""
    levels = torch.randint(256, (1, 3, 8, 8))
    settings, numbers = changed(**{name: 0.7}), torch.full((3, 1), draw)
    ours = recoloured(levels / 255, settings, numbers)[0] * 255
    image = Image.fromarray(levels[0].permute(1, 2, 0).to(torch.uint8).numpy())
    expected = np.asarray(theirs(image).enhance(1 + 0.7 * (2 * draw - 1)))
    expected = torch.from_numpy(expected.astype(np.float32)).permute(2, 0, 1)
    assert_close(ours, expected, rtol=0, atol=2)


def test_a_change_depends_on_seed_step_and_place_alone():
    x, settings = picture(count=5), Augmentation(turn=20, shift=0.1)
    first = augment(x, settings, seed=2, step=7)
    torch.rand(1)
    assert torch.equal(augment(x, settings, seed=2, step=7), first)
    assert torch.equal(augment(x[:3], settings, seed=2, step=7), first[:3])
    assert not torch.equal(augment(x, settings, seed=2, step=8), first)
    assert not torch.equal(augment(x, settings, seed=3, step=7), first)


def test_two_views_differ_from_each_other_and_pictures_differ_in_their_changes():
    x = picture().expand(50, -1, -1, -1)
    first, second = two_views(x, Augmentation(), seed=0, step=0)
    assert ((first - second).abs().amax((1, 2, 3)) > 0.01).all()
    assert ((first[1:] - first[:-1]).abs().amax((1, 2, 3)) > 0.01).all()


def test_the_draws_are_not_those_that_choose_the_rows():
    """With one stream for both, a picture would always come with the same changes."""
    grey = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
    seen = augment(grey, changed(brightness=1.0), seed=3, step=5)[0, 0, 0, 0].item()
    rows = raw_numbers(3, 5, DRAWS) / 2**64  # one of them would be the brightness, which is 0.5 2u
    assert np.abs(rows - seen).min() > 1e-6


def test_half_of_the_pictures_are_mirrored():
    """10,000 pictures; false alarm 1 in 1,000."""
    x = torch.tensor([[[[0.0, 1.0]]]]).expand(10_000, 1, 1, 2)
    seen = augment(x, changed(flip=True), seed=0, step=0)
    mirrored = (seen[:, 0, 0, 0] > 0.5).sum().item()
    assert binomtest(mirrored, 10_000).pvalue > 1e-3


def test_values_stay_between_black_and_white():
    strong = Augmentation(brightness=3, contrast=3, saturation=3)
    seen = augment(picture(count=100), strong, seed=0, step=0)
    assert seen.min() >= 0 and seen.max() <= 1


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"area": (0.0, 1.0)}, "areas are positive and in order"),
        ({"area": (1.0, 0.5)}, "areas are positive and in order"),
        ({"stretch": 0.5}, "at least 1, got 0.5"),
        ({"turn": -1.0}, "turn is not negative, got -1.0"),
        ({"brightness": -0.1}, "brightness is not negative"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        augment(picture(), Augmentation(**settings), seed=0, step=0)


def test_a_picture_without_colours_cannot_be_saturated():
    grey = torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="red, green and blue, got 1 channels"):
        augment(grey, Augmentation(), seed=0, step=0)
    assert augment(grey, Augmentation(saturation=0), seed=0, step=0).shape == grey.shape
