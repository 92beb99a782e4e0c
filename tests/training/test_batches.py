"""Batches by (seed, step): Random123's published numbers, and windows that are where they say."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from implementations.training.batches import RandomWindows, map_tokens, raw_numbers

TEXT = torch.arange(1000)


def test_the_generator_gives_random123s_published_numbers():
    """Philox4x64-10 of counter 0 and key 0. NumPy counts up before it draws, so it starts at -1."""
    published = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert np.random.Philox(key=0, counter=2**256 - 1).random_raw(4).tolist() == published


def test_the_order_of_the_data_is_fixed_for_good():
    """Changed numbers here would be another order of the data for every run in progress."""
    windows = RandomWindows(TEXT, batch=3, length=7, seed=1)
    assert windows(70_000)[:, 0].tolist() == [798, 948, 663]


def test_a_batch_depends_on_seed_and_step_alone():
    windows = RandomWindows(TEXT, batch=5, length=9, seed=2)
    forward = [windows(step) for step in range(10)]
    torch.manual_seed(123)
    torch.rand(1)
    for step in reversed(range(10)):
        assert torch.equal(RandomWindows(TEXT, batch=5, length=9, seed=2)(step), forward[step])
    other = RandomWindows(TEXT, batch=5, length=9, seed=3)(0)
    assert not any(torch.equal(other, batch) for batch in forward)


def test_steps_share_no_numbers():
    """Each step has its own 2^64 counters: 1,000 steps of 64 draws, all different."""
    drawn = np.concatenate([raw_numbers(0, step, 64) for step in range(1000)])
    assert len(np.unique(drawn)) == 64_000


def test_rows_are_windows_of_the_text_with_one_token_more_than_is_read():
    batch = RandomWindows(TEXT, batch=200, length=9)(4)
    assert batch.shape == (200, 10) and batch.dtype == torch.int64
    assert torch.equal(batch, batch[:, :1] + torch.arange(10))


def test_windows_start_everywhere_equally_often():
    """20 places, the first and the last among them, 20,000 draws; false alarm 1 in 1,000, once."""
    windows = RandomWindows(TEXT[:28], batch=2000, length=8, seed=4)
    starts = torch.cat([windows(step)[:, 0] for step in range(10)])
    counts = torch.bincount(starts, minlength=20)
    assert windows.windows == len(counts) == 20
    assert chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.uint8])
def test_a_mapped_file_gives_what_memory_gives(dtype, tmp_path):
    tokens = (torch.arange(300) * 7 % 251).to(dtype)
    path = tmp_path / "tokens.bin"
    path.write_bytes(tokens.numpy().tobytes())
    mapped = RandomWindows(map_tokens(path, dtype), batch=4, length=11)
    assert torch.equal(mapped(3), RandomWindows(tokens, batch=4, length=11)(3))


def test_a_mapped_text_cannot_be_changed_by_mistake(tmp_path):
    path = tmp_path / "tokens.bin"
    path.write_bytes(bytes(8))
    map_tokens(path, torch.uint8).fill_(1)
    assert path.read_bytes() == bytes(8)


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ({"batch": 1, "length": 1000}, "needs 1001 tokens, the text has 1000"),
        ({"batch": 0, "length": 5}, "got 0 x 5"),
        ({"batch": 2, "length": 0}, "got 2 x 0"),
        ({"batch": 2, "length": 5, "seed": -1}, "got -1"),
    ],
)
def test_impossible_windows_are_refused(sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        RandomWindows(TEXT, **sizes)


def test_a_text_of_one_row_is_enough():
    assert RandomWindows(TEXT[:6], batch=2, length=5)(0).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize("size", [0, 3])
def test_a_file_of_half_tokens_is_refused(size, tmp_path):
    path = tmp_path / "tokens.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"tokens.bin holds {size} bytes"):
        map_tokens(path)
