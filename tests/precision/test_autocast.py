"""Our context against torch.autocast: every operation's dtype, loss and gradients to the bit."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from implementations.attention.vendor import attention_sdpa
from implementations.attention_basic import attention_naive
from implementations.models.decoder import Decoder, DecoderConfig
from implementations.precision.autocast import CPU, GPU, POLICIES, Autocast, RecordDtypes

LLAMA = {"norm": "rms", "position": "rotary", "feed_forward": "swiglu"}
GPT = {"norm": "layer", "position": "learned", "feed_forward": "gelu", "bias": True}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def step(context, device, style, attention):
    """Dtypes of a decoder's training step, its loss and its gradients."""
    torch.manual_seed(0)
    sizes = {"vocabulary": 50, "width": 32, "layers": 2, "heads": 2, "hidden": 64, "positions": 16}
    decoder = Decoder(DecoderConfig(**sizes, **style), attention).to(device)
    tokens = torch.randint(50, (2, 9)).to(device)
    with RecordDtypes() as record:
        with context:
            loss = cross_entropy(decoder(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
    return record.seen, loss, [p.grad for p in decoder.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attention", [attention_sdpa, attention_naive])
@pytest.mark.parametrize("style", [LLAMA, GPT], ids=["llama", "gpt"])
@pytest.mark.parametrize("device", DEVICES)
def test_every_operation_has_torchs_dtype(device, style, attention, dtype):
    """Forward and backward: those that compute, by name, each as often in each dtype."""
    theirs = step(torch.autocast(device, dtype), device, style, attention)
    ours = step(Autocast(POLICIES[device], dtype), device, style, attention)
    assert ours[0] == theirs[0]
    assert {d for _, dtypes in ours[0] for d in dtypes} >= {dtype, torch.float32}
    assert torch.equal(ours[1], theirs[1])
    for got, want in zip(ours[2], theirs[2], strict=True):
        assert got.dtype is torch.float32 and torch.equal(got, want)


def test_the_tables_by_hand():
    """A GPU's policy, on a CPU: products narrow, exponentials and sums wide, the rest as is."""
    x = torch.randn(4, 4)
    with Autocast(GPU):
        product = x @ x
        assert product.dtype is torch.bfloat16
        assert (product * 2).dtype is torch.bfloat16 and (product + x).dtype is torch.float32
        for wide in (product.softmax(-1), product.exp(), product.sum(), product**2):
            assert wide.dtype is torch.float32
        assert (x.double() @ x.double()).dtype is torch.float64
        assert torch.nn.functional.embedding(torch.tensor([1]), x).dtype is torch.float32
    with Autocast(CPU):
        assert (x @ x).softmax(-1).dtype is torch.bfloat16
    assert (x @ x).dtype is torch.float32


def test_weights_stay_and_get_float32_gradients():
    weight = torch.randn(3, 5, requires_grad=True)
    with Autocast(CPU):
        torch.nn.functional.linear(torch.randn(2, 5), weight).float().sum().backward()
    assert weight.dtype is weight.grad.dtype is torch.float32


def test_a_wide_narrow_type_is_refused():
    with pytest.raises(ValueError, match=r"bfloat16 or float16, got torch\.float32"):
        Autocast(CPU, torch.float32)
