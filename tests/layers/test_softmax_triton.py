"""Softmax's kernel is the equation, in one piece and online."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not built for this platform")

from implementations.lab.compare import assert_same_accuracy, assert_same_function
from implementations.layers.softmax import softmax_naive
from implementations.layers.softmax_triton import softmax_backward_op, softmax_op, softmax_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
SHAPES = [(1, 1), (5000, 1), (3, 63), (3, 7, 257), (2, 4099), (2, 65537)]

# In float32 a GPU's exp2 is good to a relative 2^-22 by PTX's manual, and so is a row's quotient.
# The exponent of a share that lies d under the largest is rounded by d 2^-24, of a share that falls
# as exp(-d): 2^-25 of the largest. The sum errs as its powers do: together under 4 times 2^-22. In
# the gradient, share (upstream - mean), the shares sum to one whatever exp2 did, for the sum was
# made of the same powers: their errors meet differences from the mean, and no cancelled ones.
EXP2 = 2.0**-20 if torch.cuda.is_available() else 0.0


def random(shape: tuple[int, ...], size: float = 1.0, dtype: torch.dtype = torch.float64):
    return (size * torch.randn(shape, dtype=torch.float64, device=DEVICE)).to(dtype)


@pytest.mark.parametrize("size", [1e-3, 3.0, 300.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_function(shape, size):
    """Also where exp without the maximum would overflow."""
    assert_same_function(softmax_triton, softmax_naive, random(shape, size))


@pytest.mark.parametrize("size", [1e-3, 3.0, 30.0])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", [(40, 63), (16, 257), (32, 4099)], ids=str)
def test_same_accuracy(shape, dtype, size):
    known = EXP2 if dtype == torch.float32 else 0.0
    assert_same_accuracy(softmax_triton, softmax_naive, random(shape, size, dtype), known=known)


def test_strided_rows(view):
    x = random((60, 300))
    assert_same_function(lambda x: softmax_triton(view(x)), lambda x: softmax_naive(view(x)), x)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes for the interpreter
@pytest.mark.parametrize("width", [5, 40_000])
def test_infinities_and_nan(width):
    """-inf is a share of zero, in the first pieces too; rows without a maximum are NaN alone."""
    x = random((6, width))
    x[0, : width - 2] = -torch.inf
    x[1] = -torch.inf
    x[2, 1], x[3, 2] = torch.inf, torch.nan
    x[4, width - 2 :] = -torch.inf
    got, want = softmax_triton(x), torch.softmax(x, -1)
    assert torch.equal(got.isnan(), want.isnan())
    assert want.isnan().any(-1).tolist() == [False, True, True, True, False, False]
    torch.testing.assert_close(got, want, equal_nan=True)


def test_equal_numbers_share_alike():
    x = torch.full((3, 257), 7.0, device=DEVICE)
    torch.testing.assert_close(softmax_triton(x), torch.full_like(x, 1 / 257))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_rows(shape):
    assert_same_function(softmax_triton, softmax_naive, random(shape))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it
def test_torch_library():
    x = random((6, 63), dtype=torch.float32)
    statistics = softmax_op(x)[1:]
    torch.library.opcheck(softmax_backward_op, (random((6, 63)).float(), x, *statistics))
    torch.library.opcheck(softmax_op, (x.requires_grad_(),))


@pytest.mark.usefixtures("unchecked")
def test_compiles_as_one_graph():
    compiled = torch.compile(softmax_triton, fullgraph=True, backend="aot_eager")
    assert_same_function(compiled, softmax_naive, random((6, 63)))


X = torch.ones(2, 3)
BAD = {
    "integers": (X.int(), "computes with floats, got torch.int32"),
    "complex": (X.cfloat(), "computes with floats, got torch.complex64"),
    "Boolean": (X.bool(), "computes with floats, got torch.bool"),
    "long integers": (X.long(), "computes with floats, got torch.int64"),
    "bytes": (X.byte(), "computes with floats, got torch.uint8"),
    "signed bytes": (X.char(), "computes with floats, got torch.int8"),
    "wide complex": (X.cdouble(), "computes with floats, got torch.complex128"),
    "eight bits": (X.to(torch.float8_e4m3fn), "computes with floats, got torch.float8_e4m3fn"),
    "eight other bits": (X.to(torch.float8_e5m2), "with floats, got torch.float8_e5m2"),
    "no axis": (X[0, 0], r"at least one number, got the shape \(\)"),
    "no channel": (X[:, :0], r"at least one number, got the shape \(2, 0\)"),
    "no channel in a stack": (X[None, :, :0], r"at least one number, got the shape \(1, 2, 0\)"),
    "no row and no channel": (X[:0, :0], r"at least one number, got the shape \(0, 0\)"),
    "sparse": (X.to_sparse(), "reads addresses, and x is torch.sparse_coo"),
    "eight bits without zeros of two signs": (
        X.to(torch.float8_e4m3fnuz),
        "got torch.float8_e4m3fnuz",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(case):
    x, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        softmax_triton(x)
