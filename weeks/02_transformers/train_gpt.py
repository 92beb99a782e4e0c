"""Does a small transformer understand a book better than counting and compressing do?

A Llama-style decoder learns the World English Bible, cut into tokens by our own byte-pair encoding,
and is asked about its last pages, which neither it nor the encoding has seen. All are compared in
bits per byte, which does not depend on how the text is cut: 5-grams with Kneser-Ney smoothing over
bytes and over the same tokens, gzip and xz.

Expected: the transformer needs the fewest bits. The run stops and goes on as you like: Ctrl-C, and
the same command again.

Run     uv run python weeks/02_transformers/train_gpt.py
        uv run python weeks/02_transformers/train_gpt.py --device cuda --width 512 --layers 8
"""

import gzip
import lzma
from dataclasses import asdict, dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from implementations.attention.vendor import attention_sdpa
from implementations.lab.files import run_folder
from implementations.lab.findings import Finding, at_most
from implementations.lab.script import run
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.sources.text import bible_verses
from implementations.text.byte_pair_encoding import BytePairEncoding
from implementations.text.byte_pair_encoding import train as train_encoding
from implementations.text.held_out import compressed_bits, held_out_bits
from implementations.text.kneser_ney import kneser_ney_bits
from implementations.text.sampling import SamplingSettings, generate
from implementations.training.batches import RandomWindows
from implementations.training.journal import read
from implementations.training.loop import train
from implementations.training.settings import TrainingConfig


@dataclass(frozen=True)
class Config:
    """Train a decoder on the World English Bible."""

    merges: int = 1792
    """of the byte-pair encoding; with the 256 bytes they are the vocabulary"""
    width: int = 256
    """size of a token's vector"""
    layers: int = 4
    """blocks of the decoder"""
    heads: int = 4
    """of attention, in each block"""
    length: int = 256
    """tokens that the model reads at once"""
    dropout: float = 0.1
    """rate at which what enters the stream is silenced in training"""
    batch: int = 16
    """windows of `length` tokens in an update"""
    steps: int = 1200
    """updates of the weights"""
    learning_rate: float = 2e-3
    """the highest one; warm-up before it, a cosine after it"""
    held_out: int = 100_000
    """characters at the end of the book that nobody trains on"""
    share: float = 1.0
    """part of the rest that is trained on, counted from its end"""
    device: str = "cpu"
    """cpu or cuda"""
    seed: int = 0
    """of weights, batches and dropout"""


