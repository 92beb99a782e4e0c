"""Affine coupling in JAX: the flow of affine_coupling.py as pure functions of its parameters.

    y_kept  = x_kept
    y_moved = x_moved · exp(log_scale(x_kept)) + shift(x_kept)      log det = sum of log_scale

A flow is a list of layers, a layer a list of (weight, bias); even layers keep even columns, odd
layers odd ones. `jax.jit`, `jax.grad` and `jax.vmap` apply as they are.

Paper   Dinh, Sohl-Dickstein & Bengio 2016, arXiv:1605.08803, equations 4 to 8
Shapes  x [batch, dim]
Run     uv run python implementations/flows/affine_coupling_jax.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from implementations.flows.affine_coupling import LARGEST_LOG_SCALE
from implementations.flows.bijection import Compose

Layer = list[tuple[Float[Array, "_ _"], Float[Array, " _"]]]  # [output, input], [output]
Batch = Float[Array, "batch dim"]
LogDet = Float[Array, " batch"]
Moved = Float[Array, "_ _"]


def layers_from_torch(flow: Compose) -> list[Layer]:
    """The weights of `coupling_layers`, as arrays."""
    linears = [step.conditioner.layers[::2] for step in flow.steps]
    return [
        [
            (jnp.asarray(linear.weight.detach().numpy()), jnp.asarray(linear.bias.detach().numpy()))
            for linear in layer
        ]
        for layer in linears
    ]


def scale_and_shift_jax(layer: Layer, kept: Float[Array, "batch kept"]) -> tuple[Moved, Moved]:
    """The network's log_scale = 3 tanh(free / 3) and shift of every moved column."""
    for weight, bias in layer[:-1]:
        kept = jax.nn.silu(kept @ weight.T + bias)
    weight, bias = layer[-1]
    free, shift = rearrange(kept @ weight.T + bias, "b (m p) -> p b m", p=2)
    return LARGEST_LOG_SCALE * jnp.tanh(free / LARGEST_LOG_SCALE), shift


def columns_of(dim: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Which columns layer `number` keeps, and which it moves."""
    column = np.arange(dim)
    return column[column % 2 == number % 2], column[column % 2 != number % 2]


def coupling_jax(layers: list[Layer], x: Batch) -> tuple[Batch, LogDet]:
    """f(x) and log |det df/dx|, equation 7."""
    log_det = jnp.zeros(len(x), x.dtype)
    for number, layer in enumerate(layers):
        kept, moved = columns_of(x.shape[1], number)
        log_scale, shift = scale_and_shift_jax(layer, x[:, kept])
        x = x.at[:, moved].set(x[:, moved] * jnp.exp(log_scale) + shift)
        log_det = log_det + log_scale.sum(1)
    return x, log_det


def coupling_inverse_jax(layers: list[Layer], y: Batch) -> tuple[Batch, LogDet]:
    """The x with f(x) = y and log |det dx/dy|, equation 8."""
    log_det = jnp.zeros(len(y), y.dtype)
    for number, layer in reversed(list(enumerate(layers))):
        kept, moved = columns_of(y.shape[1], number)
        log_scale, shift = scale_and_shift_jax(layer, y[:, kept])
        y = y.at[:, moved].set((y[:, moved] - shift) * jnp.exp(-log_scale))
        log_det = log_det - log_scale.sum(1)
    return y, log_det


def log_prob_jax(layers: list[Layer], x: Batch) -> LogDet:
    """log p(x) with a standard normal base, in nats."""
    noise, log_det = coupling_jax(layers, x)
    return log_det + jax.scipy.stats.norm.logpdf(noise).sum(1)


def main() -> None:
    import torch

    from implementations.flows.affine_coupling import coupling_layers
    from implementations.flows.bijection import Flow

    torch.manual_seed(0)
    flow = coupling_layers(dim=5, layers=4, hidden=32).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1000, 5, dtype=torch.float64)
    with jax.enable_x64(True), torch.no_grad():
        density = jax.jit(log_prob_jax)(layers_from_torch(flow), jnp.asarray(x.numpy()))
        difference = (torch.from_dlpack(density) - Flow(flow, (5,)).log_prob(x)).abs().max()
    print(f"1,000 log densities in float64: largest difference from torch {difference:.1e}")


if __name__ == "__main__":
    main()
