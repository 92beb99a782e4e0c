"""Attention: every token asks a question of all tokens and receives a weighted average of their
answers.

    weights = softmax(query keyᵀ / sqrt(dim))        one row a query, each row sums to one
    output  = weights value

A query and a key are compared by their dot product. Its variance grows with dim, so it is divided
by sqrt(dim), which keeps the softmax from saturating. This file is the equation; all attention in
this repository is checked against it.

Paper   Vaswani et al. 2017, arXiv:1706.03762
Shapes  query [..., head, query, dim]    key, value [..., key_head, key, dim]: torch's layout
Run     uv run python implementations/attention_basic.py
        uv run python implementations/attention_basic.py --text "The bank of the river flooded."
        --layer 0 --head 5
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import einsum, repeat
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from implementations.lab.command_line import clear_errors
from implementations.lab.compare import allowed, error

Mask = Bool[Tensor, "... #query #key"] | Float[Tensor, "... #query #key"]


def attention_naive(
    query: Float[Tensor, "*batch head query dim"],
    key: Float[Tensor, "*batch key_head key dim"],
    value: Float[Tensor, "*batch key_head key value_dim"],
    *,
    causal: bool = False,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Float[Tensor, "*batch head query value_dim"]:
    """softmax(query keyᵀ · scale) value, equation 1 of the paper.

    Computed in float32 or wider, returned in the query's dtype. Arguments and errors are those of
    `attention_weights`. A query that sees no key gets zeros.
    """
    weights = attention_weights(query, key, causal=causal, mask=mask, scale=scale)
    value = repeat_heads(value, query.shape[-3]).to(weights.dtype)
    return einsum(weights, value, "... query key, ... key dim -> ... query dim").to(query.dtype)


def attention_weights(
    query: Float[Tensor, "*batch head query dim"],
    key: Float[Tensor, "*batch key_head key dim"],
    *,
    causal: bool = False,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Float[Tensor, "*batch head query key"]:
    """Who looks at whom: each row is a distribution over keys, or zeros where no key is allowed.

    Args:
        causal: query i sees key j only if j <= i + keys - queries; the last query sees them all.
        mask: True where a query may look, or a number added to the score (-inf forbids).
        scale: factor on the scores, dim ** -0.5 unless given.

    Raises:
        ValueError: causal with more queries than keys, key heads that do not divide the heads, or a
            mask of integers, of which nobody can say what they mean.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    key = repeat_heads(key, query.shape[-3]).to(wide)
    scores = einsum(query.to(wide), key, "... query dim, ... key dim -> ... query key")
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(future(*scores.shape[-2:], scores.device), -torch.inf)
    if mask is not None:
        scores = masked(scores, mask)
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)  # its softmax would be 0 / 0
    weights = scores.masked_fill(sees_nothing, 0.0).softmax(-1)
    return weights.masked_fill(sees_nothing, 0.0)


def masked(
    scores: Float[Tensor, "*batch head query key"], mask: Mask
) -> Float[Tensor, "*batch head query key"]:
    """Scores with -inf where a Boolean mask is False, or with a floating-point mask added."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    if not mask.is_floating_point():
        raise ValueError(f"a mask is Boolean or added to the scores as floats, got {mask.dtype}")
    return scores + mask


def future(
    queries: int, keys: int, device: torch.device | None = None
) -> Bool[Tensor, "query key"]:
    """True where a key comes after its query, the last query standing at the last key."""
    if queries > keys:
        raise ValueError(f"causal attention needs queries <= keys, got {queries} > {keys}")
    position = torch.arange(queries, device=device) + keys - queries
    return torch.arange(keys, device=device) > position[:, None]


def repeat_heads(
    x: Float[Tensor, "*batch key_head key dim"], heads: int
) -> Float[Tensor, "*batch head key dim"]:
    """Grouped-query attention: heads 0, 1, ... of one group all read the same key head."""
    key_heads = x.shape[-3]
    if heads % key_heads:
        raise ValueError(f"{key_heads} key heads cannot be shared evenly by {heads} query heads")
    return repeat(x, "... head key dim -> ... (head group) key dim", group=heads // key_heads)


@dataclass(frozen=True)
class Config:
    """Follow one sentence through one attention head of MiniLM, a real pretrained model."""

    text: str = "The animal didn't cross the street because it was too tired."
    """what the model reads"""
    layer: int = 3
    """which of its 6 layers, from 0"""
    head: int = 1
    """which of the layer's 12 heads, from 0"""
    output: Path = Path("attention.png")
    """where the heat map is saved"""


