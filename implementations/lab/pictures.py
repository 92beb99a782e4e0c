"""Pictures that several scripts draw, and a way to save one without leaving half a file.

Run     uv run python implementations/lab/pictures.py
"""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, Num
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor
from torch.nn.functional import pad

from implementations.lab.files import cache_folder, write_atomically

Matrix = Float[np.ndarray, "row column"] | Float[Tensor, "row column"]

matplotlib.use("Agg")  # scripts save pictures; none opens a window


def check_writable(path: Path) -> None:
    """Raise a sentence now if `path` could not be written later, before any long work starts.

    Raises:
        ValueError: the path is a folder, or its ending names no picture format.
        OSError: its folder is missing or cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file inside it")
    endings = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in endings:
        raise ValueError(f"pictures end in one of {', '.join(endings)}; got {path}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as problem:
        raise OSError(
            problem.errno, f"cannot write there ({problem.strerror})", str(path)
        ) from None


def save_figure(figure: Figure, path: Path) -> Path:
    """Save wholly or not at all, in the format of the path's ending."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=120, bbox_inches="tight")
    return write_atomically(path, buffer.getvalue())


def heat_map(matrix: Matrix, rows: Sequence[str], columns: Sequence[str], title: str) -> Figure:
    """A matrix as a square of colours, rows looking at columns, every row and column labelled."""
    size = 1.5 + 0.32 * max(len(rows), len(columns))
    figure = Figure(figsize=(min(size + 1, 14), min(size, 13)))
    axes = figure.add_subplot()
    image = draw_matrix(axes, matrix)
    # A token such as "$$" is a label, not the beginning of an equation.
    axes.set_xticks(range(len(columns)), columns, rotation=90, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.set(title=title, xlabel="looks at", ylabel="token")
    figure.colorbar(image, ax=axes, shrink=0.8, label="weight")
    return figure


def draw_matrix(axes: Axes, matrix: Matrix) -> AxesImage:
    """Weights between 0 and 1 in one fixed colour scale, so that pictures can be compared."""
    return axes.imshow(np.asarray(matrix), vmin=0, vmax=1, cmap="Blues")


def draw_sheet(
    axes: Axes, images: Num[Tensor, "image row column"], levels: int, title: str
) -> AxesImage:
    """Images side by side, a grey line around each; 0 is white paper, levels - 1 is black ink."""
    framed = pad(images.detach().float().cpu(), (1, 1), value=(levels - 1) / 2)
    axes.set_title(title, fontsize=9, loc="left", pad=2)
    axes.set_axis_off()
    row = framed.transpose(0, 1).flatten(1).numpy()
    return axes.imshow(row, vmin=0, vmax=levels - 1, cmap="gray_r")


def main() -> None:
    words = ["dog", "bites", "man"]
    figure = heat_map(np.eye(3), words, words, "Everyone looks at themselves")
    print("saved", save_figure(figure, cache_folder("figures") / "heat_map.png"))


if __name__ == "__main__":
    main()
