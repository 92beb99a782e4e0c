"""Retrieval: does a query find what belongs to it among the first k of all candidates?

    rank_i   = candidates that score at least as high as the right one, itself included
    recall@k = share of queries with rank_i <= k

A tie counts against the query. If it did not, a model whose embeddings are all alike would retrieve
everything.

Paper   recall@k both ways: Radford et al. 2021, arXiv:2103.00020, section 3.1
Shapes  scores [query, candidate]
Run     uv run python implementations/contrastive/retrieval.py
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def ranks(
    scores: Float[Tensor, "query candidate"], positive: Int[Tensor, " query"] | None = None
) -> Int[Tensor, " query"]:
    """The place of each query's own candidate, from 1, the last of those that tie with it.

    Args:
        positive: the candidate that belongs to each query; candidate i to query i unless given.

    Raises:
        ValueError: no candidate belongs to some query, or a score is NaN, which is never in order.
    """
    queries, candidates = scores.shape
    positive = torch.arange(queries, device=scores.device) if positive is None else positive
    if len(positive) != queries or not ((positive >= 0) & (positive < candidates)).all():
        raise ValueError(f"each of {queries} queries needs one of {candidates} candidates")
    if scores.isnan().any():
        raise ValueError("a score is NaN, and has no place among the others")
    right = scores.gather(1, positive[:, None])
    return (scores >= right).sum(1)


def recall(place: Int[Tensor, " query"], k: int) -> float:
    """The share of queries whose own candidate is among the first k.

    Raises:
        ValueError: k is below 1, or there are no queries.
    """
    if k < 1 or not len(place):
        raise ValueError(f"recall@k needs k >= 1 and a query, got {k} and {len(place)} queries")
    return (place <= k).double().mean().item()


def recalls_both_ways(
    scores: Float[Tensor, "image text"], at: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    """recall@k of texts for pictures and of pictures for texts, row i belonging to column i.

    Errors are those of `ranks` and `recall`.
    """
    ways = {"image to text": ranks(scores), "text to image": ranks(scores.T)}
    return {f"{way} @{k}": recall(place, k) for way, place in ways.items() for k in at}


def main() -> None:
    torch.manual_seed(0)
    image, noise = torch.randn(2, 1000, 64)
    print("1,000 pictures and texts that share a part of themselves")
    for shared in (0.0, 0.1, 0.3, 0.5):
        scores = image @ (shared * image + (1 - shared) * noise).T
        found = ", ".join(f"@{k} {recall(ranks(scores), k):.3f}" for k in (1, 5, 10))
        print(f"  {shared:.1f} shared: recall {found}")
    print(f"  all alike: recall @1 {recall(ranks(torch.zeros(1000, 1000)), 1):.3f}")


if __name__ == "__main__":
    main()
