"""The JAX twin of DDPM's step is torch's, step by step and as one scan, to 1e-10."""

import jax
import jax.numpy as jnp
import pytest
import torch

from implementations.generative.diffusion import ddpm_step
from implementations.generative.diffusion_jax import ddpm_sample_jax, ddpm_step_jax
from implementations.generative.schedules import cosine_betas, linear_betas

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("betas", [linear_betas(1000), cosine_betas(7)], ids=["linear", "cosine"])
def test_steps_equal_torchs(betas):
    x, estimate, fresh = torch.randn(3, 5, 3, dtype=torch.float64)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(tensor.numpy()) for tensor in (betas, x, estimate, fresh)]
        for step in (len(betas), len(betas) // 2, 1):
            theirs = jax.jit(ddpm_step_jax)(arrays[0], step, *arrays[1:])
            ours = ddpm_step(betas, step, x, estimate, fresh)
            torch.testing.assert_close(torch.from_dlpack(theirs), ours, **CLOSE)


def test_all_steps_equal_torchs():
    betas, x = cosine_betas(12), torch.randn(4, 3, dtype=torch.float64)
    fresh = torch.randn(12, 4, 3, dtype=torch.float64)
    ours = x
    for step in range(12, 0, -1):
        ours = ddpm_step(betas, step, ours, torch.sin(ours) / step, fresh[12 - step])
    with jax.enable_x64(True):
        arrays = [jnp.asarray(tensor.numpy()) for tensor in (betas, x, fresh)]
        theirs = ddpm_sample_jax(lambda x, step: jnp.sin(x) / step, *arrays)
        torch.testing.assert_close(torch.from_dlpack(theirs), ours, **CLOSE)
