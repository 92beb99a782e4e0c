"""GELU in both forms and the feed-forward layer against torch."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

from implementations.lab.compare import assert_same_function
from implementations.layers.feed_forward import FeedForward, SwiGLU, gelu, gelu_tanh, silu


@pytest.mark.parametrize("form, approximate", [(gelu, "none"), (gelu_tanh, "tanh")])
def test_gelu_equals_torch(form, approximate):
    """Both forms, outputs and gradients, from deep in one tail to deep in the other."""
    x = torch.linspace(-30, 30, 2001, dtype=torch.float64)
    assert_same_function(form, lambda x: functional.gelu(x, approximate=approximate), x)


def test_gelu_is_x_times_the_normal_distribution_function():
    """Closed form by the standard library."""
    for x in (-3.0, -0.5, 0.0, 1.0, 2.5):
        phi = 0.5 * math.erfc(-x / math.sqrt(2))
        assert gelu(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(
            x * phi, abs=1e-15
        )


def test_the_two_forms_are_not_the_same():
    """4.73e-4 apart at x = 2.70: a trained model's output tells them apart."""
    x = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    apart = (gelu(x) - gelu_tanh(x)).abs()
    assert apart.max().item() == pytest.approx(4.73e-4, abs=1e-6)


def test_silu_equals_torch():
    x = torch.linspace(-30, 30, 2001, dtype=torch.float64)
    assert_same_function(silu, functional.silu, x)


@pytest.mark.parametrize("form", [gelu, gelu_tanh, silu])
def test_gradcheck(form):
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(form, x) and torch.autograd.gradgradcheck(form, x)


@pytest.mark.parametrize("form", [gelu, gelu_tanh, silu])
def test_narrow_inputs_are_widened(form):
    """One rounding from the exact value, unlike a chain of bfloat16 operations."""
    x = torch.linspace(-6, 6, 1001).bfloat16()
    exact = form(x.double())
    assert form(x).dtype == torch.bfloat16
    limit = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-6
    assert ((form(x).double() - exact).abs() <= limit).all()


def test_layer_equals_torchs_linears():
    layer = FeedForward(16, 40).double()
    theirs = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16)).double()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), layer.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    assert_same_function(lambda x: layer(x), lambda x: theirs(x), x)


def test_swiglu_equals_transformers_llama():
    """Which half is the gate matters: silu is not symmetric."""
    config = LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2)
    theirs, ours = LlamaMLP(config).double(), SwiGLU(16, 40).double()
    names = {"gate": "gate_proj", "expand": "up_proj", "contract": "down_proj"}
    for name, published in names.items():
        getattr(ours, name).load_state_dict(getattr(theirs, published).state_dict(), strict=True)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    assert_same_function(ours.forward, theirs.forward, x)
