"""The product of 4-bit weights with a vector is that of the dequantized weights."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not built for this platform")

from implementations.lab.compare import allowed, error
from implementations.precision.block_quantization import (
    dequantize,
    matrix_vector,
    quantize,
    unpack_nibbles,
)
from implementations.precision.block_quantization_triton import (
    matrix_vector_op,
    matrix_vector_triton,
    packed,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NARROW = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
SHAPES = [(1, 32, 32), (5, 96, 32), (63, 512, 128), (20, 1152, 128), (9, 256, 64)]


def weights(rows: int, width: int, group: int):
    x = torch.randn(rows, width) * torch.exp2(torch.randint(-3, 3, (rows, 1))) + 0.3
    return quantize(x.to(DEVICE), 4, group)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_accuracy(shape, dtype):
    stored = weights(*shape)
    x = torch.randn(shape[1], device=DEVICE).to(dtype)
    ours = packed(stored)
    exact = matrix_vector(stored, x.double())
    got, limit = matrix_vector_triton(ours, x), allowed(matrix_vector(stored, x), exact)
    assert got.dtype is dtype
    assert error(got, exact).largest <= limit.largest
    assert error(got, exact).mean <= limit.mean


def test_naive_is_the_dequantized_product():
    stored = weights(7, 96, 32)
    x = torch.randn(96, device=DEVICE, dtype=torch.float64)
    want = torch.stack([(row.double() * x).sum() for row in dequantize(stored)])
    torch.testing.assert_close(matrix_vector(stored, x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_word_has_its_place(group):
    """A vector that asks for one weight gets it: exactly, as all else is multiplied by zero."""
    stored = weights(4, 2 * group, group)
    ours, want = packed(stored), dequantize(stored)
    for place in [*range(0, 2 * group, 7), 2 * group - 1]:
        x = torch.zeros(2 * group, device=DEVICE)
        x[place] = 1
        got = matrix_vector_triton(ours, x)
        torch.testing.assert_close(got, want[:, place], rtol=2e-3, atol=1e-4)


def test_packing_by_hand():
    """Part m of a group of 32 holds weights m, m + 4, m + 8 ... from the lowest bits up."""
    stored = weights(3, 32, 32)
    words = unpack_nibbles(stored.words).long()
    got = packed(stored).words.long() & 0xFFFFFFFF
    for m in range(4):
        want = sum(words[:, 0, 4 * p + m] * 16**p for p in range(8))
        assert torch.equal(got[:, 0, m], want)


def test_no_rows():
    ours = packed(quantize(torch.empty(0, 64, device=DEVICE), 4, 32))
    assert matrix_vector_triton(ours, torch.ones(64, device=DEVICE)).shape == (0,)


def test_torch_library():
    ours = packed(weights(5, 64, 32))
    torch.library.opcheck(matrix_vector_op, (*ours, torch.randn(64, device=DEVICE)))


BAD = {
    "bits": (lambda: packed(quantize(torch.ones(2, 32), 8, 32)), "4 bits, got 8 bits"),
    "no matrix": (lambda: packed(quantize(torch.ones(32), 4, 32)), "takes a matrix"),
    "group": (lambda: packed(quantize(torch.ones(2, 96), 4, 96)), "powers of two from 32 on"),
    "width": (
        lambda: matrix_vector_triton(packed(quantize(torch.ones(2, 32), 4, 32)), torch.ones(33)),
        "32 wide take a vector of that length",
    ),
    "dtype": (
        lambda: matrix_vector_triton(
            packed(quantize(torch.ones(2, 32), 4, 32)), torch.ones(32).double()
        ),
        "no wider, got torch.float64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_refused(case):
    call, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        call()
