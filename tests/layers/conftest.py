"""What the tests of all kernels along rows share."""

import pytest
import torch

VIEWS = {
    "columns": lambda x: x[:, 3:260],
    "every other row": lambda x: x[::2],
    "transposed": lambda x: x.T,
    "axes swapped": lambda x: x.reshape(4, 15, 300).transpose(0, 1),
    "one row six times": lambda x: x[:1].expand(6, 300),
}


@pytest.fixture(params=VIEWS)
def view(request):
    """A strided view of a matrix of 60 rows of 300."""
    return VIEWS[request.param]


# What the norms' kernels refuse, and how they say it.
X, SCALE = torch.ones(2, 3), torch.ones(3)
BAD_ROWS = {
    "integers": (X.int(), SCALE, "computes with floats, got torch.int32"),
    "complex": (X.cfloat(), SCALE, "computes with floats, got torch.complex64"),
    "Boolean": (X.bool(), SCALE, "computes with floats, got torch.bool"),
    "no axis": (X[0, 0], SCALE, r"at least one number, got the shape \(\)"),
    "no channel": (X[:, :0], SCALE[:0], r"at least one number, got the shape \(2, 0\)"),
    "scale too long": (X, torch.ones(4), r"scale needs 3 numbers, one a channel, got \(4,\)"),
    "scale too short": (X, torch.ones(1), r"scale needs 3 numbers, one a channel, got \(1,\)"),
    "scale a matrix": (X, torch.ones(1, 3), r"scale needs 3 numbers, .* got \(1, 3\)"),
    "scale of integers": (X, SCALE.int(), "scale holds floats, got torch.int32"),
    "scale elsewhere": (X, SCALE.to("meta"), "scale is on meta, x on cpu"),
}
BAD_RESIDUALS = {
    "other rows": (torch.ones(1, 3), r"residual has the shape \(1, 3\), x \(2, 3\)"),
    "other width": (torch.ones(2, 1), r"residual has the shape \(2, 1\), x \(2, 3\)"),
    "other rank": (torch.ones(1, 2, 3), r"residual has the shape \(1, 2, 3\)"),
    "other dtype": (X.half(), "residual is torch.float16, x torch.float32"),
    "elsewhere": (X.to("meta"), "residual is on meta, x on cpu"),
}


@pytest.fixture(params=BAD_ROWS)
def bad_rows(request):
    """Rows, a scale that does not go with them, and the sentence for that."""
    return BAD_ROWS[request.param]


@pytest.fixture(params=BAD_RESIDUALS)
def bad_residual(request):
    """Rows, a residual that does not go with them, a scale, and the sentence."""
    residual, sentence = BAD_RESIDUALS[request.param]
    return X, residual, SCALE, sentence
