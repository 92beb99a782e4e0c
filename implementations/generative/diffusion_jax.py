"""DDPM's step in JAX: one line of algorithm 2, and all of them as one scan.

    x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t) noise_estimate) / sqrt(1 - beta_t)
              + sqrt(beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)) fresh

Paper   Ho et al. 2020, arXiv:2006.11239, algorithm 2
Shapes  betas [step]    x [batch, ...]    fresh [step, batch, ...]
Run     uv run python implementations/generative/diffusion_jax.py
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Batch = Float[Array, "batch ..."]


def ddpm_step_jax(
    betas: Float[Array, " step"],
    step: int | Int[Array, ""],
    x: Batch,
    noise_estimate: Batch,
    fresh: Batch,
) -> Batch:
    """From x_t to x_{t-1}; `step` may be traced, so it is the caller's to keep in 1 ... T."""
    bars = jnp.concatenate((jnp.ones(1, betas.dtype), jnp.cumprod(1 - betas)))
    beta, bar, before = betas[step - 1], bars[step], bars[step - 1]
    mean = (x - beta / jnp.sqrt(1 - bar) * noise_estimate) / jnp.sqrt(1 - beta)
    return mean + jnp.sqrt(beta * (1 - before) / (1 - bar)) * fresh


def ddpm_sample_jax(
    noise_of: Callable[[Batch, Int[Array, ""]], Batch],
    betas: Float[Array, " step"],
    x: Batch,
    fresh: Float[Array, "step batch ..."],
) -> Batch:
    """Algorithm 2 as a whole, from step T to step 1; `fresh[0]` belongs to step T."""
    steps = jnp.arange(len(betas), 0, -1)

    def body(x: Batch, both: tuple[Int[Array, ""], Batch]) -> tuple[Batch, None]:
        step, noise = both
        return ddpm_step_jax(betas, step, x, noise_of(x, step), noise), None

    return jax.lax.scan(body, x, (steps, fresh))[0]


def main() -> None:
    import torch

    from implementations.generative.diffusion import ddpm_step
    from implementations.generative.schedules import linear_betas

    torch.manual_seed(0)
    betas = linear_betas(1000)
    x, estimate, fresh = torch.randn(3, 8, 4, dtype=torch.float64)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(tensor.numpy()) for tensor in (betas, x, estimate, fresh)]
        for step in (1000, 500, 1):
            ours = ddpm_step(betas, step, x, estimate, fresh)
            theirs = ddpm_step_jax(arrays[0], step, *arrays[1:])
            apart = (torch.from_dlpack(theirs) - ours).abs().max()
            print(f"step {step:4}: torch and JAX are {apart:.1e} apart")


if __name__ == "__main__":
    main()