def check(config: Config) -> None:
    """Raise ValueError for sizes that make no run, before any counting."""
    if not 0 < config.share <= 1:
        raise ValueError(f"the share that is trained on lies in (0, 1], got {config.share}")
    for name in ("width", "layers", "heads", "batch", "held_out"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is at least 1, got {getattr(config, name)}")
    if config.length < 2:
        raise ValueError(f"the model reads at least 2 tokens at once, got {config.length}")
    if config.width % config.heads:
        raise ValueError(f"{config.heads} heads cannot share a width of {config.width} evenly")


def baselines(
    before: str, text: str, encoding: BytePairEncoding, train_tokens: Tensor, tokens: Tensor
) -> dict[str, float]:
    """Bits per byte of the held-out text by every method that counts."""
    old, new = before.encode(), text.encode()
    as_array = lambda data: np.frombuffer(data, np.uint8).astype(np.int64)  # noqa: E731
    by_token = kneser_ney_bits(
        train_tokens.numpy(), tokens.numpy(), order=5, vocabulary=len(encoding.tokens)
    )
    bits = {
        "5-grams of bytes": kneser_ney_bits(as_array(old), as_array(new), 5, 256).sum(),
        "5-grams of tokens": by_token.sum(),
        "gzip": compressed_bits(gzip.compress, old, new),
        "xz": compressed_bits(lambda data: lzma.compress(data, preset=9), old, new),
    }
    return {name: float(count / len(new)) for name, count in bits.items()}


def main(config: Config) -> list[Finding]:
    check(config)
    book = "\n".join(bible_verses("web").values())
    if config.held_out >= len(book):
        raise ValueError(f"{config.held_out:,} held-out characters leave nothing of {len(book):,}")
    print("learning the encoding, and counting: a minute")
    before, text = book[: -config.held_out], book[-config.held_out :]
    before = before[-max(1, int(config.share * len(before))) :]
    encoding = train_encoding(before, config.merges)
    train_tokens = torch.tensor(encoding.encode(before))
    test_tokens = torch.tensor(encoding.encode(text))
    counted = baselines(before, text, encoding, train_tokens, test_tokens)

    torch.manual_seed(config.seed)
    shape = DecoderConfig(
        vocabulary=len(encoding.tokens),
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        hidden=-(-8 * config.width // 3 // 32) * 32,  # 8/3 of the width, as SwiGLU wants it
        positions=max(config.length, 512),
        dropout=config.dropout,
    )
    model = Decoder(shape, attention_sdpa).to(config.device)
    context = train_tokens[-config.length :]
    tokens = torch.cat([context, test_tokens]).to(config.device)
    size = len(text.encode())

    def observe(step: int) -> dict[str, float]:
        bits = held_out_bits(model, tokens, len(context), config.length) / size
        print(f"\nstep {step}: {bits:.3f} bits per byte; {sample(model, encoding, config)!r}")
        return {"bits_per_byte": bits}

    every = -(-config.steps // 12)
    result = train(
        model,
        RandomWindows(train_tokens, config.batch, config.length, config.seed),
        TrainingConfig(
            steps=config.steps,
            learning_rate=config.learning_rate,
            warmup=config.steps // 20,
            bfloat16=config.device != "cpu",
            compiled=config.device != "cpu",
            observe_every=every,
            checkpoint_every=every,
            keep=1,
        ),
        run_folder("train_gpt", asdict(config), __file__),
        observe=observe,
    )
    log = read(result.log)
    curve = [line for line in log if "bits_per_byte" in line]
    draw(curve, counted)
    seconds = config.batch * config.length * sum(1 / line["tokens_per_second"] for line in log)
    findings = report(config, curve[-1]["bits_per_byte"], counted)
    return [
        *findings,
        Finding("parameters of the transformer", sum(p.numel() for p in model.parameters())),
        Finding("tokens trained on, counting each time", result.tokens),
        Finding("training time", seconds / 60, "minutes"),
    ]


def sample(model: Decoder, encoding: BytePairEncoding, config: Config) -> str:
    """What the model writes after 'In the beginning', with a seed of its own."""
    prompt = torch.tensor([encoding.encode("In the beginning")], device=config.device)
    settings = SamplingSettings(temperature=0.8, top_p=0.95)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    written = generate(model, prompt, 40, settings, [generator])
    return encoding.decode(written[0].tolist())


def draw(curve: list[dict], counted: dict[str, float]) -> None:
    """The held-out curve, and what counting reaches."""
    _, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    steps, bits = ([line[key] for line in curve] for key in ("step", "bits_per_byte"))
    axes.plot(steps, bits, "o-", label="transformer")
    for (name, value), style in zip(counted.items(), ("--", "-.", ":", (0, (1, 3))), strict=True):
        axes.axhline(value, linestyle=style, color="gray", label=f"{name}: {value:.2f}")
    axes.set(xlabel="training steps", ylabel="bits per byte of the held-out pages")
    axes.set_title("Reading the last pages of a book, having read the others")
    axes.legend()


def report(config: Config, reached: float, counted: dict[str, float]) -> list[Finding]:
    """The transformer against the best of those that count, then each of these."""
    trained = config.steps >= 1000  # a few steps, as in --quick, prove nothing
    rule = at_most(min(counted.values())) if trained else None
    claim, unit = "held-out text, transformer", "bits per byte"
    source = "the best of the other four"
    return [
        Finding(claim, reached, unit, expected=rule, source=source),
        *(Finding(f"held-out text, {name}", bits, unit) for name, bits in counted.items()),
    ]


if __name__ == "__main__":
    quick = Config(
        merges=64,
        width=32,
        layers=2,
        heads=2,
        length=32,
        batch=4,
        steps=20,
        held_out=2000,
        share=0.02,
    )
    run(main, Config(), quick=quick)
