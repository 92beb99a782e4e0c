"""Positions in a picture against DETR, DINOv3 and numbers by hand; what each kind must keep."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding
from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

from implementations.attention.multi_head import MultiHeadAttention
from implementations.attention.positions_2d import (
    GridAttention,
    grid_coordinates,
    interpolated_positions,
    rotate_2d,
    sinusoidal_positions_2d,
    turned,
)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_coordinates_by_hand():
    assert grid_coordinates((2, 3)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_a_finer_grid_keeps_the_pictures_edges():
    """Two patches where one was: 1/4 before and after its centre, so that the edges stay."""
    fine = grid_coordinates((4, 2), (2, 2))
    assert fine[::2, 0].tolist() == [-0.25, 0.25, 0.75, 1.25]
    assert fine[:2, 1].tolist() == [0.0, 1.0]


def test_sinusoids_are_detrs():
    """DETR counts rows and columns from 1, rows in the first half; it computes in the dtype asked.

    float64 with powers of 10000 in another order of operations: a few units of 1e-16.
    """
    theirs = DetrSinePositionEmbedding(8)((1, 3, 4, 5), "cpu", torch.float64)
    ours = sinusoidal_positions_2d(grid_coordinates((4, 5)) + 1, 16, dtype=torch.float64)
    torch.testing.assert_close(ours, theirs[0].flatten(1).mT, rtol=1e-10, atol=1e-12)


def test_sinusoids_by_hand():
    """Width 4: sin and cos of the row, then of the column."""
    (row,) = sinusoidal_positions_2d(torch.tensor([[2.0, 3.0]], dtype=torch.float64), 4).tolist()
    expected = [math.sin(2), math.cos(2), math.sin(3), math.cos(3)]
    assert row == pytest.approx(expected, abs=1e-7)  # rounded to float32


def test_rotation_is_dinov3s():
    """The same angles given to transformers' own rotation, class token and registers before."""
    grid, dim, before = (3, 5), 16, 2
    coordinates = grid_coordinates(grid)
    frequencies = 100.0 ** -(torch.arange(0, dim // 2, 2, dtype=torch.float64) / (dim // 2))
    angle = (coordinates[:, :, None] * frequencies).flatten(1).tile(2)
    query, key = double(2, 4, before + 15, dim), double(2, 4, before + 15, dim)
    theirs = apply_rotary_pos_emb(query, key, angle.cos(), angle.sin())
    for x, expected in zip((query, key), theirs, strict=True):
        torch.testing.assert_close(turned(x, coordinates), expected, rtol=1e-10, atol=1e-12)


def test_rotation_by_hand():
    """Four channels: (0, 2) turn by the row, (1, 3) by the column, both with frequency 1."""
    x, place = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).double(), torch.tensor([[2.0, 3.0]]).double()
    expected = [math.cos(2), math.cos(3), math.sin(2), math.sin(3)]
    assert rotate_2d(x, place)[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_rotary_scores_depend_on_the_distance_alone():
    query, key = double(1, 32), double(1, 32)

    def score(place, offset):
        places = torch.tensor([place], dtype=torch.float64)
        there = places + torch.tensor(offset, dtype=torch.float64)
        return (rotate_2d(query, places) * rotate_2d(key, there)).sum().item()

    scores = [score(place, (2.0, -3.0)) for place in [(0, 0), (5, 1), (0.5, 11)]]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-10)
    assert abs(score((0, 0), (-3.0, 2.0)) - scores[0]) > 1e-3  # down is not across


@pytest.mark.parametrize("new", [(4, 6), (8, 3), (9, 13)], ids=str)
def test_interpolation_reads_a_slope_as_a_slope(new):
    """P[row, column] = (row, column) is read at the new coordinates, away from the edges.

    Keys' cubic with torch's a = -3/4 errs on a line by t (1 - t) (2t - 1) / 2 between two rows, at
    most 0.0482; at t = 1/2, where the other two grids read it, by nothing.
    """
    trained = (8, 12)
    table = grid_coordinates(trained)
    read = interpolated_positions(table, trained, new)
    want = grid_coordinates(new, trained)
    edge = torch.tensor(trained) - 2.0
    inside = ((want >= 1) & (want <= edge)).all(-1)
    assert inside.sum() >= 4
    limit = 0.0482 if new == (9, 13) else 1e-12
    assert (read[inside] - want[inside]).abs().max() < limit


def test_interpolation_to_the_same_grid_changes_nothing():
    table = double(15, 4)
    assert interpolated_positions(table, (3, 5), (3, 5)) is table


def test_without_coordinates_it_is_multi_head_attention():
    layer = GridAttention(16, 4).double()
    plain = MultiHeadAttention(16, 4).double()
    plain.load_state_dict(layer.state_dict())
    x = double(2, 7, 16)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("coordinates", [None, grid_coordinates((2, 3))], ids=["none", "rotary"])
def test_weights_are_those_that_the_output_averages_with(coordinates):
    """weights · values, put through the output projection, is the layer; so it is by torch's."""
    layer, x = GridAttention(16, 4).double(), double(2, 8, 16)
    query, key, value = layer.project(x)
    weights = layer.weights(x, coordinates)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 8).double())
    heads = (weights @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.output(heads), layer(x, coordinates), rtol=1e-10, atol=1e-12)
    if coordinates is None:
        heads = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(layer.output(heads), layer(x), rtol=1e-10, atol=1e-12)


def test_tokens_before_the_patches_are_not_turned():
    x, coordinates = double(1, 2, 9, 8), grid_coordinates((2, 3)) + 1
    out = turned(x, coordinates)
    assert torch.equal(out[..., :3, :], x[..., :3, :])
    assert ((out[..., 3:, :] - x[..., 3:, :]).abs().amax(-1) > 1e-3).all()


@pytest.mark.usefixtures("unchecked")
def test_channels_come_in_fours():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        rotate_2d(torch.rand(1, 6), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="multiple of 4, got 2"):
        sinusoidal_positions_2d(torch.zeros(1, 2), 2)


@pytest.mark.usefixtures("unchecked")
def test_a_table_is_the_grid_that_it_is_said_to_be():
    with pytest.raises(ValueError, match="16 positions are no grid of 3 x 5"):
        interpolated_positions(torch.rand(16, 4), (3, 5), (6, 10))
    with pytest.raises(ValueError, match="4 tokens need as many positions"):
        rotate_2d(torch.rand(4, 8), torch.zeros(3, 2))
