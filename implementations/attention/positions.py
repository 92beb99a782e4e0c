"""Positions: attention alone treats its tokens as a set. Four ways to tell it their order.

    sinusoidal   x + P       P[p, 2i] = sin(p f_i)    P[p, 2i + 1] = cos(p f_i)
    learned      x + P       P is trained, one row a position
    rotary       every pair i of channels of a query or key at p is turned by the angle p f_i
    ALiBi        score - slope_head · |p_query - p_key|

    frequencies  f_i = base ** (-2i / dim),  i = 0 ... dim/2 - 1

Turning a query by a and a key by b changes their dot product by b - a alone, so rotary scores
depend on the distance and not on the place. Which channels make a pair is a convention, and the two
in use are silent about each other: a model read in the wrong one runs, and is wrong.

    interleaved  (0, 1), (2, 3), ...                the paper, GPT-J, Llama in GGUF files
    half split   (0, dim/2), (1, dim/2 + 1), ...    GPT-NeoX, Llama at Hugging Face

Paper   sinusoidal: Vaswani et al. 2017, arXiv:1706.03762, section 3.5
        rotary: Su et al. 2021, arXiv:2104.09864    ALiBi: Press et al. 2021, arXiv:2108.12409
Shapes  x [..., token, dim], dim being one head's in rotary    bias [head, query, key]
Fast    positions_triton.py: rotary, one launch
Run     uv run python implementations/attention/positions.py
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

INTERLEAVED, HALF_SPLIT = "(pair side)", "(side pair)"

Positions = Int[Tensor, " token"] | Float[Tensor, " token"]


def angles(
    positions: Float[Tensor, " token"], dim: int, base: float
) -> Float[Tensor, "token pair"]:
    """p · base ** (-2i / dim), in the dtype of the positions.

    Raises:
        ValueError: `dim` is odd.
    """
    check_pairs(dim)
    channel = torch.arange(0, dim, 2, dtype=positions.dtype, device=positions.device)
    return positions[:, None] * base ** (-channel / dim)


def check_pairs(dim: int) -> None:
    """Raise ValueError unless `dim` channels make pairs."""
    if dim % 2:
        raise ValueError(f"channels are taken in pairs, so their number must be even, got {dim}")


def sinusoidal_positions(
    count: int, width: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "count width"]:
    """Sines in the even channels, cosines in the odd ones (section 3.5 of Vaswani et al.).

    Computed in float64 and rounded once to `dtype`.

    Raises:
        ValueError: `width` is odd.
    """
    angle = angles(torch.arange(count, dtype=torch.float64), width, base)
    waves = torch.stack((angle.sin(), angle.cos()))
    return rearrange(waves, f"side token pair -> token {INTERLEAVED}").to(dtype)


class LearnedPositions(nn.Module):
    """Adds a trained vector to each token: row p of a table to the token at p.

    Args:
        count: how many positions there are, the length of the longest input.
        width: size of a token's vector.
    """

    def __init__(self, count: int, width: int):
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(count, width))  # GPT-2's and BERT's scale

    def forward(
        self, x: Float[Tensor, "*batch token width"], start: int = 0
    ) -> Float[Tensor, "*batch token width"]:
        """x plus the rows of the table after `start` tokens that were read before.

        Raises:
            ValueError: more tokens than positions, or another width than the table's.
        """
        (count, width), end = self.table.shape, start + x.shape[-2]
        if end > count:
            raise ValueError(f"{end} tokens do not fit into {count} learned positions")
        if x.shape[-1] != width:
            raise ValueError(f"the positions have width {width}, the tokens {x.shape[-1]}")
        return x + self.table[start:end]


def rotate_interleaved(
    x: Float[Tensor, "*batch token dim"], positions: Positions | None = None, base: float = 10000.0
) -> Float[Tensor, "*batch token dim"]:
    """Rotary positions on the pairs (0, 1), (2, 3), ...: the efficient realization of Su et al.

    Arguments and errors are those of `rotate_pairs`.
    """
    return rotate_pairs(x, positions, base, INTERLEAVED)


def rotate_half_split(
    x: Float[Tensor, "*batch token dim"], positions: Positions | None = None, base: float = 10000.0
) -> Float[Tensor, "*batch token dim"]:
    """Rotary positions on the pairs (0, dim/2), (1, dim/2 + 1), ...

    Arguments and errors are those of `rotate_pairs`.
    """
    return rotate_pairs(x, positions, base, HALF_SPLIT)


def rotate_pairs(
    x: Float[Tensor, "*batch token dim"], positions: Positions | None, base: float, layout: str
) -> Float[Tensor, "*batch token dim"]:
    """(first, second) -> (first cos - second sin, first sin + second cos), pair by pair.

    Angles and products are in float32 or wider: bfloat16 cannot even name position 257.

    Args:
        x: queries or keys, split into heads.
        positions: where each token stands, 0, 1, 2, ... unless given.
        base: the slowest pair turns once in 2π · base ** (1 - 2 / dim) tokens.
        layout: INTERLEAVED or HALF_SPLIT.

    Raises:
        ValueError: the last axis is odd, or there is not one position for each token.
    """
    tokens, dim = x.shape[-2:]
    positions = torch.arange(tokens, device=x.device) if positions is None else positions
    if positions.shape != (tokens,):
        raise ValueError(f"{tokens} tokens need as many positions, got {list(positions.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    angle = angles(positions.to(x.device, wide), dim, base)
    cos, sin = angle.cos(), angle.sin()
    first, second = rearrange(x.to(wide), f"... {layout} -> side ... pair", side=2)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos))
    return rearrange(turned, f"side ... pair -> ... {layout}").to(x.dtype)


def interleaved_to_half_split(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Reorder the channels of one head, so that rotating, then reordering, is reordering, then
    rotating in the other layout: to the bit.

    Raises:
        ValueError: the last axis is odd.
    """
    check_pairs(x.shape[-1])
    return rearrange(x, f"... {INTERLEAVED} -> ... {HALF_SPLIT}", side=2)


