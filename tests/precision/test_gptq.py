"""GPTQ against the textbook's elimination, by hand, and by what it promises."""

import pytest
import torch

from implementations.precision.block_quantization import (
    dequantize,
    quantize,
    stored_bytes,
    unpack_nibbles,
)
from implementations.precision.gptq import gptq, gptq_naive, hessian


def correlated(samples: int, columns: int) -> torch.Tensor:
    """Inputs of uneven size, most of it in half as many directions."""
    x = torch.randn(samples, columns // 2 + 1, dtype=torch.float64)
    x = x @ torch.randn(columns // 2 + 1, columns, dtype=torch.float64)
    return (x + 0.5 * torch.randn_like(x)) * torch.exp2(torch.randint(-2, 3, (columns,)))


def words_of(stored) -> torch.Tensor:
    words = unpack_nibbles(stored.words) if stored.bits == 4 else stored.words
    return words.flatten(-2)


def same(got, want):
    assert torch.equal(got.scale, want.scale) and torch.equal(got.zero, want.zero)
    assert torch.equal(got.words, want.words) and got.bits == want.bits


def brain_surgeon(weight, damped, bits, group):
    """The textbook: an explicit inverse, from which each rounded column is eliminated.

    Its grid is written anew: the scale in fp16 from a group's ends and zero, when its turn comes.
    """
    rest, inverse = weight.clone(), torch.linalg.inv(damped)
    meant, words = torch.empty_like(weight), torch.empty_like(weight)
    top = 2**bits - 1
    for j in range(weight.shape[1]):
        if j % group == 0:
            part = rest[:, j : j + group]
            low, high = part.min(1).values.clamp(max=0), part.max(1).values.clamp(min=0)
            scale = ((high - low) / top).half().double()
            zero = (-low / scale).round().clamp(0, top)
        words[:, j] = ((rest[:, j] / scale).round() + zero).clamp(0, top)
        meant[:, j] = scale * (words[:, j] - zero)
        step = (rest[:, j] - meant[:, j]) / inverse[j, j]
        rest -= step[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return words, meant


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("group", [4, 12, 24])
def test_is_the_textbooks_elimination(bits, group):
    weight = torch.randn(9, 24, dtype=torch.float64)
    h = hessian(correlated(40, 24))
    damped = h + 0.02 * h.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    words, meant = brain_surgeon(weight, damped, bits, group)
    stored = gptq(weight, h, bits, group, damping=0.02)
    assert torch.equal(words_of(stored).double(), words)
    torch.testing.assert_close(dequantize(stored).double(), meant, rtol=1e-6, atol=1e-6)
    same(gptq_naive(weight, h, bits, group, damping=0.02), stored)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("group", [6, 20, 60])
def test_blocks_are_of_no_consequence(group, order):
    """Blocks of one group, of several, and of all."""
    weight, h = torch.randn(5, 60, dtype=torch.float64), hessian(correlated(100, 60))
    want = gptq(weight, h, 3, group, order=order, block=60)
    for block in (1, 7, 20, 128):
        same(gptq(weight, h, 3, group, order=order, block=block), want)


def test_three_columns_by_hand():
    """The scale is 1. 1.4 becomes 1; the 0.4 that is lost moves its neighbour, whose input is half
    its own, by 0.2: 2.35 becomes 3, where it alone would become 2."""
    weight = torch.tensor([[1.4, 2.35, 3.0]])
    h = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert words_of(quantize(weight, 2, 3)).tolist() == [[1, 2, 3]]
    assert words_of(gptq(weight, h, 2, 3, damping=0.0)).tolist() == [[1, 3, 3]]
    # The largest input first: 2.35 becomes 2, its 0.35 moves 1.4 by 4 · 0.5 · 0.35 / 1.
    h[1], h[:, 1] = 2 * h[1], 2 * h[:, 1]
    assert words_of(gptq(weight, h, 2, 3, damping=0.0, order=True)).tolist() == [[2, 2, 3]]


@pytest.mark.parametrize("order", [False, True])
def test_inputs_that_do_not_go_together_leave_the_nearest_words(order):
    weight = torch.randn(7, 40)
    h = torch.rand(40).add(0.1).diag()
    same(gptq(weight, h, 4, 8, order=order), quantize(weight, 4, 8))


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("group", [16, 64])
def test_answers_are_nearer_than_the_nearest_words(bits, order, group):
    """On the inputs it was made for: no theorem, but by a margin."""
    inputs, weight = correlated(200, 64), torch.randn(30, 64)

    def lost(stored):
        return ((dequantize(stored) - weight).double() @ inputs.T).square().sum().item()

    h = hessian(inputs)
    assert lost(gptq(weight, h, bits, group, order=order)) < 0.8 * lost(
        quantize(weight, bits, group)
    )


def test_each_rounding_counts_once():
    """The error's square is Σ (rounding_j / U_jj)², so half a scale in each is its bound."""
    inputs, weight = correlated(200, 32), torch.randn(8, 32, dtype=torch.float64)
    h = hessian(inputs)
    stored = gptq(weight, h, 8, 32, damping=0.0)
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    difference = weight - dequantize(stored).double()
    lost = (difference @ inputs.T).square().sum(1) / len(inputs)
    # What is left after all columns: w - q = Σ_j e_j U_j, so e = (w - q) U⁻¹.
    errors = torch.linalg.solve(factor.T, difference.T).T
    torch.testing.assert_close(errors.square().sum(1), lost, rtol=1e-8, atol=0)
    rounding = (errors * factor.diagonal()).abs()
    inside = rounding <= 0.5 * stored.scale.double() * (1 + 1e-6)
    assert inside.float().mean() > 0.95  # but for words at the grid's end


def test_order_permutes_and_puts_back():
    """One group: the columns sorted by hand, quantized in turn, and sorted back."""
    weight, h = torch.randn(6, 24, dtype=torch.float64), hessian(correlated(60, 24))
    turns = h.diagonal().argsort(descending=True)
    want = gptq(weight[:, turns], h[turns][:, turns], 3, 24)
    got = gptq(weight, h, 3, 24, order=True)
    assert torch.equal(words_of(got)[:, turns], words_of(want))
    assert not torch.equal(words_of(got), words_of(want))


def test_rows_do_not_meet():
    weight, h = torch.randn(10, 32), hessian(correlated(50, 32))
    both = dequantize(gptq(weight, h, 3, 8))
    assert torch.equal(both[:4], dequantize(gptq(weight[:4], h, 3, 8)))
    assert dequantize(gptq(weight[:0], h, 3, 8)).shape == (0, 32)


def test_dead_columns_are_rounded_to_the_nearest():
    weight, inputs = torch.randn(6, 16, dtype=torch.float64), correlated(50, 16)
    inputs[:, [3, 8]] = 0
    stored, alive = gptq(weight, hessian(inputs), 4, 4), [*range(3), *range(4, 8), *range(9, 16)]
    scale = stored.scale.double().repeat_interleave(4, 1)
    off = (dequantize(stored).double() - weight).abs() / scale
    assert (off[:, [3, 8]] <= 0.51).all() and (off[:, alive] > 0.51).any()


def test_fewer_samples_than_columns():
    """Undamped there is no answer, damped a good one."""
    weight, inputs = torch.randn(6, 40), correlated(12, 40)
    with pytest.raises(ValueError, match="not positive definite from column 1"):
        gptq(weight, hessian(inputs), 3, 8, damping=0.0)
    stored = gptq(weight, hessian(inputs), 3, 8)
    lost = (dequantize(stored) - weight).double() @ inputs.T
    nearest = (dequantize(quantize(weight, 3, 8)) - weight).double() @ inputs.T
    assert lost.norm() < 0.5 * nearest.norm()


def test_hessian_is_half_the_second_derivative():
    x, w = correlated(20, 5).view(4, 5, 5), torch.zeros(5, dtype=torch.float64)

    def loss(w):
        return (x @ w).square().mean()

    torch.testing.assert_close(
        hessian(x), torch.autograd.functional.hessian(loss, w) / 2, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("bits", [3, 2])
def test_nearest_words_of_few_bits_are_torchs(bits):
    """Given our scales and zeros; no weight lies within rounding of a tie."""
    weight = torch.randn(20, 64)
    stored = quantize(weight, bits, 16)
    scale, zero = stored.scale.float().flatten(), stored.zero.int().flatten()
    theirs = torch.fake_quantize_per_channel_affine(
        weight.view(-1, 16), scale, zero, 0, 0, 2**bits - 1
    )
    assert torch.equal(dequantize(stored), theirs.view(20, 64))


@pytest.mark.parametrize(("bits", "want"), [(8, 64 + 12), (4, 32 + 12), (3, 24 + 12), (2, 16 + 12)])
def test_bytes_by_hand(bits, want):
    """64 words, and four groups of 16 with two bytes of scale and one of zero."""
    assert stored_bytes(quantize(torch.randn(2, 32), bits, 16)) == want


EYE = torch.eye(8)
BAD = {
    "size": ({"hessian": torch.eye(7)}, "8 columns need a Hessian of as many, got"),
    "NaN": ({"hessian": EYE * torch.nan}, "an input of the layer was infinite or NaN"),
    "zero": ({"hessian": 0 * EYE}, "saw no input, or only zeros"),
    "damping": ({"damping": -0.1}, "damping is not negative, got -0.1"),
    "bits": ({"bits": 5}, "8, 4, 3 or 2 bits, got 5"),
    "group": ({"group": 3}, "do not fill a width of 8"),
    "weights": ({"weight": torch.full((2, 8), torch.inf)}, "infinite or NaN"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("form", [gptq, gptq_naive])
def test_mistakes_are_refused(form, case, unchecked):
    changed, sentence = BAD[case]
    arguments = {"weight": torch.randn(2, 8), "hessian": EYE, "bits": 4, "group": 4} | changed
    with pytest.raises(ValueError, match=sentence):
        form(**arguments)