def main(config: Config) -> None:
    # Imported here, not above, because the encoder is built from this file.
    from implementations.lab.pictures import check_writable, heat_map, save_figure
    from implementations.models.encoder import Encoder
    from implementations.sources.weights import minilm_tokenizer

    check_writable(config.output)
    encoder, encoded = Encoder.from_minilm(), minilm_tokenizer().encode(config.text)
    encoder.config.check_layer_and_head(config.layer, config.head)
    tokens = encoded.tokens
    if len(tokens) <= 2:  # only [CLS] and [SEP]
        raise ValueError("the text is empty: give at least one word")

    step(1, "The words", config.text)
    step(2, "Tokens", " ".join(tokens))
    print(f"{'':18}{encoded.ids}")
    with torch.no_grad():
        hidden = encoder.hidden_states(torch.tensor([encoded.ids]))
        projected = encoder.blocks[config.layer].attention.project(hidden[config.layer])
    step(3, "Embeddings", "a vector for every token", hidden[0][0])
    step(
        4,
        f"Layer {config.layer}",
        f"the vectors after {config.layer} layers",
        hidden[config.layer][0],
    )
    step(5, "Heads", f"the width split into heads; this is head {config.head}", projected[0][0])
    query, key, value = (x[0, config.head, None] for x in projected)
    step(6, "Query, key", "what each token asks, and what it answers to", query[0])

    scores = (query @ key.mT)[0] / query.shape[-1] ** 0.5
    weights, output = attention_weights(query, key)[0], attention_naive(query, key, value)
    focus = tokens.index("it") if "it" in tokens else 1
    step(7, "Scores", f"query · key / sqrt({query.shape[-1]})", scores)
    print_row(tokens, scores[focus], focus)
    step(8, "Weights", f"softmax: rows sum to {weights.sum(-1).mean():.3f}", weights)
    print_row(tokens, weights[focus], focus)
    print_looks(tokens, weights)
    step(9, "Output", "each token's average of the values, by its weights", output[0])
    step(10, "Is it right?", "largest error against the equation in float64")
    check(query, key, value)

    title = f"MiniLM, layer {config.layer}, head {config.head}: who looks at whom"
    save_figure(heat_map(weights.numpy(), tokens, tokens, title), config.output)
    print(f"Heat map saved to {config.output}")
    if torch.cuda.is_available():
        compare_on_cuda()


def step(number: int, name: str, meaning: str, x: Tensor | None = None) -> None:
    """Print one step of the walk, with the shape of what it made."""
    shape = "" if x is None else f"[{', '.join(map(str, x.shape))}] "
    print(f"{number:2}. {name:14}{shape}{meaning}")


def print_row(tokens: list[str], row: Tensor, position: int, columns: int = 10) -> None:
    """One row of a matrix, the words above its first numbers."""
    width = max(6, *(len(token) + 1 for token in tokens[:columns]))
    print(f"{'':18}" + "".join(f"{token:>{width}}" for token in tokens[:columns]) + "  …")
    numbers = "".join(f"{number:{width}.2f}" for number in row[:columns])
    print(f"    {tokens[position]:14}{numbers}  …")


def print_looks(tokens: list[str], weights: Tensor, rows: int = 32) -> None:
    """The three tokens that each of the first tokens looks at most."""
    for token, row in list(zip(tokens, weights, strict=True))[:rows]:
        best = row.topk(3)
        pairs = zip(best.values, best.indices, strict=True)
        looks = ", ".join(f"{tokens[i]} {weight:.2f}" for weight, i in pairs)
        print(f"    {token!r:14}looks at {looks}")


def check(query: Tensor, key: Tensor, value: Tensor) -> None:
    """This file and torch's kernel, both against this file in float64."""
    exact = attention_naive(query.double(), key.double(), value.double())
    naive, torch_kernel = attention_naive(query, key, value), sdpa(query, key, value)
    print(f"    this file         {error(naive, exact).largest:.1e}")
    limit = allowed(naive, exact).largest
    print(f"    torch's kernel    {error(torch_kernel, exact).largest:.1e}, allowed {limit:.1e}")


def compare_on_cuda() -> None:
    """The CUDA paths next to the equation: error, allowed error, speed ratio."""
    from implementations.lab.timing import time_interleaved

    paths = {"torch's kernel": sdpa}
    inputs = [torch.randn(2, 16, 2048, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    naive, exact = attention_naive(*inputs), attention_naive(*(x.double() for x in inputs))
    timings = time_interleaved({"naive": attention_naive, **paths}, *inputs)
    print(f"On {torch.cuda.get_device_name()}, bfloat16, {list(inputs[0].shape)}:")
    for name, path in paths.items():
        seen, limit = error(path(*inputs), exact).mean, allowed(naive, exact).mean
        times = timings.ratio(name, "naive")
        print(
            f"    {name:18}mean error {seen:.1e}, allowed {limit:.1e}; {times:.1f} x naive's speed"
        )


if __name__ == "__main__":
    import tyro

    with clear_errors():
        main(tyro.cli(Config))
