"""What the tests of all kernels along rows share."""

import pytest

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
