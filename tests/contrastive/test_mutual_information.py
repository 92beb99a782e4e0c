"""The bound of InfoNCE on mutual information: Gaussians, of which SciPy knows all."""

import math

import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch.testing import assert_close

from implementations.contrastive.info_nce import surprise
from implementations.contrastive.mutual_information import (
    correlated_gaussians,
    gaussian_information,
    information_bound,
    log_density_ratio,
)


def bounds(correlation: float, dim: int, count: int, batches: int, score) -> torch.Tensor:
    """The bound of each of many independent batches."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(batches):
        x, y = correlated_gaussians(correlation, (count, dim), generator)
        loss = surprise(score(x, y), torch.arange(count))
        found.append(information_bound(loss, count))
    return torch.tensor(found, dtype=torch.float64)


def test_information_is_that_of_scipys_entropies():
    """I(x; y) = H(x) + H(y) - H(x, y), coordinate by coordinate."""
    joint = multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]]).entropy()
    expected = 5 * (2 * norm.entropy() - joint)
    assert_close(gaussian_information(0.7, 5), float(expected), rtol=1e-10, atol=0)


def test_the_ratio_is_scipys():
    x, y = torch.randn(2, 4, 3, dtype=torch.float64)
    ours, variance = log_density_ratio(x, y, 0.6), 1 - 0.6**2
    for i in range(4):
        given = multivariate_normal(0.6 * x[i].numpy(), variance)
        alone = multivariate_normal([0, 0, 0], 1)
        theirs = torch.from_numpy(given.logpdf(y.numpy()) - alone.logpdf(y.numpy()))
        assert_close(ours[i], theirs, rtol=1e-9, atol=1e-9)  # squares of distances near zero


def test_pairs_correlate_as_asked():
    """20,000 pairs; the z statistic of Fisher's transform; false alarm 1 in 1,000."""
    x, y = correlated_gaussians(0.6, (20_000, 1), torch.Generator().manual_seed(0))
    seen = torch.corrcoef(torch.cat([x, y], 1).T)[0, 1].item()
    z = (math.atanh(seen) - math.atanh(0.6)) * math.sqrt(20_000 - 3)
    assert abs(z) < 3.29


@pytest.mark.parametrize("correlation", [0.3, 0.8])
def test_the_bound_holds_and_the_best_score_comes_close(correlation):
    """200 batches of 256: below the truth by 3.1 standard errors' slack (1 in 1,000), and within
    0.02 nats or a tenth of it, where log N = 5.5 leaves room."""
    known = gaussian_information(correlation, 2)
    seen = bounds(correlation, 2, 256, 200, lambda x, y: log_density_ratio(x, y, correlation))
    error = seen.std().item() / math.sqrt(len(seen))
    assert seen.mean().item() <= known + 3.1 * error
    assert seen.mean().item() >= known - max(0.02, 0.1 * known) - 3.1 * error


def test_a_worse_score_gives_a_lower_bound():
    """The same batches scored as if the correlation were 0.5: 200 paired differences, z > 3.3."""
    best = bounds(0.8, 4, 64, 200, lambda x, y: log_density_ratio(x, y, 0.8))
    worse = bounds(0.8, 4, 64, 200, lambda x, y: log_density_ratio(x, y, 0.5))
    difference = best - worse
    assert difference.mean() > 3.3 * difference.std() / math.sqrt(200)


def test_the_bound_never_passes_log_n():
    """Much more is known, 37 nats, than 16 candidates can ask for: log 16 = 2.77."""
    assert gaussian_information(0.999, 12) > 37
    seen = bounds(0.999, 12, 16, 20, lambda x, y: log_density_ratio(x, y, 0.999))
    assert (seen <= math.log(16)).all()
    assert seen.mean() > 0.99 * math.log(16)


def test_adding_anything_of_the_query_alone_changes_nothing():
    scores = torch.randn(6, 6, dtype=torch.float64)
    shifted = scores + torch.randn(6, 1, dtype=torch.float64)
    rows = torch.arange(6)
    assert_close(surprise(shifted, rows), surprise(scores, rows), rtol=1e-10, atol=0)


def test_bad_input():
    with pytest.raises(ValueError, match="at least 2 candidates, got 1"):
        information_bound(0.0, 1)
    with pytest.raises(ValueError, match="between -1 and 1"):
        gaussian_information(1.0, 3)
