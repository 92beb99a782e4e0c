"""Rollout against paths counted one by one, binomials and the uniform case."""

import math
from itertools import product

import pytest
import torch

from implementations.attention.positions_2d import grid_coordinates
from implementations.attention.rollout import attention_distance, attention_rollout


def random_maps(*shape):
    return torch.randn(*shape, dtype=torch.float64).softmax(-1)


def test_sums_over_all_paths():
    """Three layers, four tokens: each entry is the sum over the 4² paths between, by hand."""
    maps = random_maps(3, 1, 2, 4, 4)
    first, second, third = (maps[:, 0].mean(1) + torch.eye(4)) / 2
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for top, b, a, bottom in product(range(4), repeat=4):
        expected[top, bottom] += third[top, b] * second[b, a] * first[a, bottom]
    torch.testing.assert_close(attention_rollout(maps)[0], expected, rtol=1e-10, atol=1e-12)


def test_looking_one_back_gives_binomials():
    """Each layer stays or steps back with 1/2: in three layers k steps have C(3, k) / 8."""
    back = torch.zeros(6, 6, dtype=torch.float64)
    back[range(1, 6), range(5)] = 1
    back[0, 0] = 1
    rollout = attention_rollout(back.expand(3, 1, 1, 6, 6))[0, 5]
    assert rollout.tolist() == pytest.approx([0, 0, *(math.comb(3, k) / 8 for k in (3, 2, 1, 0))])


def test_uniform_attention_leaves_two_to_the_minus_layers():
    """On itself 2^-L + (1 - 2^-L)/n, on each other token (1 - 2^-L)/n."""
    rollout = attention_rollout(torch.full((4, 1, 3, 5, 5), 0.2, dtype=torch.float64))[0]
    other = (1 - 2**-4) / 5
    expected = torch.full((5, 5), other, dtype=torch.float64) + torch.eye(5) / 16
    torch.testing.assert_close(rollout, expected, rtol=1e-10, atol=1e-12)


def test_rows_are_distributions_and_pictures_stand_alone():
    maps = random_maps(4, 3, 2, 7, 7)
    rollout = attention_rollout(maps)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(3, 7).double())
    torch.testing.assert_close(rollout[1:2], attention_rollout(maps[:, 1:2]))


def test_distance_by_hand():
    """A class token and a row of three patches. The first head looks at itself; in the second,
    each patch gives half to the class token, which stands nowhere, and half to the last patch."""
    maps = torch.zeros(1, 1, 2, 4, 4)
    maps[0, 0, 0] = torch.eye(4)
    maps[0, 0, 1, :, 0] = maps[0, 0, 1, :, 3] = 0.5
    distance = attention_distance(maps, grid_coordinates((1, 3)))
    assert distance.tolist() == [[0.0, pytest.approx(1.0)]]  # (2 + 1 + 0) / 3


def test_uniform_distance_is_the_mean_of_all_pairs():
    coordinates = grid_coordinates((2, 3))
    pairs = [math.dist(a, b) for a, b in product(coordinates.tolist(), repeat=2)]
    distance = attention_distance(torch.full((2, 1, 1, 6, 6), 1 / 6), coordinates)
    assert distance.flatten().tolist() == pytest.approx([sum(pairs) / 36] * 2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(0, 1, 1, 3, 3), (2, 1, 1, 3, 4)], ids=str)
def test_maps_that_cannot_be_multiplied_are_refused(shape):
    with pytest.raises(ValueError, match=f"got {shape[0]} layers of 3 x {shape[-1]}"):
        attention_rollout(torch.rand(shape))
