"""Peak memory and bytes moved on calls whose answer is known by counting."""

import pytest
import torch

from implementations.lab.memory import moved_bytes, peak_bytes

WEIGHT = torch.randn(1000)
SIZE = 1000 * 4  # bytes of one float32 vector of 1,000


@pytest.mark.parametrize(
    "function, vectors",
    [
        (lambda x: x + 1, 1),
        (lambda x: (x + 1) * 2, 2),  # the sum lives until the product is made
        (lambda x: ((x + 1) * 2) + 3, 2),  # and is gone before the next
        (lambda x: (x + 1).mul_(2), 1),
        (lambda x: x.view(10, 100).T, 0),  # a view owns nothing
        (lambda x: [x + i for i in range(5)], 5),
        (lambda x: x, 0),
        (
            lambda x: WEIGHT.view(10, 100).T.reshape(-1) * x,
            2,
        ),  # what was there before does not count
    ],
)
def test_peak_by_counting(function, vectors):
    assert peak_bytes(function, torch.randn(1000)) == vectors * SIZE


@pytest.mark.parametrize(
    "function, vectors",
    [
        (lambda x: x + 1, 2),
        (lambda x: (x + 1) * 2, 4),
        (lambda x: x * x, 3),  # each operand is read
        (lambda x: (x + 1).mul_(2), 4),
        (lambda x: x.view(10, 100).T, 0),  # a view moves nothing
        (lambda x: x.expand(7, 1000) + 1, 1 + 7),  # and an expanded vector lies there once
        (lambda x: x.view(10, 100).mT.contiguous(), 2),
        (lambda x: x[:500] + 1, 1),
        (lambda x: x.view(10, 100) @ x.view(100, 10), 2 + 0.1),
    ],
)
def test_moves_by_counting(function, vectors):
    assert moved_bytes(function, torch.randn(1000)) == vectors * SIZE


@pytest.mark.cuda
def test_peak_on_a_gpu():
    """The allocator rounds up to 512 bytes."""
    x = torch.randn(2**20, device="cuda")
    assert peak_bytes(lambda x: (x + 1) * 2, x) == 2 * 4 * 2**20
