"""Losses without negatives: by hand, with and without what keeps them from collapse."""

import math

import pytest
import torch
from scipy.spatial.distance import pdist
from torch import nn
from torch.testing import assert_close

from implementations.contrastive.geometry import effective_rank
from implementations.contrastive.info_nce import nt_xent, unit
from implementations.contrastive.without_negatives import (
    SimSiam,
    align_and_spread,
    positives_only,
)


def trained_rank(loss_of, seed: int = 0) -> float:
    """The effective rank of a linear map of 64 points after 150 steps, of 8."""
    torch.manual_seed(seed)
    encoder, points = nn.Linear(16, 8), torch.randn(64, 16)
    extra = list(loss_of.parameters()) if isinstance(loss_of, nn.Module) else []
    optimizer = torch.optim.Adam([*encoder.parameters(), *extra], lr=0.02)
    for _ in range(150):
        first, second = points + 0.3 * torch.randn(2, 64, 16)
        loss = loss_of(encoder(first), encoder(second))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return effective_rank(encoder(points).detach())


def test_positives_only_is_the_squared_distance_by_hand():
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[0.0, 3.0], [0.0, 1.0]])
    assert_close(positives_only(first, second).item(), (2 + 0) / 2, rtol=1e-6, atol=0)


def test_align_and_spread_is_that_of_scipys_distances():
    first, second = torch.randn(2, 6, 4, dtype=torch.float64)
    spread = [torch.from_numpy(pdist(unit(x).numpy()) ** 2) for x in (first, second)]
    expected = (unit(first) - unit(second)).square().sum(1).mean()
    expected += sum((-2 * squares).exp().mean().log() for squares in spread) / 2
    assert_close(align_and_spread(first, second), expected, rtol=1e-10, atol=0)


def test_simsiam_is_the_papers_pseudocode():
    """D(p1, z2)/2 + D(p2, z1)/2 with D the negative cosine, targets detached."""
    loss = SimSiam(4, 3).double()
    first, second = torch.randn(2, 5, 4, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity
    p1, p2 = loss.predictor(first), loss.predictor(second)
    expected = -(cosine(p1, second).mean() + cosine(p2, first).mean()) / 2
    assert_close(loss(first, second), expected, rtol=1e-10, atol=0)


def test_simsiams_target_gets_no_gradient():
    first, second = (x.requires_grad_() for x in torch.randn(2, 5, 4))
    loss = SimSiam(4, 3)
    loss.predicted(first, second).backward()
    assert second.grad is None and first.grad is not None
    SimSiam(4, 3, stop=False).predicted(first, second).backward()
    assert second.grad is not None


def test_a_single_vector_is_perfect_for_positives_only_and_bad_for_the_rest():
    same = torch.ones(8, 3)
    assert positives_only(same, same) < 1e-12
    assert_close(align_and_spread(same, same).item(), 0.0, rtol=0, atol=1e-5)  # the worst spread
    assert_close(nt_xent(same, same).item(), math.log(15), rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_only_positives_collapse(seed):
    """Ranks are 1.0 to 1.1 of 8 without negatives and above 7 with either kind of push."""
    assert trained_rank(positives_only, seed) < 1.5
    assert trained_rank(nt_xent, seed) > 6
    assert trained_rank(align_and_spread, seed) > 6


@pytest.mark.parametrize("loss", [positives_only, align_and_spread, SimSiam(3, 2)])
def test_bad_input(loss, unchecked):
    with pytest.raises(ValueError, match="undefined for 1"):
        loss(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"shapes .* agree"):
        loss(torch.ones(4, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="no direction"):
        loss(torch.ones(4, 3), torch.zeros(4, 3))
