"""SwiGLU's kernel is the equation, and knows which half is the gate."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not built for this platform")

from implementations.lab.compare import assert_same_accuracy, assert_same_function
from implementations.layers.feed_forward import swiglu_naive
from implementations.layers.feed_forward_triton import (
    swiglu_backward_op,
    swiglu_op,
    swiglu_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
SHAPES = [(1,), (1, 1), (5000, 1), (3, 63), (3, 7, 257), (2, 4099), (2, 65537)]


def halves(shape: tuple[int, ...], size: float = 1.0, dtype: torch.dtype = torch.float64):
    both = size * torch.randn(2, *shape, dtype=torch.float64, device=DEVICE)
    return tuple(both.to(dtype))


@pytest.mark.parametrize("size", [1e-3, 3.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_function(shape, size):
    assert_same_function(swiglu_triton, swiglu_naive, *halves(shape, size))


@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", [(40, 63), (16, 257), (2, 4099)], ids=str)
def test_same_accuracy(shape, dtype, size):
    assert_same_accuracy(swiglu_triton, swiglu_naive, *halves(shape, size, dtype))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.chunk(2, -1),
        lambda x: (x[::2], x[1::2]),
        lambda x: (x.T, x.T.flip(0)),
        lambda x: x.reshape(4, 15, 300).transpose(0, 1).chunk(2, -1),
        lambda x: (x[:1].expand(60, 300), x),
    ],
    ids=["halves of one row", "every other row", "transposed", "axes swapped", "one row for all"],
)
def test_strided_rows(view):
    x = torch.randn(60, 300, dtype=torch.float64, device=DEVICE)
    fast, naive = (lambda x, f=f: f(*view(x)) for f in (swiglu_triton, swiglu_naive))
    assert_same_function(fast, naive, x)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes for the interpreter
def test_far_gates_are_open_or_shut():
    """exp(-gate) overflows at -1000 and must give zero, not NaN; NaN stays where it is."""
    gate = torch.tensor([-1000.0, 1000.0, 0.0, torch.nan, torch.inf], device=DEVICE)
    got = swiglu_triton(gate, torch.full_like(gate, 2.0))
    assert got[:3].tolist() == [0.0, 2000.0, 0.0]
    assert got[3].isnan() and got[4] == torch.inf


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_rows(shape):
    assert_same_function(swiglu_triton, swiglu_naive, *halves(shape))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it
def test_torch_library():
    gate, expand = halves((6, 63), dtype=torch.float32)
    torch.library.opcheck(swiglu_backward_op, (gate, expand, gate + 1))
    torch.library.opcheck(swiglu_op, (gate.requires_grad_(), expand.requires_grad_()))


@pytest.mark.usefixtures("unchecked")
def test_compiles_as_one_graph():
    compiled = torch.compile(swiglu_triton, fullgraph=True, backend="aot_eager")
    assert_same_function(compiled, swiglu_naive, *halves((6, 63)))


X = torch.ones(2, 3)
BAD = {
    "integers": (X.int(), X.int(), "computes with floats, got torch.int32"),
    "complex": (X.cfloat(), X.cfloat(), "computes with floats, got torch.complex64"),
    "no axis": (X[0, 0], X[0, 0], r"at least one number, got the shape \(\)"),
    "no channel": (X[:, :0], X[:, :0], r"at least one number, got the shape \(2, 0\)"),
    "other width": (X, X[:, :1], r"expand has the shape \(2, 1\), x \(2, 3\)"),
    "other rows": (X, X[:1], r"expand has the shape \(1, 3\), x \(2, 3\)"),
    "other rank": (X, X[None], r"expand has the shape \(1, 2, 3\), x \(2, 3\)"),
    "other dtype": (X, X.half(), "expand is torch.float16, x torch.float32"),
    "elsewhere": (X, X.to("meta"), "expand is on meta, x on cpu"),
    "Boolean": (X.bool(), X, "computes with floats, got torch.bool"),
    "eight bits": (X.to(torch.float8_e5m2), X, "computes with floats, got torch.float8_e5m2"),
    "wider": (X, X.double(), "expand is torch.float64, x torch.float32"),
    "no rows beside rows": (X, X[:0], r"expand has the shape \(0, 3\), x \(2, 3\)"),
    "sparse": (X.to_sparse(), X, "reads addresses, and x is torch.sparse_coo"),
    "sparse beside dense": (X, X.to_sparse(), "reads addresses, and expand is torch.sparse_coo"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(case):
    gate, expand, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        swiglu_triton(gate, expand)
