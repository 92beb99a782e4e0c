"""InfoNCE and NT-Xent: torch's cross-entropy, 2 x 2 closed forms, one as the other, gradcheck."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.testing import assert_close

from implementations.contrastive.info_nce import cosine_scores, info_nce, nt_xent, surprise, unit
from implementations.lab.compare import assert_same_function

SAME = {"rtol": 1e-10, "atol": 1e-12}


def pair(count: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, count, dim, dtype=torch.float64))


@pytest.mark.parametrize("count, dim", [(2, 1), (3, 7), (33, 16)])
def test_is_torchs_cross_entropy_of_torchs_cosines(count, dim):
    def by_torch(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        cosines = cosine_similarity(query[:, None], key[None], dim=-1)
        return cross_entropy(cosines / 0.2, torch.arange(count))

    assert_same_function(lambda q, k: info_nce(q, k, 0.2), by_torch, *pair(count, dim))


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.5])
def test_two_pairs_by_hand(angle):
    """Rows at angles 0 and 90 degrees, keys turned by `angle`: cosines c, -s / s, c.

    Row 1 has cosines c and -s with the keys, row 2 has s and c, so the losses are
    log(1 + exp((-s - c)/τ)) and log(1 + exp((s - c)/τ)).
    """
    c, s, temperature = math.cos(angle), math.sin(angle), 0.5
    query = 3 * torch.eye(2, dtype=torch.float64)
    key = torch.tensor([[c, s], [-s, c]], dtype=torch.float64) * 7
    by_hand = [math.log1p(math.exp((other - c) / temperature)) for other in (-s, s)]
    loss = info_nce(query, key, temperature)
    assert_close(loss.item(), sum(by_hand) / 2, rtol=1e-12, atol=0)


def test_two_pairs_of_views_by_hand():
    """Perfect views of two perpendicular pictures: each row sees cosines 1, 0, 0."""
    views = torch.eye(2, dtype=torch.float64)
    expected = math.log1p(2 * math.exp(-1 / 0.5))
    assert_close(nt_xent(views, views, 0.5).item(), expected, rtol=1e-12, atol=0)


def test_nt_xent_is_torchs_cross_entropy_without_the_diagonal():
    """The diagonal is cut out, where the code masks it: 2N rows of 2N - 1 candidates."""
    first, second = pair(5, 4)

    def by_torch(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        views, n = torch.cat([first, second]), len(first)
        cosines = cosine_similarity(views[:, None], views[None], dim=-1) / 0.2
        others = ~torch.eye(2 * n, dtype=torch.bool)
        cut = cosines[others].view(2 * n, 2 * n - 1)
        target = torch.tensor([i + n - 1 if i < n else i - n for i in range(2 * n)])
        return cross_entropy(cut, target)

    assert_same_function(lambda a, b: nt_xent(a, b, 0.2), by_torch, first, second)


def test_nt_xent_is_info_nce_with_one_set_in_both_places_and_self_pairs_masked():
    """Were they left in, each row would be its own best candidate, and the loss larger."""
    first, second = pair(6, 4)
    views = torch.cat([first, second])
    swapped = torch.cat([second, first])
    scores = cosine_scores(views, swapped, 0.3)  # candidate j is the other view of row j
    itself = torch.arange(12).roll(6)
    masked = scores.index_put((torch.arange(12), itself), scores.new_tensor(-torch.inf))
    assert_close(nt_xent(first, second, 0.3), surprise(masked, torch.arange(12)), **SAME)
    assert nt_xent(first, second, 0.3) < info_nce(views, swapped, 0.3)


def test_embeddings_have_no_length():
    """Scaling a row changes nothing; scaled gradients show it too."""
    query, key = pair(5, 8)
    scales = torch.rand(5, 1, dtype=torch.float64) * 9 + 0.1
    assert_close(info_nce(query * scales, key), info_nce(query, key), **SAME)
    assert_close(unit(query * scales).norm(dim=1), torch.ones(5, dtype=torch.float64), **SAME)


def test_a_colder_softmax_is_surer():
    """Where every positive is the best candidate, lower temperatures lower the loss: to 0."""
    x = torch.eye(4, dtype=torch.float64)
    losses = [info_nce(x, x, t).item() for t in (10.0, 1.0, 0.1, 0.01)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-40
    assert_close(losses[1], math.log(1 + 3 * math.exp(-1)), rtol=1e-12, atol=0)


def test_who_knows_nothing_is_surprised_by_the_log_of_all_candidates():
    x = torch.ones(8, 3, dtype=torch.float64)
    assert_close(info_nce(x, x).item(), math.log(8), rtol=1e-12, atol=0)
    assert_close(nt_xent(x, x).item(), math.log(15), rtol=1e-12, atol=0)


def test_the_order_of_the_pairs_does_not_matter():
    first, second = pair(7, 4)
    order = torch.randperm(7)
    for loss in (info_nce, nt_xent):
        assert_close(loss(first[order], second[order]), loss(first, second), **SAME)


def test_gradients_are_those_of_finite_differences():
    first, second = (x.requires_grad_() for x in pair(3, 4))
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    for loss in (info_nce, nt_xent):
        assert torch.autograd.gradcheck(loss, (first, second, temperature))


def test_half_precision_is_widened():
    first, second = (x.bfloat16() for x in pair(4, 8))
    loss = info_nce(first, second)
    assert loss.dtype == torch.float32
    exact = info_nce(first.double(), second.double())
    assert_close(loss.double(), exact, rtol=1e-5, atol=0)  # float32 sums of 8 and 4 terms


@pytest.mark.parametrize("loss", [info_nce, nt_xent])
@pytest.mark.parametrize(
    "first, second, temperature, sentence",
    [
        (torch.ones(1, 3), torch.ones(1, 3), 0.1, "undefined for 1: without a negative"),
        (torch.ones(0, 3), torch.ones(0, 3), 0.1, "undefined for 0"),
        (torch.ones(4, 3), torch.ones(3, 3), 0.1, "shapes .* agree"),
        (torch.ones(4, 3), torch.ones(4, 2), 0.1, "shapes .* agree"),
        (torch.ones(4), torch.ones(4), 0.1, "shapes .* agree"),
        (torch.ones(4, 3), torch.ones(4, 3), 0.0, "positive, got 0.0"),
        (torch.ones(4, 3), torch.ones(4, 3), -1.0, "positive, got -1.0"),
        (torch.ones(4, 3), torch.ones(4, 3), math.nan, "positive, got nan"),
        (torch.eye(4), torch.eye(4) * torch.tensor([[1.0], [1], [0], [1]]), 0.1, "has no dir"),
        (torch.ones(4, 3), torch.full((4, 3), math.nan), 0.1, "not finite"),
        (torch.full((4, 3), math.inf), torch.ones(4, 3), 0.1, "not finite"),
    ],
)
def test_bad_input(loss, first, second, temperature, sentence, unchecked):
    with pytest.raises(ValueError, match=sentence):
        loss(first, second, temperature)


def test_the_row_without_a_direction_is_named():
    with pytest.raises(ValueError, match="embedding 2 is zero"):
        unit(torch.tensor([[1.0, 0], [0, 1], [0, 0]]))
