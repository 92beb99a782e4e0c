"""The JAX flow is the torch flow: values, log-determinants, densities and gradients to 1e-10."""

import jax
import jax.numpy as jnp
import pytest
import torch

from implementations.flows.affine_coupling import coupling_layers
from implementations.flows.affine_coupling_jax import (
    coupling_inverse_jax,
    coupling_jax,
    layers_from_torch,
    log_prob_jax,
)
from implementations.flows.bijection import Flow


@pytest.fixture(params=[(2, 1), (3, 4), (7, 3)], ids=str)
def flow(request):
    dim, layers = request.param
    flow = coupling_layers(dim, layers, 16).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Flow(flow, (dim,))


def same(array, tensor):
    torch.testing.assert_close(torch.from_dlpack(array), tensor.detach(), rtol=1e-10, atol=1e-10)


def test_both_directions_equal_torch(flow):
    x = torch.randn(9, *flow.shape, dtype=torch.float64)
    with jax.enable_x64(True):
        layers, array = layers_from_torch(flow.bijection), jnp.asarray(x.numpy())
        for function, direction in (
            (coupling_jax, flow.bijection.forward),
            (coupling_inverse_jax, flow.bijection.inverse),
        ):
            value, log_det = jax.jit(function)(layers, array)
            expected = direction(x)
            same(value, expected.value)
            same(log_det, expected.log_det)


def test_densities_and_all_gradients_equal_torch(flow):
    """With a random gradient from above, by the examples and by every weight."""
    x = torch.randn(9, *flow.shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, dtype=torch.float64)
    density = flow.log_prob(x)
    density.backward(upstream)
    with jax.enable_x64(True):
        layers, array = layers_from_torch(flow.bijection), jnp.asarray(x.detach().numpy())
        value, pull = jax.vjp(log_prob_jax, layers, array)
        by_layers, by_x = pull(jnp.asarray(upstream.numpy()))
        same(value, density)
        same(by_x, x.grad)
        got = [array for layer in by_layers for pair in layer for array in pair]
        want = [parameter.grad for parameter in flow.parameters()]
        assert len(got) == len(want)
        for array, tensor in zip(got, want, strict=True):
            same(array, tensor)