def half_split_to_interleaved(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """The inverse of `interleaved_to_half_split`, with its errors."""
    check_pairs(x.shape[-1])
    return rearrange(x, f"... {HALF_SPLIT} -> ... {INTERLEAVED}", side=2)


def convert_projection(
    weight: Float[Tensor, "output *width"], heads: int, convert: Callable[[Tensor], Tensor]
) -> Float[Tensor, "output *width"]:
    """A query or key projection (or its bias) that was trained for one layout, for the other.

    Values and outputs are not rotated and stay as they are.

    Args:
        weight: rows are outputs, head after head, as in `nn.Linear`.
        heads: how many heads the rows hold: for keys, the key heads.
        convert: `interleaved_to_half_split` or `half_split_to_interleaved`.

    Raises:
        ValueError: the heads do not share the rows evenly, or a head's dim is odd.
    """
    if weight.shape[0] % heads:
        raise ValueError(f"{heads} heads cannot share {weight.shape[0]} rows evenly")
    split = rearrange(weight, "(head dim) ... -> ... head dim", head=heads)
    return rearrange(convert(split), "... head dim -> (head dim) ...")


def alibi_slopes(heads: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, " head"]:
    """2 ** (-8 h / heads) for h = 1 ... heads (section 3 of Press et al.), heads a power of two.

    For other counts, the slopes of the power of two below, then every other slope of the one above,
    as in the authors' code and in BLOOM.

    Raises:
        ValueError: there is no head.
    """
    if heads < 1:
        raise ValueError(f"ALiBi needs at least one head, got {heads}")
    below = 2 ** (heads.bit_length() - 1)
    exponents = [-8 * h / below for h in range(1, below + 1)]
    exponents += [-4 * h / below for h in range(1, 2 * (heads - below), 2)]
    return torch.tensor([2**exponent for exponent in exponents], dtype=dtype)


def alibi_bias(
    heads: int, queries: int, keys: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "head query key"]:
    """-slope · |p_query - p_key|, the last query standing at the last key: a mask for attention.

    Both sides of the query are penalized alike. Under `causal=True`, the paper's case, the side
    after it is masked anyway.

    Raises:
        ValueError: there is no head, or more queries than keys.
    """
    if queries > keys:
        raise ValueError(f"ALiBi needs queries <= keys, got {queries} > {keys}")
    position = torch.arange(queries) + keys - queries
    distance = (torch.arange(keys) - position[:, None]).abs()
    return -alibi_slopes(heads, dtype)[:, None, None] * distance


def main() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1000, 64, dtype=torch.float64)
    table = sinusoidal_positions(5001, 64, dtype=torch.float64)

    def rotary(query_at: int, key_at: int, rotate=rotate_half_split) -> Tensor:
        """1000 scores, all queries standing at one place and all keys at another."""
        turned_query = rotate(query, torch.full((len(query),), query_at))
        turned_key = rotate(key, torch.full((len(key),), key_at))
        return (turned_query * turned_key).sum(-1)

    print("one query's score for a key 5 tokens back, by the place of the query")
    print("     place    added sinusoids      rotary")
    for place in (5, 50, 500, 5000):
        added = (query[0] + table[place]) @ (key[0] + table[place - 5])
        print(f"    {place:6}{added:19.6f}{rotary(place, place - 5)[0]:12.6f}")
    print("the same vectors read in the wrong layout: how far the scores move, in their own size")
    for distance in (0, 1, 5, 50):
        right, wrong = rotary(distance, 0), rotary(distance, 0, rotate_interleaved)
        moved = (wrong - right).norm() / right.norm()
        print(f"    {distance:3} tokens apart: {moved:.2f}")


if __name__ == "__main__":
    main()
