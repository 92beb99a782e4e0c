"""Random numbers by place: a request's randomness depends on its seed and on the place in its text.

    u(seed, place, purpose)  =  52 bits of BLAKE2b(seed, place, purpose) / 2^52        in [0, 1)
    draw(p, u)               =  the first token whose p(0) + ... + p(token) is above u · sum p

A generator that several requests share hands out its numbers in the order in which they ask, so
that what one gets depends on who else is there. Here nothing is handed out: a request that was
thrown out of memory, or moved to another batch, finds the same number at the same place.

Paper   Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (SC '11): random numbers as
        a function of a key and a counter
Shapes  probability [row, vocabulary]    u [row]
Run     uv run python implementations/serving/draws.py
"""

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor


def uniform(seed: int, place: int, purpose: str = "token") -> float:
    """A number in [0, 1) that is the same whenever it is asked for; each purpose has its own.

    52 bits, so that u · sum stays below the sum when it is rounded.
    """
    digest = hashlib.blake2b(f"{seed} {place} {purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 12) / 2**52


def draw(
    probability: Float[Tensor, "row vocabulary"], u: Float[Tensor, " row"]
) -> Int[Tensor, " row"]:
    """For each row a token with these chances, which need not sum to one, if u is uniform.

    The sums are in float64: 49,152 chances summed in float32 miss the last of them.

    Raises:
        ValueError: a row's sum is NaN, infinite or zero, so that there is nothing to draw.
    """
    sums = probability.double().cumsum(-1)
    wrong = ~(sums[:, -1].isfinite() & (sums[:, -1] > 0))
    if wrong.any():
        total = sums[wrong, -1][0].item()
        raise ValueError(f"chances sum to something positive and finite, got {total}")
    return torch.searchsorted(sums, u.double()[:, None] * sums[:, -1:], right=True)[:, 0]


def main() -> None:
    chances = torch.tensor([0.5, 0.0, 0.3, 0.2])
    u = torch.tensor([uniform(0, place) for place in range(10_000)])
    counts = draw(chances.expand(len(u), -1), u).bincount(minlength=4)
    for token, (chance, count) in enumerate(zip(chances, counts, strict=True)):
        print(f"token {token}: chance {chance:.2f}, share of 10,000 draws {count / 1e4:.3f}")


if __name__ == "__main__":
    main()
