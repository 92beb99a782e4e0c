"""InfoNCE: among N candidates, find the one that belongs to you.

    score_ij = cosine(query_i, key_j) / temperature
    InfoNCE  = mean over i of  -log  exp(score_ii) / sum_j exp(score_ij)

Each key is the positive of one query and a negative of all others. NT-Xent is InfoNCE with one set
in both places: the two views of N pictures are 2N rows, each looks for its other view among 2N - 1
candidates, and its score with itself, which is the largest there is, is masked out.

Paper   InfoNCE: van den Oord et al. 2018, arXiv:1807.03748, equation 4
        NT-Xent: Chen et al. 2020, arXiv:2002.05709, equation 1
Shapes  query, key [pair, dim]    scores [query, candidate]
Run     uv run python implementations/contrastive/info_nce.py
"""

import math

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

Temperature = float | Float[Tensor, ""]


def info_nce(
    query: Float[Tensor, "pair dim"],
    key: Float[Tensor, "pair dim"],
    temperature: Temperature = 0.1,
) -> Float[Tensor, ""]:
    """The mean surprise of each query at its own key among all keys, in nats.

    One direction only: keys do not look for queries (see clip.py).

    Raises:
        ValueError: shapes that do not pair, a single pair, a temperature that is not positive, or
            an embedding that has no direction.
    """
    check_pairs(query, key)
    scores = cosine_scores(query, key, temperature)
    return surprise(scores, torch.arange(len(query), device=query.device))


def nt_xent(
    first: Float[Tensor, "pair dim"],
    second: Float[Tensor, "pair dim"],
    temperature: Temperature = 0.1,
) -> Float[Tensor, ""]:
    """InfoNCE of both views of each picture among all 2N views, without the self-pairs.

    Errors are those of `info_nce`.
    """
    check_pairs(first, second)
    views, rows = torch.cat([first, second]), torch.arange(2 * len(first), device=first.device)
    scores = cosine_scores(views, views, temperature)
    itself = rows[:, None] == rows
    return surprise(scores.masked_fill(itself, -torch.inf), rows.roll(len(first)))


def surprise(
    scores: Float[Tensor, "query candidate"], positive: Int[Tensor, " query"]
) -> Float[Tensor, ""]:
    """Mean of -log softmax(scores) at each query's positive; a score of -inf is no candidate."""
    chosen = scores.gather(1, positive[:, None])[:, 0]
    return (scores.logsumexp(1) - chosen).mean()


def cosine_scores(
    query: Float[Tensor, "query dim"],
    key: Float[Tensor, "candidate dim"],
    temperature: Temperature,
) -> Float[Tensor, "query candidate"]:
    """Cosines of all queries with all keys over the temperature, in float32 or wider.

    Raises:
        ValueError: the temperature is not positive, or an embedding has no direction.
    """
    if not temperature > 0:  # NaN is not either
        raise ValueError(f"a temperature is positive, got {float(temperature)}")
    return einsum(unit(query), unit(key), "query dim, key dim -> query key") / temperature


def unit(x: Float[Tensor, "*batch row dim"]) -> Float[Tensor, "*batch row dim"]:
    """Each row scaled to length one, in float32 or wider.

    Raises:
        ValueError: a row of zeros, which has no direction, or a number that is not finite.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    length = x.norm(dim=-1, keepdim=True)
    if not length.isfinite().all():
        raise ValueError("an embedding is not finite: the model has diverged")
    if (length == 0).any():
        row = int((length.flatten() == 0).nonzero()[0])
        raise ValueError(f"embedding {row} is zero and has no direction: nothing is like it")
    return x / length


def check_pairs(first: Tensor, second: Tensor) -> None:
    """Raise ValueError unless row i of the one can belong to row i of the other, for several i."""
    if first.ndim != 2 or first.shape != second.shape:
        shapes = f"{list(first.shape)} and {list(second.shape)}"
        raise ValueError(f"row i of both sides is a pair, so shapes [pair, dim] agree: {shapes}")
    if len(first) < 2:
        raise ValueError(
            f"InfoNCE chooses among pairs and is undefined for {len(first)}: without a negative "
            "it is zero whatever the model says"
        )


def main() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 64, 32)
    print("64 pairs: the loss of views that share a part of themselves")
    print("   shared     InfoNCE     NT-Xent")
    for shared in (0.0, 0.5, 0.9, 1.0):
        view = shared * first + (1 - shared) * second
        losses = info_nce(first, view).item(), nt_xent(first, view).item()
        print(f"{shared:9.1f}{losses[0]:12.3f}{losses[1]:12.3f}")
    chance = math.log(64), math.log(127)
    print(f"  guessing{chance[0]:11.3f}{chance[1]:12.3f}")


if __name__ == "__main__":
    main()
