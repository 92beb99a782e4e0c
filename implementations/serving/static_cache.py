"""The static cache: a pass over one token whose shapes are the same at every length of the text.

    write    keys[positions] = key            positions stand in a tensor, not in Python
    attend   all keys of the slab, those after the query's own position masked

A cache that grows hands out longer views at every step: torch.compile would compile anew, and a
CUDA graph repeats exactly the pass that was captured. Here the length is a tensor that the pass
reads, everything else stays as it is, so one program serves every step. It pays with attention over
the whole slab (paged_triton.py reads only what is used, with the length in a tensor too).

    prompt   the usual pass, which writes to the same slabs
    tokens   the static pass: as it is, compiled, or captured

Paper   none; "static cache" in transformers, CUDA graphs in gpt-fast
Run     uv run python implementations/serving/static_cache.py
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from implementations.models.decoder import Decoder
from implementations.serving.kv_cache import KeyValueCache, LayerCache


class StaticLayer:
    """The slabs of one layer, written where `positions` says and always read whole.

    Args:
        layer: whose memory this is.
        positions: of the pass's tokens in their text; all layers share it.
        attention: any function with the signature of `attention_naive` that takes a mask.
    """

    def __init__(
        self, layer: LayerCache, positions: Int[Tensor, " new"], attention: Callable[..., Tensor]
    ):
        self.key, self.value = layer.key, layer.value
        self.positions, self.attention = positions, attention

    def attend(
        self,
        query: Float[Tensor, "batch head new dim"],
        key: Float[Tensor, "batch key_head new dim"],
        value: Float[Tensor, "batch key_head new dim"],
    ) -> Float[Tensor, "batch head new dim"]:
        """Keep the new keys and values; each query looks at all up to its own position."""
        self.key.index_copy_(2, self.positions, key)
        self.value.index_copy_(2, self.positions, value)
        place = torch.arange(self.key.shape[2], device=self.positions.device)
        visible = place <= self.positions[:, None]
        return self.attention(query, self.key, self.value, mask=visible)


class StaticCache(KeyValueCache):
    """What a decoder takes as its cache in a pass of one shape over the slabs of another cache.

    What no token has been written to becomes zero: there may be a NaN, which no mask silences.

    Args:
        cache: whose memory this is; its length does not follow.
        attention: any function with the signature of `attention_naive` that takes a mask.
        new: how many tokens of each text a pass reads.

    Raises:
        ValueError: a pass reads no token, or more than fit.
    """

    def __init__(self, cache: KeyValueCache, attention: Callable[..., Tensor], new: int = 1):
        self.capacity, self.new = cache.layers[0].capacity, new
        if not 1 <= new <= self.capacity:
            raise ValueError(f"a pass reads 1 to {self.capacity} tokens here, got {new}")
        for layer in cache.layers:
            layer.key[:, :, layer.length :] = layer.value[:, :, layer.length :] = 0.0
        device = cache.layers[0].key.device
        self.positions = torch.arange(cache.length, cache.length + new, device=device)
        self.layers = [StaticLayer(layer, self.positions, attention) for layer in cache.layers]

    @property
    def length(self) -> int:
        """The most tokens that may stand before a pass; where it begins, only the tensor knows."""
        return self.capacity - self.new

    def seek(self, length: int) -> None:
        """The next pass begins after so many tokens.

        Raises:
            ValueError: it would not end within the slabs.
        """
        if not 0 <= length <= self.length:
            end = length + self.new
            raise ValueError(f"the cache has room for {self.capacity} tokens, not for {end}")
        torch.arange(length, length + self.new, out=self.positions)  # in place: graphs read it


class StaticDecoder:
    """A decoder whose passes over one token a text have one shape; `CachedDecoder` takes it.

    Args:
        decoder: the model, rotary or without positions.
        cache: the only cache that it will be called with.
        compiled: makes a function of the decoder, for those passes: `torch.compile`, say.
        graph: capture the pass as a CUDA graph; needs a GPU.

    Raises:
        ValueError: the decoder has learned positions, which it counts in Python, fewer positions
            than the cache has room for, or a graph is wanted without a GPU or of a full cache.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KeyValueCache,
        *,
        compiled: Callable[[Decoder], Callable[..., Tensor]] = lambda decoder: decoder,
        graph: bool = False,
    ):
        positions, slab = decoder.config.positions, cache.layers[0].key
        if decoder.config.position == "learned":
            raise ValueError("a static pass needs rotary positions or none, not learned ones")
        if slab.shape[2] > positions:
            raise ValueError(f"the model reads {positions} tokens, the cache holds {slab.shape[2]}")
        if graph and not slab.is_cuda:
            raise ValueError(f"a CUDA graph needs a cache on a GPU, got {slab.device}")
        self.decoder, self.cache, self.step = decoder, cache, compiled(decoder)
        self.static = StaticCache(cache, decoder.blocks[0].attention.attention)
        self.graph = self.capture() if graph else None

    @torch.no_grad()
    def capture(self) -> torch.cuda.CUDAGraph:
        """The static pass, recorded between `tokens` and `logits`. It is run three times before, on
        a stream of its own as torch asks, and writes where the next token will."""
        slab = self.cache.layers[0].key
        self.static.seek(self.cache.length)
        self.tokens = torch.zeros(slab.shape[0], 1, dtype=torch.long, device=slab.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(self.tokens, self.static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self.step(self.tokens, self.static)
        return graph

    def __call__(
        self, tokens: Int[Tensor, "batch token"], cache: KeyValueCache
    ) -> Float[Tensor, "batch token vocabulary"]:
        """Logits after each token, which are added to the cache. Those of a graph are overwritten
        by its next pass.

        Raises:
            ValueError: another cache, more tokens than fit, or as the decoder.
        """
        if cache is not self.cache:
            raise ValueError("a static decoder serves the cache that it was made with")
        if tokens.shape[1] > 1:
            return self.decoder(tokens, cache)
        self.static.seek(cache.length)
        if self.graph is None:
            # A slice of a growing text has new strides each time, for which compilers start anew.
            tokens = tokens.clone(memory_format=torch.contiguous_format)
            logits = self.step(tokens, self.static)
        else:
            self.tokens.copy_(tokens)
            self.graph.replay()
            logits = self.logits
        for layer in cache.layers:
            layer.length += 1
        return logits


def main() -> None:
    from implementations.models.decoder import DecoderConfig
    from implementations.serving.kv_cache import CachedDecoder
    from implementations.text.sampling import generate

    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    decoder = Decoder(DecoderConfig(97, 64, 2, 4, 128, positions=64, key_value_heads=2))
    decoder.to("cuda" if gpu else "cpu")
    shapes = set()

    def counted(decoder: Decoder) -> Callable[..., Tensor]:
        def step(tokens: Tensor, cache: KeyValueCache) -> Tensor:
            shapes.update(tuple(layer.key.shape) for layer in cache.layers)
            return decoder(tokens, cache)

        return step

    prompt = torch.randint(97, (1, 5), device=decoder.embedding.weight.device)
    with torch.no_grad():
        cache = decoder.empty_cache(1, 64)
        static = CachedDecoder(StaticDecoder(decoder, cache, compiled=counted, graph=gpu), cache)
        same = torch.equal(generate(static, prompt, 40), generate(decoder, prompt, 40))
    print(f"40 tokens after a prompt of 5, keys always of shape {shapes}: the same tokens: {same}")


if __name__ == "__main__":
    main()
