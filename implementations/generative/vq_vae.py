"""VQ-VAE: the code is a number, the nearest entry of a codebook, and gradients step over it.

    code(x)      = argmin_k |x - e_k|²
    forward      = e_code
    backward     = as if forward had been x            straight through: x + stop(e_code - x)
    codebook     |stop(x) - e_code|²                   pulls the entry to what chose it
    commitment   |x - stop(e_code)|²                   keeps what chooses near its entry

Nearest is a step function: its derivative is zero, and the encoder would learn nothing. The
straight-through estimator hands the decoder's gradient on to the encoder unchanged: biased, and it
works. Instead of the codebook loss, entries can follow running averages of what chose them; with a
decay of 0 that is one step of k-means.

Paper   van den Oord et al. 2017, arXiv:1711.00937 (averages: appendix A.1)
        Bengio et al. 2013, arXiv:1308.3432 (straight through)
Shapes  x [..., dim]    codebook [code, dim]    codes [...]
Run     uv run python implementations/generative/vq_vae.py
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot


class Quantized(NamedTuple):
    """What comes out of a codebook."""

    output: Float[Tensor, "*batch dim"]
    """the chosen entries; their gradient goes to the input"""
    codes: Int[Tensor, "*batch"]
    codebook_loss: Float[Tensor, ""]
    """mean squared distance, whose gradient moves the entries"""
    commitment_loss: Float[Tensor, ""]
    """the same number, whose gradient moves the inputs"""


def nearest_code(
    x: Float[Tensor, "*batch dim"], codebook: Float[Tensor, "code dim"]
) -> Int[Tensor, "*batch"]:
    """The number of the closest entry; the first of several.

    Raises:
        ValueError: the codebook is empty, or x is not finite: no entry is nearest to NaN.
    """
    if not len(codebook):
        raise ValueError("a codebook needs at least one entry")
    if not x.isfinite().all():
        raise ValueError("x holds a number that is not finite, and no entry is nearest to it")
    # |x|² is the same for all entries.
    distance = codebook.square().sum(-1) - 2 * x @ codebook.mT
    return distance.argmin(-1)


def straight_through(
    x: Float[Tensor, "*batch dim"], quantized: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch dim"]:
    """`quantized` on the way forward, x on the way back."""
    return x + (quantized - x).detach()


def quantize(x: Float[Tensor, "*batch dim"], codebook: Float[Tensor, "code dim"]) -> Quantized:
    """Replace every x by its nearest entry.

    Raises:
        ValueError: as `nearest_code`.
    """
    codes = nearest_code(x.detach(), codebook.detach())
    entries = codebook[codes]
    return Quantized(
        straight_through(x, entries),
        codes,
        (x.detach() - entries).square().sum(-1).mean(),
        (x - entries.detach()).square().sum(-1).mean(),
    )


class Averages(NamedTuple):
    """Running counts and sums of what chose each entry; their ratio is the codebook."""

    counts: Float[Tensor, " code"]
    sums: Float[Tensor, "code dim"]

    @property
    def codebook(self) -> Float[Tensor, "code dim"]:
        return self.sums / self.counts[:, None]


def follow(
    averages: Averages,
    x: Float[Tensor, "*batch dim"],
    codes: Int[Tensor, "*batch"],
    decay: float = 0.99,
) -> Averages:
    """The averages after one batch more; an entry that nothing chose keeps its place.

    Raises:
        ValueError: the decay is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"the decay of a running average lies in [0, 1), got {decay}")
    chosen = one_hot(rearrange(codes, "... -> (...)"), len(averages.counts)).to(x.dtype)
    count, total = chosen.sum(0), chosen.mT @ rearrange(x.detach(), "... dim -> (...) dim")
    counts = decay * averages.counts + (1 - decay) * count
    sums = decay * averages.sums + (1 - decay) * total
    # Both would shrink alike towards 0 / 0.
    unused = count == 0
    counts = torch.where(unused, averages.counts, counts)
    return Averages(counts, torch.where(unused[:, None], averages.sums, sums))


def perplexity(codes: Int[Tensor, "*batch"], size: int) -> Float[Tensor, ""]:
    """exp of the entropy of the codes: how many entries, used equally, would be as varied."""
    share = codes.flatten().bincount(minlength=size).double() / codes.numel()
    return torch.special.entr(share).sum().exp()


class VQVAE(nn.Module):
    """An encoder to `parts` vectors, each replaced by its nearest entry, and a decoder.

    Args:
        encoder: from [batch, dim] to [batch, parts width].
        decoder: from [batch, parts width] to [batch, dim].
        codes: entries of the codebook.
        width: numbers of an entry.
        commitment: weight of the commitment loss; 0.25 in the paper, which says that 0.1 to 2 do.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, codes: int, width: int, commitment=0.25
    ):
        super().__init__()
        self.encoder, self.decoder, self.commitment = encoder, decoder, commitment
        self.codebook = nn.Parameter(0.3 * torch.randn(codes, width))

    def forward(
        self, x: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Quantized]:
        """What the decoder makes of the codes, and the codes."""
        parts = rearrange(
            self.encoder(x), "batch (part width) -> batch part width", width=self.codebook.shape[1]
        )
        found = quantize(parts, self.codebook)
        return self.decoder(
            rearrange(found.output, "batch part width -> batch (part width)")
        ), found

    def loss(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
        """Mean squared error of a picture, plus the two losses of the codebook."""
        again, found = self(x)
        missed = (x - again).square().sum(-1).mean()
        return missed + found.codebook_loss + self.commitment * found.commitment_loss


def main() -> None:
    from implementations.generative.vae import perceptron
    from implementations.sources.images import digits

    torch.manual_seed(0)
    train, test = (part.pixels.flatten(1) / 16 for part in digits().split())
    encoder, decoder = perceptron(64, 64, 16), perceptron(16, 64, 64)
    model = VQVAE(encoder, decoder, codes=32, width=4, commitment=1.0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    spread = (test - train.mean(0)).square().sum(-1).mean()
    print("digits of 8x8 as four codes of 5 bits each")
    for step in range(1201):
        if step % 300 == 0:
            with torch.no_grad():
                again, found = model(test)
            left = (test - again).square().sum(-1).mean() / spread
            used = perplexity(found.codes, 32)
            print(f"  step {step:4}  {used:4.1f} of 32 codes in use, {1 - left:4.0%} explained")
        loss = model.loss(train[torch.randint(len(train), (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
