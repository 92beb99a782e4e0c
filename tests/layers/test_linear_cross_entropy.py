"""The last layer with its loss, against torch's two functions."""

import pytest
import torch
from torch.nn import functional

from implementations.lab.compare import assert_same_function
from implementations.layers.linear_cross_entropy import linear_cross_entropy_naive


def test_linear_is_torchs_linear_and_cross_entropy():
    hidden, weight = torch.randn(7, 5).double(), torch.randn(11, 5).double()
    targets = torch.tensor([0, 10, 3, -100, 4, 4, 1])
    assert_same_function(
        lambda hidden, weight: linear_cross_entropy_naive(hidden, weight, targets),
        lambda hidden, weight: functional.cross_entropy(functional.linear(hidden, weight), targets),
        hidden,
        weight,
    )


@pytest.mark.usefixtures("unchecked")
def test_one_target_for_many_rows_is_refused():
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"\(4, 5\) need targets of \(4,\), got \(1,\)"):
        linear_cross_entropy_naive(hidden, weight, torch.zeros(1, dtype=torch.long))
