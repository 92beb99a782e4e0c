"""Bits of held-out text: what is known by counting, in whatever windows the text is read."""

import math

import pytest
import torch

from implementations.text.held_out import compressed_bits, held_out_bits

SIZES = [(2, 1, 1), (7, 3, 10), (8, 8, 100), (33, 5, 97), (64, 100, 101), (1000, 1, 50)]
"""length of a window, start, tokens: odd windows, a short last one, one larger than the text"""


@pytest.mark.parametrize("length, start, count", SIZES)
def test_a_model_that_knows_nothing_pays_log2_of_the_vocabulary_for_each_token(
    length, start, count
):
    tokens = torch.randint(50, (start + count,))

    def uniform(read):
        return torch.zeros(1, read.shape[1], 50, dtype=torch.float64)

    bits = held_out_bits(uniform, tokens, start, length)
    # One log and one sum a window, of float64 numbers.
    assert bits == pytest.approx(count * math.log2(50), rel=1e-13)


@pytest.mark.parametrize("length, start, count", SIZES)
def test_each_token_is_asked_for_once_after_the_one_before_it(length, start, count):
    """A table of next-token probabilities, summed by hand: windows must change nothing."""
    torch.manual_seed(length)
    scores = torch.randn(20, 20, dtype=torch.float64)
    tokens = torch.randint(20, (start + count,))
    by_hand = -scores.log_softmax(-1)[tokens[start - 1 : -1], tokens[start:]].sum() / math.log(2)
    bits = held_out_bits(lambda read: scores[read], tokens, start, length)
    assert bits == pytest.approx(by_hand.item(), rel=1e-12)


def test_at_least_half_a_window_stands_before_what_is_asked():
    shortest = []

    def watching(read):
        shortest.append(read.shape[1])
        return torch.zeros(1, read.shape[1], 5)

    held_out_bits(watching, torch.zeros(200).long(), start=32, length=32)
    assert all(read >= 32 for read in shortest[:-1]) and shortest[-1] >= 16


@pytest.mark.parametrize("start, length, sentence", [(0, 8, "one before it"), (1, 1, "2 tokens")])
def test_windows_that_cannot_be(start, length, sentence):
    with pytest.raises(ValueError, match=sentence):
        held_out_bits(
            lambda read: torch.zeros(1, read.shape[1], 5), torch.zeros(9).long(), start, length
        )


def test_a_compressor_is_charged_for_the_text_alone():
    """One that stores everything pays 8 bits a byte, whatever stands before."""
    assert compressed_bits(lambda data: data, b"before", b"text") == 8 * 4
    assert compressed_bits(lambda data: b"!" + data[::2], b"ab", b"cdef") == 8 * 2
