"""The scaling kernel writes the equation's words, bit for bit.

Triton's interpreter casts to fp8 with an error (a fraction that rounds up to the next power of two
loses its carry), so without a GPU the numbers are such that scaled they need no rounding.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not built for this platform")

from implementations.precision.fp8 import E4M3, E5M2, Delayed, quantize_blocks, quantize_both
from implementations.precision.fp8_triton import (
    quantize_blocks_triton,
    quantize_both_triton,
    quantize_op,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
KINDS = [E4M3, E5M2]
NARROW = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
SHAPES = [(1, 1), (3, 257), (130, 128), (128, 300)]
BLOCKS = [(1, 128), (128, 128)]


def exact(shape: tuple[int, ...], kind: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """Signed halves and quarters of the format's end over 2^6, without subnormals."""
    end = torch.finfo(kind).max / 64
    x = end * torch.exp2(-torch.randint(0, 5, shape).float()) * (1 - 2 * torch.randint(2, shape))
    x = torch.where(torch.rand(shape) < 0.1, 0.0, x)
    return x.to(dtype).to(DEVICE)


def same(got, want):
    assert got.block == want.block and got.values.dtype == want.values.dtype
    assert got.values.is_contiguous()
    torch.testing.assert_close(got.inverse, want.inverse, rtol=0, atol=0, equal_nan=True)
    ours, theirs = got.values.float(), want.values.float()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_given_scale(shape, kind, dtype):
    x = exact(shape, kind, dtype)
    for scale in (1.0, 0.25, 1024.0):  # the last saturates
        scale = torch.tensor(scale, device=DEVICE)
        *forms, amax = quantize_both_triton(x, kind, scale)
        *wanted, largest = quantize_both(x, kind, scale)
        for got, want in zip(forms, wanted, strict=True):
            same(got, want)
        assert amax == largest and amax.dtype is torch.float32


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks(shape, kind, block):
    x = exact(shape, kind, torch.float32)
    x[:, :64] *= 2.0**-5  # blocks that differ
    for got, want in zip(
        quantize_blocks_triton(x, kind, block), quantize_blocks(x, kind, block), strict=True
    ):
        same(got, want)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes for the interpreter
def test_what_is_not_finite(bad):
    """NaN does not hide among the maxima: on a GPU max(NaN, 1) is 1."""
    x = exact((130, 300), E5M2, torch.float32)
    x[5, 200] = bad
    *_, amax = quantize_both_triton(x, E5M2, torch.tensor(0.5, device=DEVICE))
    assert amax.isnan() if bad != bad else amax == torch.inf
    inverses = [f.inverse for f in quantize_blocks_triton(x, E5M2)]
    for got, want in zip(inverses, [f.inverse for f in quantize_blocks(x, E5M2)], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.cuda
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_words_that_are_not_finite(bad):
    x = torch.randn(130, 300, device=DEVICE)
    x[5, 200] = bad
    for scale in (0.5, torch.nan):
        scale = torch.tensor(scale, device=DEVICE)
        for got, want in zip(
            quantize_both_triton(x, E5M2, scale)[:2], quantize_both(x, E5M2, scale)[:2], strict=True
        ):
            same(got, want)
    for got, want in zip(quantize_blocks_triton(x, E5M2), quantize_blocks(x, E5M2), strict=True):
        same(got, want)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 4097), (2048, 2048)], ids=str)
def test_random_numbers_are_rounded_alike(shape, kind, dtype):
    """Every word, subnormal ones too."""
    x = torch.randn(shape, device=DEVICE) * torch.exp2(torch.randint(-12, 6, shape, device=DEVICE))
    x = x.to(dtype)
    scale = torch.tensor(37.3, device=DEVICE)
    pairs = [(quantize_both_triton(x, kind, scale)[:2], quantize_both(x, kind, scale)[:2])]
    for block in BLOCKS:
        pairs.append((quantize_blocks_triton(x, kind, block), quantize_blocks(x, kind, block)))
    for forms, wanted in pairs:
        for got, want in zip(forms, wanted, strict=True):
            same(got, want)


def test_delayed_scaling_takes_the_kernel():
    ours, naive = (Delayed(q).to(DEVICE) for q in (quantize_both_triton, quantize_both))
    for factor in (1.0, 4.0, 0.5):
        x = factor * exact((40, 50), E4M3, torch.float32)
        for got, want in zip(ours(x, E4M3), naive(x, E4M3), strict=True):
            same(got, want)
    assert torch.equal(ours.history, naive.history)


def test_strided_rows_and_nothing():
    x = exact((60, 300), E4M3, torch.float32)
    for view in (x[:, 10:200], x[::2], x.T):
        for got, want in zip(
            quantize_blocks_triton(view, E4M3), quantize_blocks(view, E4M3), strict=True
        ):
            same(got, want)
    for shape in ((0, 5), (5, 0)):
        empty = torch.empty(shape, device=DEVICE)
        row_form, column_form, amax = quantize_both_triton(
            empty, E4M3, torch.tensor(2.0, device=DEVICE)
        )
        assert row_form.values.shape == shape and column_form.values.shape == shape[::-1]
        assert amax == 0
        for got, want in zip(
            quantize_blocks_triton(empty, E4M3), quantize_blocks(empty, E4M3), strict=True
        ):
            assert got.inverse.shape == want.inverse.shape


def test_torch_library():
    x = exact((30, 70), E4M3, torch.float32)
    scale = torch.tensor(0.5, device=DEVICE)
    for given, mode in ((scale, 0), (None, 1), (None, 2)):
        torch.library.opcheck(quantize_op, (x, given, E4M3, mode), test_utils="test_schema")
        torch.library.opcheck(quantize_op, (x, given, E4M3, mode), test_utils="test_faketensor")


def test_mistakes_are_refused():
    x = torch.ones(2, 2, device=DEVICE)
    with pytest.raises(ValueError, match="writes float8_e4m3fn and float8_e5m2, got"):
        quantize_both_triton(x, torch.float16, x[0, 0])
    with pytest.raises(ValueError, match="blocks are 1 x 128 and 128 x 128, got"):
        quantize_blocks_triton(x, E4M3, (1, 64))
    with pytest.raises(ValueError, match=r"narrower float, got torch\.float64"):
        quantize_blocks_triton(x.double(), E4M3)
