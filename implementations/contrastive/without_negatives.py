"""Losses without negatives: one that collapses, and two ways in which others do not.

    positives only   mean |x_i - y_i|²                          best where all x are one vector
    SimSiam          mean -cosine(predictor(x_i), stop(y_i))    and the other way round, halved
    with uniformity  mean |x_i - y_i|² + log mean exp(-2 |x_i - x_j|²)

If nothing pushes pictures apart, "all are alike" is a perfect answer, and gradient descent finds
it. InfoNCE's denominator pushes, and so does uniformity, which is that denominator by itself.
SimSiam pushes nothing: it only does not let the target come to meet the prediction. Why that
suffices, where it does, is known for linear models alone.

Paper   SimSiam: Chen & He 2020, arXiv:2011.10566, algorithm 1; why: Tian et al. 2021,
        arXiv:2102.06810; alignment and uniformity: Wang & Isola 2020, arXiv:2005.10242
Shapes  first, second [pair, dim]
Run     uv run python implementations/contrastive/without_negatives.py
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implementations.contrastive.geometry import effective_rank
from implementations.contrastive.info_nce import check_pairs, nt_xent, unit


def positives_only(
    first: Float[Tensor, "pair dim"], second: Float[Tensor, "pair dim"]
) -> Float[Tensor, ""]:
    """The alignment of the pairs, with its gradient. Errors are those of `info_nce`."""
    check_pairs(first, second)
    return (unit(first) - unit(second)).square().sum(1).mean()


def align_and_spread(
    first: Float[Tensor, "pair dim"], second: Float[Tensor, "pair dim"], t: float = 2.0
) -> Float[Tensor, ""]:
    """Alignment plus the uniformity of each side, halved. Errors are those of `info_nce`."""
    aligned, spread = positives_only(first, second), 0.0
    for side in (first, second):
        squares = torch.pdist(unit(side)).square()
        spread = spread + torch.logsumexp(-t * squares, 0) - math.log(len(squares))
    return aligned + spread / 2


class SimSiam(nn.Module):
    """Each view predicts the other one, which is taken as given.

    Args:
        dim: size of the embeddings.
        hidden: size of the predictor's middle.
        stop: whether the target is taken as given; without it, this collapses too.
    """

    def __init__(self, dim: int, hidden: int, *, stop: bool = True):
        super().__init__()
        self.predictor = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.stop = stop

    def forward(
        self, first: Float[Tensor, "pair dim"], second: Float[Tensor, "pair dim"]
    ) -> Float[Tensor, ""]:
        """From -1, where every prediction is right, to 1. Errors are those of `info_nce`."""
        check_pairs(first, second)
        return (self.predicted(first, second) + self.predicted(second, first)) / 2

    def predicted(self, seen: Tensor, target: Tensor) -> Float[Tensor, ""]:
        target = target.detach() if self.stop else target
        return -(unit(self.predictor(seen)) * unit(target)).sum(1).mean()


def main() -> None:
    print("a linear map of points in 32 dimensions, views being the points with noise")
    for name in ("NT-Xent", "align and spread", "positives only"):
        torch.manual_seed(0)
        losses = {"NT-Xent": nt_xent, "align and spread": align_and_spread}
        loss_of, encoder = losses.get(name, positives_only), nn.Linear(32, 16)
        optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
        points = torch.randn(128, 32)
        for _ in range(200):
            first, second = points + 0.5 * torch.randn(2, *points.shape)
            loss = loss_of(encoder(first), encoder(second))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rank = effective_rank(encoder(points).detach())
        print(f"  {name:18} effective rank {rank:5.2f} of 16, loss {loss:.4f}")


if __name__ == "__main__":
    main()
