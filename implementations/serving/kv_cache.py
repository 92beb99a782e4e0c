"""The KV cache: what a decoder has read stays as keys and values, so that a new token costs one
token's work.

    keys, values = cache.append(key, value)     of all tokens so far, the new ones last
    output       = attention(query, keys, values, causal)

A causal decoder's keys and values never change once they are computed, since no later token reaches
them. Kept, they make a token's pass O(text) instead of O(text²), to the same logits. A token's
place is counted from the text's start, not from what is new: rotary and learned positions go on
where the cache ends.

Paper   Pope et al. 2022, arXiv:2211.05102, section 2.1; Shazeer 2019, arXiv:1911.02150, section 2.4
Static  static_cache.py: passes of one shape, for torch.compile and CUDA graphs
Shapes  key, value [batch, key_head, token, dim]    tokens [batch, token]
Run     uv run python implementations/serving/kv_cache.py
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, in two slabs made once; the first `length` tokens are in use.

    Args:
        key: memory for the keys; what stands in it is never read before it is written.
        value: memory for the values, of the same tokens.
    """

    def __init__(
        self,
        key: Float[Tensor, "batch key_head capacity dim"],
        value: Float[Tensor, "batch key_head capacity value_dim"],
    ):
        self.key, self.value, self.length = key, value, 0

    @property
    def capacity(self) -> int:
        return self.key.shape[2]

    def append(
        self,
        key: Float[Tensor, "batch key_head new dim"],
        value: Float[Tensor, "batch key_head new value_dim"],
    ) -> tuple[
        Float[Tensor, "batch key_head token dim"], Float[Tensor, "batch key_head token value_dim"]
    ]:
        """All keys and all values so far: views, which the next append leaves as they are.

        Raises:
            ValueError: another shape, dtype or device than the cache's, more tokens than fit, or
                keys that want a gradient; nothing is written then.
        """
        start, end = self.length, self.length + key.shape[2]
        for name, new, slab in (("keys", key, self.key), ("values", value, self.value)):
            self.check(name, new, slab, end)
        self.key[:, :, start:end], self.value[:, :, start:end] = key, value
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]

    def check(self, name: str, new: Tensor, slab: Tensor, end: int) -> None:
        """Raise ValueError unless the new tokens end at `end` of this slab."""
        wanted = (*slab.shape[:2], end - self.length, slab.shape[3])
        if tuple(new.shape) != wanted:
            raise ValueError(f"the cache takes {name} of shape {wanted}, got {tuple(new.shape)}")
        if (new.dtype, new.device) != (slab.dtype, slab.device):
            kept, got = f"{slab.dtype} on {slab.device}", f"{new.dtype} on {new.device}"
            raise ValueError(f"the cache holds {name} in {kept}, got {got}")
        if end > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens, not for {end}")
        if new.requires_grad:
            raise ValueError("a cache passes no gradient on: call the model under torch.no_grad()")

    def fork(self, rows: Int[Tensor, " row"] | None = None) -> "LayerCache":
        """A copy that grows on its own."""
        slabs = (self.key, self.value)
        copy = LayerCache(*(slab.clone() if rows is None else slab[rows] for slab in slabs))
        copy.length = self.length
        return copy


class KeyValueCache:
    """One `LayerCache` for every layer of a decoder; a pass appends to each in turn."""

    def __init__(self, layers: list[LayerCache]):
        self.layers = layers

    @classmethod
    def empty(
        cls, layers: int, batch: int, key_value_heads: int, capacity: int, dim: int, **like
    ) -> "KeyValueCache":
        """Room for `capacity` tokens of `batch` texts; `like` may name a dtype and a device.

        Raises:
            ValueError: a size is below 1.
        """
        shape = (batch, key_value_heads, capacity, dim)
        if min(layers, *shape) < 1:
            raise ValueError(f"a cache needs sizes of 1 or more, got {layers} layers of {shape}")
        slabs = (torch.empty(2, *shape, **like) for _ in range(layers))
        return cls([LayerCache(*slab) for slab in slabs])

    @property
    def length(self) -> int:
        """How many tokens have been read."""
        return self.layers[0].length

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`: the next is appended there.

        Raises:
            ValueError: fewer tokens are cached, or `length` is negative.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"the cache holds {self.length} tokens, it cannot keep {length}")
        for layer in self.layers:
            layer.length = length

    def fork(self, rows: Int[Tensor, " row"] | None = None) -> "KeyValueCache":
        """A copy that grows on its own.

        Args:
            rows: which text of the batch each text of the copy continues, one text several times if
                several continuations are wanted; all texts, once, unless given.

        Raises:
            IndexError: the batch has no such row.
        """
        return KeyValueCache([layer.fork(rows) for layer in self.layers])


class CachedDecoder:
    """A decoder that reads only what it has not read: a model for `generate`.

    It keeps the text of its last call. A call whose text begins otherwise rolls the cache back to
    where the two part.

    Args:
        decoder: maps tokens and a cache to logits.
        cache: its own, with room for the whole text.
    """

    def __init__(self, decoder: Callable[..., Tensor], cache: KeyValueCache):
        self.decoder, self.cache, self.read = decoder, cache, None

    def __call__(
        self, tokens: Int[Tensor, "batch token"]
    ) -> Float[Tensor, "batch unread vocabulary"]:
        """Logits after every token that had to be read, at least after the last.

        Raises:
            ValueError: no token, another batch than the cache's, or more tokens than fit.
        """
        if not tokens.shape[1]:
            raise ValueError("a text has at least one token, got none")
        known = self.shared(tokens)
        self.cache.truncate(known)
        self.read = tokens[:, :known]  # all that is sure to be cached if the pass is interrupted
        logits = self.decoder(tokens[:, known:], self.cache)
        self.read = tokens
        return logits

    def shared(self, tokens: Int[Tensor, "batch token"]) -> int:
        """How many tokens of the cache begin this text too; the text's last is always read anew."""
        if self.read is None or len(self.read) != len(tokens):
            return 0
        most = min(self.read.shape[1], tokens.shape[1] - 1)
        same = (self.read[:, :most] == tokens[:, :most]).all(0)
        return int(same.long().cumprod(0).sum())


def main() -> None:
    from time import perf_counter

    from implementations.attention.vendor import attention_sdpa
    from implementations.models.decoder import Decoder
    from implementations.sources.weights import smollm2_tokenizer
    from implementations.text.sampling import generate

    decoder, tokenizer = Decoder.from_smollm2(attention_sdpa), smollm2_tokenizer()
    prompt = torch.tensor([tokenizer.encode("The capital of France is").ids])
    count = 32
    cached = CachedDecoder(decoder, decoder.empty_cache(1, prompt.shape[1] + count))
    texts = []
    for name, model in {"without a cache": decoder, "with a cache": cached}.items():
        start = perf_counter()
        texts.append(generate(model, prompt, count))
        print(f"{name:16} {(perf_counter() - start) / count * 1e3:6.0f} ms a token")
    print(f"the same tokens: {torch.equal(*texts)}: {tokenizer.decode(texts[0][0].tolist())!r}")


if __name__ == "__main__":
    main()
