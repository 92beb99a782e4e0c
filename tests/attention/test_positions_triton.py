"""Rotary positions by the kernel are the equation's, in both layouts and any strides."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not built for this platform")

from implementations.attention.positions import rotate_half_split, rotate_interleaved
from implementations.attention.positions_triton import (
    rotate_half_split_triton,
    rotate_interleaved_triton,
    rotate_op,
)
from implementations.lab.compare import assert_same_accuracy, assert_same_function

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
LAYOUTS = {
    "half split": (rotate_half_split_triton, rotate_half_split),
    "interleaved": (rotate_interleaved_triton, rotate_interleaved),
}
SHAPES = [(1, 2), (7, 2), (5, 64), (3, 33, 6), (2, 9, 17, 80), (2, 2, 3, 5, 128)]


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float64):
    return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base", [10000.0, 5e5, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_function(shape, base, layout):
    fast, naive = LAYOUTS[layout]
    assert_same_function(lambda x: fast(x, base=base), lambda x: naive(x, base=base), random(shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.float64, torch.float32])
def test_given_positions(kind, layout):
    """A later segment, out of order, negative; floats stand between tokens."""
    fast, naive = LAYOUTS[layout]
    positions = torch.tensor([5, 1000, 2, -3, 100_000], device=DEVICE).to(kind)
    if kind.is_floating_point:
        positions += 0.5
    x = random((2, 3, 5, 16))
    assert_same_function(lambda x: fast(x, positions), lambda x: naive(x, positions), x)


@pytest.mark.parametrize("start", [0, 4000, 100_000])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_same_accuracy(dtype, layout, start):
    fast, naive = LAYOUTS[layout]
    positions = torch.arange(start, start + 40, device=DEVICE)
    x = random((2, 3, 40, 64), dtype)
    assert_same_accuracy(lambda x: fast(x, positions), lambda x: naive(x, positions), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x[:, 1:5:2],
        lambda x: x[..., 2:8],
        lambda x: x.mT,
        lambda x: x[:, :, :1].expand(2, 6, 4, 10),
        lambda x: x[0],
        lambda x: x.unsqueeze(1).transpose(2, 3),
    ],
    ids=["heads of a projection", "heads", "channels", "last axes", "expanded", "3-d", "5-d"],
)
def test_strided_rows(view, layout):
    fast, naive = LAYOUTS[layout]
    assert_same_function(lambda x: fast(view(x)), lambda x: naive(view(x)), random((2, 6, 8, 10)))


def test_the_output_lies_in_memory_as_the_input():
    x = random((2, 5, 3, 8)).transpose(1, 2)
    assert rotate_half_split_triton(x).stride() == x.stride()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes for the interpreter
def test_nan_stays_in_its_pair():
    x = random((4, 8))
    x[2, 1] = torch.nan
    bad = rotate_half_split_triton(x).isnan()
    assert bad.nonzero().tolist() == [[2, 1], [2, 5]]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 5, 4)], ids=str)
def test_nothing(shape):
    assert_same_function(rotate_half_split_triton, rotate_half_split, random(shape))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it
@pytest.mark.parametrize("interleaved", [False, True])
def test_torch_library(interleaved):
    x, positions = random((2, 3, 5, 8), torch.float32), torch.arange(5, device=DEVICE)
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x.mT[..., :4]):
        own = None if given.shape[-2] != 5 else positions
        torch.library.opcheck(rotate_op, (given.detach(), own, 1e4, interleaved, False))
    torch.library.opcheck(rotate_op, (x.requires_grad_(), None, 1e4, interleaved, False))


@pytest.mark.usefixtures("unchecked")
def test_compiles_as_one_graph():
    compiled = torch.compile(rotate_half_split_triton, fullgraph=True, backend="aot_eager")
    assert_same_function(compiled, rotate_half_split, random((2, 3, 5, 8)))


X = torch.ones(5, 4)
BAD = {
    "integers": (X.int(), None, 1e4, "computes with floats, got torch.int32"),
    "complex": (X.cfloat(), None, 1e4, "computes with floats, got torch.complex64"),
    "no axis": (X[0, 0], None, 1e4, r"at least one number, got the shape \(\)"),
    "no channel": (X[:, :0], None, 1e4, r"at least one number, got the shape \(5, 0\)"),
    "no token axis": (X[0], None, 1e4, r"need \[token, dim\], got the shape \(4,\)"),
    "odd": (X[:, :3], None, 1e4, "taken in pairs, so their number must be even, got 3"),
    "one channel": (X[:, :1], None, 1e4, "must be even, got 1"),
    "few positions": (X, torch.arange(4), 1e4, r"5 tokens need as many positions, got \[4\]"),
    "many positions": (X, torch.arange(6), 1e4, r"5 tokens need as many positions, got \[6\]"),
    "a row of positions": (X, torch.arange(5)[None], 1e4, r"as many positions, got \[1, 5\]"),
    "Boolean positions": (X, torch.ones(5).bool(), 1e4, "integers or floats, got torch.bool"),
    "complex positions": (X, torch.ones(5).cfloat(), 1e4, "floats, got torch.complex64"),
    "positions elsewhere": (X, torch.ones(5, device="meta"), 1e4, "positions is on meta"),
    "base zero": (X, None, 0.0, "base of the frequencies is positive, got 0.0"),
    "base negative": (X, None, -1e4, "base of the frequencies is positive, got -10000.0"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(case, layout):
    x, positions, base, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        LAYOUTS[layout][0](x, positions, base)
