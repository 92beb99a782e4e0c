"""Bad paths are noticed before the work, a failed drawing costs nothing, labels are those given."""

import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from implementations.lab.pictures import check_writable, draw_sheet, heat_map, save_figure

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("name", ["picture.png", "picture.PNG", "picture.svg", "a.b.pdf"])
def test_a_good_path_passes_and_leaves_no_trace(tmp_path, name):
    check_writable(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    save_figure(Figure(), tmp_path / name)  # what was promised is kept
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_existing_picture_is_not_touched_by_the_check(tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("old")
    check_writable(path)
    assert path.read_text() == "old"


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name a file inside it"):
        check_writable(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    path = tmp_path / "missing" / "picture.png"
    with pytest.raises(FileNotFoundError, match="cannot write there") as problem:
        check_writable(path)
    assert problem.value.filename == str(path)


@pytest.mark.parametrize("name", ["picture.xyz", "picture", ".png", "picture."])
def test_an_unknown_ending_is_answered_with_the_known_ones(tmp_path, name):
    with pytest.raises(ValueError, match=r"png.*got .*picture|png.*got .*\.png"):
        check_writable(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", PNG), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")]
)
def test_the_ending_decides_the_format(tmp_path, name, start):
    path = save_figure(Figure(), tmp_path / name)
    assert path.read_bytes().startswith(start)


def test_a_failed_drawing_leaves_the_old_picture(tmp_path):
    """An equation that matplotlib cannot parse fails in the middle of drawing."""
    path = tmp_path / "picture.png"
    path.write_text("old")
    figure = Figure()
    figure.suptitle(r"$\nonsense$")
    with pytest.raises(ValueError):
        save_figure(figure, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_a_heat_map_shows_its_matrix_with_the_labels_given(kind):
    """Not square, so that rows and columns cannot be exchanged unseen."""
    matrix = [[0.0, 0.25, 0.5], [0.75, 1.0, 0.125]]
    figure = heat_map(kind(matrix), ["it", "was"], ["the", "tired", "dog"], "Who looks at whom")
    axes, colorbar = figure.axes
    assert labels(axes.yaxis) == ["it", "was"]
    assert labels(axes.xaxis) == ["the", "tired", "dog"]
    assert axes.get_title() == "Who looks at whom"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("looks at", "token")
    assert colorbar.get_ylabel() == "weight"
    (image,) = axes.get_images()
    assert image.get_array().tolist() == matrix


def test_the_first_row_is_drawn_at_the_top(tmp_path):
    """Read back from the pixels: in [[1, 0], [0, 0]] the dark square is top left."""
    figure = heat_map(np.array([[1.0, 0.0], [0.0, 0.0]]), ["a", "b"], ["a", "b"], "")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pixels = imread(io.BytesIO(buffer.getvalue()))
    box = figure.axes[0].get_window_extent()
    height = pixels.shape[0]
    columns = [int(box.x0 + box.width * part) for part in (0.25, 0.75)]
    rows = [int(height - box.y1 + box.height * part) for part in (0.25, 0.75)]
    darkness = [[1 - pixels[row, column, :3].mean() for column in columns] for row in rows]
    assert darkness[0][0] > 0.5 > max(darkness[0][1], darkness[1][0], darkness[1][1])


def test_one_colour_means_one_weight_in_every_picture():
    """A row of 0.2 must not look like a row of 0.9."""
    for matrix in (np.full((2, 2), 0.2), np.eye(2)):
        (image,) = heat_map(matrix, ["a", "b"], ["a", "b"], "").axes[0].get_images()
        assert image.get_clim() == (0, 1)


def test_dollar_tokens_are_words_and_not_equations(tmp_path):
    tokens = ["$$", r"$\frac$", "_"]
    figure = heat_map(np.eye(3), tokens, tokens, "")
    save_figure(figure, tmp_path / "picture.png")
    assert labels(figure.axes[0].xaxis) == labels(figure.axes[0].yaxis) == tokens


def test_a_matrix_is_asked_for():
    with pytest.raises(TypeError):
        heat_map(np.zeros(3), ["a"], ["a"], "")


def test_a_sheet_shows_images_side_by_side_with_paper_white_and_ink_black():
    axes = Figure().add_subplot()
    images = torch.tensor([[[0, 16], [4, 8]], [[1, 2], [3, 5]]])
    shown = draw_sheet(axes, images, 17, "two").get_array()
    assert shown.shape == (2, 8) and axes.get_title(loc="left") == "two"
    assert shown[:, 1:3].tolist() == [[0, 16], [4, 8]]
    assert shown[:, 5:7].tolist() == [[1, 2], [3, 5]]
    assert (shown[:, [0, 3, 4, 7]] == 8).all()
    picture = axes.images[0]
    white, black = (picture.cmap(picture.norm(level))[:3] for level in (0, 16))
    assert min(white) > 0.99 and max(black) < 0.01
