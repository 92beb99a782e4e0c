"""A picture of the reader's own: any file that Pillow reads, cut to a square and made small.

    picture = resize(largest square around the middle, on white paper)

Run     uv run python implementations/sources/picture_file.py [FILE]
"""

import sys
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from implementations.lab.command_line import clear_errors
from implementations.lab.files import cache_folder


def read_picture(path: Path, size: int) -> UInt8[Tensor, "3 row column"]:
    """The middle of a picture as red, green and blue; what is transparent becomes white.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, or only a part of one; or the size is not positive.
    """
    if size < 1:
        raise ValueError(f"a picture is at least one pixel wide, got {size}")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no picture that can be read") from None
    except (OSError, SyntaxError) as problem:
        if isinstance(problem, FileNotFoundError):
            raise
        raise ValueError(f"{path} is a damaged picture ({problem})") from None
    paper = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    square = ImageOps.fit(paper.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square).transpose(2, 0, 1).copy())


def main() -> None:
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
    else:
        path = cache_folder() / "example.png"
        Image.new("RGB", (40, 20), "orange").save(path)
    picture = read_picture(path, 16)
    print(f"{path}: {list(picture.shape)}, mean colour {picture.float().mean((1, 2)).tolist()}")


if __name__ == "__main__":
    with clear_errors():
        main()
