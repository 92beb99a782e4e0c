"""A reader's own picture: cut to its middle, on white, with a sentence for what is no picture."""

import pytest
import torch
from PIL import Image

from implementations.sources.picture_file import read_picture


@pytest.fixture
def flag(tmp_path):
    """Three stripes side by side: red, green, blue; 30 x 10 pixels."""
    picture = Image.new("RGB", (30, 10))
    for place, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255))):
        picture.paste(colour, (10 * place, 0, 10 * place + 10, 10))
    picture.save(tmp_path / "flag.png")
    return tmp_path / "flag.png"


def test_the_middle_is_kept(flag):
    pixels = read_picture(flag, 10)
    assert pixels.shape == (3, 10, 10) and pixels.dtype == torch.uint8
    assert pixels.flatten(1).unique(dim=1).flatten().tolist() == [0, 255, 0]


def test_rows_are_rows(tmp_path):
    picture = Image.new("L", (8, 8))
    picture.paste(200, (0, 0, 8, 4))  # the upper half is bright
    picture.save(tmp_path / "half.png")
    pixels = read_picture(tmp_path / "half.png", 8)
    assert pixels[:, 0].min() > 150 and pixels[:, -1].max() < 50


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (5, 5), (10, 20, 30, 0)).save(tmp_path / "glass.png")
    assert (read_picture(tmp_path / "glass.png", 5) == 255).all()


@pytest.mark.parametrize("damage", ["text", "empty", "half of it"])
def test_what_cannot_be_read_is_named(flag, damage):
    whole = flag.read_bytes()
    flag.write_bytes({"text": b"hello", "empty": b"", "half of it": whole[:50]}[damage])
    with pytest.raises(ValueError, match=r"flag\.png is (no picture|a damaged picture)"):
        read_picture(flag, 8)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        read_picture(tmp_path / "nothing.png", 8)


@pytest.mark.usefixtures("unchecked")
def test_a_picture_has_pixels(flag):
    with pytest.raises(ValueError, match="at least one pixel wide, got 0"):
        read_picture(flag, 0)
