"""How much of the machine is training the model? Model FLOPs utilisation, MFU.

    FLOPs per token = 6 N + 12 layers width length
    MFU             = FLOPs per token * tokens per second / peak FLOPs per second

6 N: every parameter multiplies and adds once forward and twice backward. 12: the same for the two
products of attention, queries with keys and weights with values, counted without the causal half,
as the paper does. Work that a run adds (recomputing activations) does not count: only the model's.

Paper   Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B
Run     uv run python implementations/training/utilisation.py
"""


def flops_per_token(parameters: int, layers: int = 0, width: int = 0, length: int = 0) -> float:
    """Floating-point operations to train on one token.

    Args:
        parameters: those that multiply. A tied embedding is also the head, so it counts; a table
            that is only looked up does not.
        layers: attention layers.
        width: heads times the size of a head.
        length: tokens of a row.
    """
    return 6.0 * parameters + 12.0 * layers * width * length


def utilisation(tokens_per_second: float, flops: float, peak: float) -> float:
    """MFU, between 0 and 1: what the model needs of what the machine could do at its peak."""
    return tokens_per_second * flops / peak


def main() -> None:
    flops = flops_per_token(124_439_808, layers=12, width=768, length=1024)
    print(f"GPT-2 of 124 million parameters: {flops / 1e9:.2f} GFLOPs for a token of 1,024")
    print("on a GPU of 989 TFLOP/s (bfloat16):")
    for rate in (100_000, 463_000, 1_157_000):
        print(f"  {rate:9,} tokens/s  MFU {utilisation(rate, flops, 989e12):.0%}")


if __name__ == "__main__":
    main()
