"""What a text costs that nobody has trained on, in bits: by a model, or by a compressor.

    model        bits(text) = -sum log2 p(token | the tokens before it)
    compressor   bits(text) = 8 · (|compress(before + text)| - |compress(before)|)

Over the text's bytes, both do not depend on how it was cut into tokens, so any two can be compared.

Paper   Shannon 1948, section 7; Cleary & Witten 1984, doi:10.1109/TCOM.1984.1096090 (compressing is
        predicting)
Shapes  tokens [token], of which those from `start` on are asked for
Run     uv run python implementations/text/held_out.py
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Model = Callable[[Int[Tensor, "1 token"]], Float[Tensor, "1 token vocabulary"]]


@torch.no_grad()
def held_out_bits(model: Model, tokens: Int[Tensor, " token"], start: int, length: int) -> float:
    """Bits for tokens[start:], each asked for once, in order, with at least half a window before.

    Windows of `length` tokens move on by half of it; only what is new in a window is counted. The
    model's mode and device are the caller's.

    Args:
        model: scores of the next token after each token.
        start: the first token that is asked for; those before it are context, one at least.
        length: tokens that the model reads at once.

    Raises:
        ValueError: nothing stands before `start`, or windows of fewer than two tokens.
    """
    if start < 1:
        raise ValueError(f"the first token asked for needs one before it, got start = {start}")
    if length < 2:
        raise ValueError(f"a window that moves by half its length has 2 tokens or more: {length}")
    stride, nats = length // 2, 0.0
    for first in range(start, len(tokens), stride):
        window = tokens[max(0, first + stride - length - 1) : first + stride]
        asked = min(stride, len(tokens) - first)
        logits = model(window[None, :-1])[0, -asked:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = window[-asked:].long()
        nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    return nats / math.log(2)


def compressed_bits(compress: Callable[[bytes], bytes], before: bytes, text: bytes) -> int:
    """What the text adds to the compressed size of what comes before it."""
    return 8 * (len(compress(before + text)) - len(compress(before)))


def main() -> None:
    import gzip
    import lzma

    from implementations.sources.text import bible_verses

    book = "\n".join(bible_verses("web").values()).encode()
    before, text = book[:-50_000], book[-50_000:]
    counts = torch.bincount(torch.frombuffer(bytearray(before), dtype=torch.uint8), minlength=256)
    scores = ((counts + 1) / (counts + 1).sum()).log()

    def by_frequency(tokens: Tensor) -> Tensor:
        return scores.expand(1, tokens.shape[1], 256)

    tokens = torch.frombuffer(bytearray(book[-50_001:]), dtype=torch.uint8)
    bits = held_out_bits(by_frequency, tokens, start=1, length=1024) / len(text)
    print("bits per byte of the World English Bible's last 50,000 bytes")
    print(f"  knowing how frequent bytes are   {bits:.3f}")
    for name, compress in {"gzip": gzip.compress, "xz": lzma.compress}.items():
        print(f"  {name:33}{compressed_bits(compress, before, text) / len(text):.3f}")


if __name__ == "__main__":
    main()
