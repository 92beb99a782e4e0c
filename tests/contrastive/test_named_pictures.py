"""Named pictures: no leak, one of each family in the test, names as their readers see them."""

import pytest
import torch
from torch.testing import assert_close

from implementations.contrastive.named_pictures import (
    LONGEST,
    as_floats,
    check_apart,
    minilm_reader,
    scratch_reader,
    split_pictures,
)
from implementations.models.encoder import Encoder
from implementations.sources.weights import minilm_tokenizer
from implementations.training.accumulation import IGNORED


@pytest.fixture(scope="module")
def parts():
    return split_pictures(16, 300)


def test_training_and_test_share_no_family_and_no_picture(parts):
    train, test = parts
    assert not torch.isin(train.family, test.family).any()
    apart = torch.cdist(as_floats(test).flatten(1), as_floats(train).flatten(1))
    assert apart.min() > 0
    assert len(train.codes) + len(test.codes) <= 300 and len(test.codes) > 40


def test_the_test_has_one_picture_of_each_family(parts):
    _, test = parts
    assert len(test.family.unique()) == len(test.family)


def test_a_leak_is_noticed(parts):
    """A variant on both sides, and the same pixels under another family's number."""
    train, test = parts
    variant = test.at(torch.tensor([3]))._replace(family=train.family[:1])
    copied = train.at(torch.tensor([3]))._replace(family=torch.tensor([100_000]))
    for leaking in (variant, copied):
        with pytest.raises(ValueError, match=f"test picture {leaking.codes[0]} leaks"):
            check_apart(train, leaking)
    check_apart(train, test)


def test_pixels_go_from_black_to_white(parts):
    pixels = as_floats(parts[0])
    assert pixels.min() == 0 and pixels.max() == 1
    assert torch.equal((pixels * 255).round().to(torch.uint8), parts[0].pixels)


def test_minilm_reads_each_name_as_alone():
    """In batches of like lengths, in the order given; padding is worth 1e-6 (float32 sums)."""
    names = ["red apple", "a man who cooks in a large kitchen", "cat"] * 30
    vectors = minilm_reader()(names)
    encoder, tokenizer = Encoder.from_minilm(), minilm_tokenizer()
    for i, name in enumerate(names[:3]):
        assert_close(vectors[i : i + 1], encoder.embed([name], tokenizer), rtol=0, atol=1e-6)
        assert_close(vectors[i], vectors[i + 87], rtol=0, atol=1e-6)


def test_names_are_read_as_the_byte_pairs_of_the_names_shown():
    """`cat` and `hat` share `at`; what was never shown is read in bytes, what is long is cut."""
    read = scratch_reader(["cat", "hat", "cat"])
    rows = read(["cat", "dog", "x" * 100])
    assert rows.shape == (3, LONGEST)
    lengths = (rows != IGNORED).sum(1).tolist()
    assert lengths[0] < lengths[1] == 3 and lengths[2] == LONGEST
    assert (rows[1, :3] < 256).all() and rows[0].max() >= 256


@pytest.mark.parametrize("count", [3, 100_000])
def test_bad_input(count):
    with pytest.raises(ValueError, match=f"pictures can be split, got {count}"):
        split_pictures(16, count)
