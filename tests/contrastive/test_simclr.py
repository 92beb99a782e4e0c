"""SimCLR: which loss sees what, what is kept, and that features get better without a label."""

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.testing import assert_close

from implementations.contrastive.augmentation import Augmentation, two_views
from implementations.contrastive.probes import nearest_neighbours
from implementations.contrastive.simclr import SimCLR, view_loss
from implementations.sources.images import digits
from implementations.training.fit import fit
from implementations.training.rows import RandomRows


def test_the_loss_is_that_of_the_heads_outputs():
    """Written out for three pictures with torch's own layers and cross-entropy."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 6)).double()
    model = SimCLR(encoder, width=6, dim=4).double()
    views = torch.rand(2, 3, 3, 2, 2, dtype=torch.float64)
    total, count = view_loss(model, tuple(views))
    z = torch.cat([model.head(encoder(view)) for view in views])
    scores = cosine_similarity(z[:, None], z[None], dim=-1) / 0.1
    cut = scores[~torch.eye(6, dtype=torch.bool)].view(6, 5)
    expected = cross_entropy(cut, torch.tensor([2, 3, 4, 0, 1, 2]))
    assert count == 3
    assert_close(total / count, expected, rtol=1e-10, atol=0)


def test_features_come_from_before_the_head():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    model, pixels = SimCLR(encoder, width=6, dim=4), torch.rand(2, 3, 2, 2)
    assert torch.equal(model.features(pixels), encoder(pixels))
    assert model(pixels).shape == (2, 4)


def test_other_losses_of_two_views_fit_in():
    model = SimCLR(nn.Flatten(), width=12)
    views = torch.rand(2, 5, 3, 2, 2)
    total, _ = view_loss(model, tuple(views), lambda first, second: (first - second).sum())
    assert_close(total, 5 * (model(views[0]) - model(views[1])).sum(), rtol=1e-4, atol=1e-4)


def test_without_labels_features_become_better_neighbours():
    """40 steps on 8x8 digits; the gain is 0.02 to 0.05 over seeds, and 0 if nothing is learned."""
    torch.manual_seed(0)
    train, test = ((part.pixels / 16, part.labels) for part in digits().split())
    shaken = Augmentation(
        area=(0.5, 1.2), turn=15, shift=0.1, flip=False, saturation=0.0, background=0.0
    )
    rows = RandomRows(train[0], batch=128)
    model = SimCLR(nn.Sequential(nn.Flatten(), nn.Linear(64, 64)), width=64)

    def score() -> float:
        with torch.no_grad():
            known, asked = model.features(train[0][::29]), model.features(test[0])
        return nearest_neighbours(known, train[1][::29], asked, test[1], neighbours=1)

    before = score()
    fit(
        model,
        lambda step: tuple(two_views(rows(step), shaken, seed=0, step=step)),
        view_loss,
        steps=40,
        learning_rate=3e-3,
    )
    assert score() > before + 0.01
