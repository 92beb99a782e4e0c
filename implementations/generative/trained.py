"""A trained VAE for whoever needs one: trained small the first time, then read from the cache.

    train_or_load(config) = the model that config describes, from a folder named by config and code

Weeks 07 and 09 ask for the same model by the same settings, and so does a run that was stopped: it
goes on. Black and white pictures are drawn anew from the grey ones in every batch (a pixel is white
with the probability of its grey), which keeps 4,000 digits from being learnt by heart; the test
pictures are drawn once.

Paper   Salakhutdinov & Murray 2008, doi:10.1145/1390156.1390266 (MNIST in black and white)
Shapes  pictures [image, dim] in levels, as floats
Run     uv run python implementations/generative/trained.py
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from implementations.flows.dequantization import bits_per_dimension
from implementations.generative.importance_weighted import importance_weighted_bound
from implementations.generative.vae import VAE, elbo, free_bits, perceptron
from implementations.lab.files import run_folder
from implementations.sources.images import Images, digits, kanji, mnist_5k
from implementations.training.loop import train
from implementations.training.rows import RandomRows
from implementations.training.settings import TrainingConfig


@dataclass(frozen=True)
class VAEConfig:
    """What to train, on what, and how."""

    data: Literal["mnist_5k", "digits", "kanji_32", "kanji_16"] = "mnist_5k"
    likelihood: Literal["bernoulli", "discretized_logistic"] = "bernoulli"
    """bernoulli sees black and white, discretized_logistic all levels"""
    latent: int = 20
    hidden: int = 256
    dropout: float = 0.0
    beta: float = 1.0
    free_nats: float = 0.0
    """that each coordinate of z may use for nothing"""
    importance_samples: int = 1
    """more than 1: climb the importance-weighted bound, without beta and free_nats"""
    steps: int = 6000
    batch: int = 100
    learning_rate: float = 2e-3
    seed: int = 0


def images_of(config: VAEConfig) -> Images:
    """The set that the config names."""
    sets: dict[str, Callable[[], Images]] = {
        "mnist_5k": mnist_5k,
        "digits": digits,
        "kanji_32": lambda: kanji(32),
        "kanji_16": lambda: kanji(16),
    }
    if config.data not in sets:
        raise ValueError(f"the image sets are {', '.join(sets)}, got {config.data!r}")
    return sets[config.data]()


def levels_of(config: VAEConfig) -> int:
    return 2 if config.likelihood == "bernoulli" else images_of(config).levels


def pictures(
    config: VAEConfig, part: Images, generator: torch.Generator | None = None
) -> Float[Tensor, "image dim"]:
    """Images as the model's likelihood wants them: in black and white, or in whole levels."""
    grey = part.pixels.flatten(1).float()
    if config.likelihood != "bernoulli":
        return grey
    return torch.bernoulli(grey / (part.levels - 1), generator=generator)


def held_out_pictures(config: VAEConfig) -> Float[Tensor, "image dim"]:
    """The test images, the same ones every time."""
    return pictures(config, images_of(config).split()[1], torch.Generator().manual_seed(0))


def untrained(config: VAEConfig) -> VAE:
    """The model as it is before training.

    Raises:
        ValueError: there is no coordinate of z or no sample, the bound with several samples is
            asked for with beta or free nats, or the image set or likelihood is unknown.
    """
    samples = config.importance_samples
    if min(config.latent, samples) < 1:
        raise ValueError(
            f"z has a coordinate and a sample at least, got {config.latent}, {samples}"
        )
    if samples > 1 and (config.beta, config.free_nats) != (1.0, 0.0):
        raise ValueError(
            f"the bound with {samples} samples has no divergence to weigh: beta must be 1 and "
            f"free_nats 0, got {config.beta} and {config.free_nats}"
        )
    torch.manual_seed(config.seed)
    dim, sizes = images_of(config).pixels[0].numel(), (config.hidden, config.hidden)
    outputs = 1 if config.likelihood == "bernoulli" else 2
    encoder = perceptron(dim, *sizes, 2 * config.latent, dropout=config.dropout)
    decoder = perceptron(config.latent, *sizes, outputs * dim, dropout=config.dropout)
    return VAE(encoder, decoder, config.likelihood, levels_of(config))


def objective(
    config: VAEConfig, model: VAE, x: Float[Tensor, "batch dim"]
) -> tuple[Float[Tensor, ""], int]:
    """The loss that training lowers, summed over the batch, in nats; and the size of the batch."""
    samples = config.importance_samples
    noise = torch.randn(samples, len(x), config.latent, device=x.device)
    if samples > 1:
        return -importance_weighted_bound(model.log_weights(x, noise)).sum(), len(x)
    q = model.posterior(x)
    log_likelihood = model.log_likelihood(x, q.at(noise))
    if config.free_nats:
        kl = free_bits(q.kl_by_coordinate(), config.free_nats).expand(len(x))
    else:
        kl = q.kl_to_standard()
    return -elbo(log_likelihood, kl, config.beta).sum(), len(x)


def batches(config: VAEConfig) -> Callable[[int], Float[Tensor, "batch dim"]]:
    """The training pictures of a step, a function of it alone: a run that goes on sees the same."""
    grey = images_of(config).split()[0]
    rows = RandomRows(torch.arange(len(grey.labels)), batch=config.batch, seed=config.seed)

    def batch(step: int) -> Tensor:
        chosen = rows(step)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        return pictures(config, Images(grey.pixels[chosen], chosen, grey.levels), generator)

    return batch


def train_or_load(config: VAEConfig) -> VAE:
    """The trained model, in eval mode; says so if it was trained before.

    Raises:
        ValueError: a setting is wrong; Diverged, one too, if training ends in NaN.
    """
    model = untrained(config)
    settings = TrainingConfig(
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup=config.steps // 20,
        final=0.01,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        clip=math.inf,
        checkpoint_every=max(1, config.steps // 6),
        log_every=max(1, config.steps // 200),
        keep=1,
    )
    folder = run_folder(f"vae-{config.data}", asdict(config))
    loss = partial(objective, config)
    train(model, batches(config), settings, folder, loss=loss, wait=True)
    return model.eval()


@torch.no_grad()
def sampled_log_weights(
    model: VAE, x: Float[Tensor, "image dim"], samples: int, seed: int = 0
) -> Float[Tensor, "sample image"]:
    """log p(x, z) - log q(z | x) for many z and images, a few images at a time."""
    latent = model.posterior(x[:1]).mean.shape[-1]
    generator, parts = torch.Generator().manual_seed(seed), []
    at_once = max(1, 10_000 // samples)
    for part in tqdm(x.split(at_once), unit="batch", desc="weights", leave=False):
        noise = torch.randn(samples, len(part), latent, generator=generator)
        parts.append(model.log_weights(part, noise.to(x)))
    return torch.cat(parts, dim=1)


def main() -> None:
    config = VAEConfig(data="digits", likelihood="discretized_logistic", hidden=64, steps=1500)
    model, x = train_or_load(config), held_out_pictures(config)
    weights = sampled_log_weights(model, x, 100)
    bounds = {"ELBO": weights.mean(0), "bound with K = 100": importance_weighted_bound(weights)}
    print("digits of 8x8 with 17 levels, bits per dimension of the test images:")
    print(f"  all levels alike    {math.log2(17):.3f}")
    for name, bound in bounds.items():
        print(f"  {name:20}{bits_per_dimension(bound, 64).mean():.3f}")


if __name__ == "__main__":
    main()
