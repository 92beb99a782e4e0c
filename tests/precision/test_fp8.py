"""fp8's scalings against ml_dtypes by hand, its products against torch._scaled_mm and float64."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from implementations.precision.fp8 import (
    E4M3,
    E5M2,
    Delayed,
    Fp8Linear,
    Scaled,
    amax_of,
    current,
    dequantize,
    make_recipe,
    product_naive,
    product_scaled_mm,
    quantize,
    quantize_blocks,
    quantize_both,
    remembered,
    scale_of,
    spread,
    with_fp8,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("current", "delayed", "block")
DTYPES = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}


def by_hand(x: torch.Tensor, dtype: torch.dtype, amax: float) -> torch.Tensor:
    """One block: divided, rounded by ml_dtypes, multiplied back; in NumPy, from the definition."""
    end = np.float32(torch.finfo(dtype).max)
    scale = end / np.float32(amax)
    words = np.clip(x.float().numpy() * scale, -end, end).astype(DTYPES[dtype])
    return torch.from_numpy(words.astype(np.float32) * (np.float32(1) / scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_current_scaling_is_the_definition(dtype):
    x = torch.randn(37, 50) * torch.exp2(torch.randint(-20, 3, (37, 1)))
    row_form, column_form = current(x, dtype)
    want = by_hand(x, dtype, x.abs().max().item())
    assert torch.equal(dequantize(row_form), want)
    assert torch.equal(dequantize(column_form), want.T)
    assert column_form.values.is_contiguous()
    assert row_form.values.float().abs().max() == torch.finfo(dtype).max  # the range is used


@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (130, 257), (128, 384)], ids=str)
@pytest.mark.parametrize("block", [(1, 128), (128, 128), (2, 3)], ids=str)
def test_blocks_are_the_definition(shape, block):
    x = torch.randn(shape) * torch.exp2(torch.randint(-6, 7, shape))
    for form, values in zip(quantize_blocks(x, E4M3, block), (x, x.T), strict=True):
        want = torch.empty_like(values)
        for i in range(0, values.shape[0], block[0]):
            for j in range(0, values.shape[1], block[1]):
                part = values[i : i + block[0], j : j + block[1]]
                want[i : i + block[0], j : j + block[1]] = by_hand(
                    part, E4M3, part.abs().max().item()
                )
        assert torch.equal(dequantize(form), want)


def test_an_outlier_costs_only_its_block():
    """4e7 is far beyond e4m3's reach of 2^18: the rest of a tensor vanishes, a block's does not."""
    x = torch.randn(4, 256).abs() + 0.1
    x[0, 0] = 4e7
    assert not dequantize(current(x, E4M3)[0])[1:].any()
    stored = dequantize(quantize_blocks(x, E4M3)[0])
    assert torch.allclose(stored[1:], x[1:], rtol=2**-4) and torch.allclose(
        stored[0, 128:], x[0, 128:], rtol=2**-4
    )


def test_scales_by_hand():
    amax = torch.tensor([0.0, 448.0, 1.0, 1e-45, 3e38, torch.inf, torch.nan])
    scale = scale_of(amax, E4M3)
    assert scale[:4].tolist() == [1.0, 1.0, 448.0, 2.0**126]
    assert scale[4] == pytest.approx(448 / 3e38) and scale[5] == 0 and scale[6].isnan()
    for inverse in 1 / scale[:5]:  # normal numbers, which no mode of a GPU flushes
        assert 2.0**-126 <= inverse < torch.inf


def test_zeros_and_nothing():
    for scaling in (current, quantize_blocks, Delayed()):
        for form in scaling(torch.zeros(3, 5), E4M3):
            assert not dequantize(form).any() and dequantize(form).isfinite().all()
        row_form, column_form = scaling(torch.zeros(0, 5), E4M3)
        assert dequantize(row_form).shape == (0, 5) and dequantize(column_form).shape == (5, 0)
    assert amax_of(torch.zeros(0, 5)) == 0 and amax_of(torch.zeros(0, 5), (1, 4)).shape == (0, 2)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_visible(bad):
    """NaN all over its tensor or block: a skipped step, and no history that remembers it."""
    x = torch.randn(4, 256)
    x[1, 3] = bad
    assert dequantize(current(x, E5M2)[0]).isnan().all()
    stored = dequantize(quantize_blocks(x, E5M2)[0])
    assert stored[1, :128].isnan().all() and stored.isnan().sum() == 128
    delayed = Delayed()
    delayed(torch.randn(4, 4), E5M2)
    before = delayed.history.clone()
    assert not dequantize(delayed(x, E5M2)[0]).isfinite().all() or abs(bad) == torch.inf
    assert delayed.history.isfinite().all() and delayed.history.amax() == before.amax()


def test_delayed_scaling_by_hand():
    """The scale of a call is of the calls before it; what has grown is cut off, what shrinks waits
    until the old amax is forgotten."""
    delayed, seen = Delayed(length=2), []
    for size in (2.0, 4.0, 16.0, 1.0, 4.0, 1.0):
        stored = dequantize(delayed(torch.tensor([[size, -size / 2]]), E4M3)[0])
        seen.append((delayed.history.tolist(), stored.tolist()[0]))
    assert [history for history, _ in seen] == [
        [2, 0],
        [4, 2],
        [16, 4],
        [1, 16],
        [4, 1],
        [1, 4],
    ]
    assert seen[0][1] == [2, -1]  # by a scale of 1
    assert seen[1][1] == [2, -2]  # the largest of before, 2, is the end
    assert seen[2][1] == [4, -4]
    assert seen[3][1] == [1, -0.5]
    assert seen[4][1] == [4, -2]  # 16 is remembered, not only the 1 after it


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_too_large_becomes_the_end(dtype):
    """A plain cast makes an infinity of it in e5m2, and in e4m3 what the version of torch likes."""
    end = torch.finfo(dtype).max
    stored = quantize(torch.tensor([[2 * end, -1.2 * end, end]]), dtype, torch.tensor(1.0))
    assert dequantize(stored).tolist() == [[end, -end, end]]


def test_history_forgets_the_oldest():
    history = torch.tensor([3.0, 2.0, 1.0])
    assert remembered(history, torch.tensor(7.0)).tolist() == [7, 3, 2]
    assert remembered(history, torch.tensor(torch.nan)).tolist() == [3, 3, 2]


@pytest.mark.parametrize("kinds", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=str)
@pytest.mark.parametrize("sizes", [(3, 16, 32), (64, 48, 272)], ids=str)
def test_product_is_scaled_mms(sizes, kinds):
    """Torch's product of the same words and scales; a CPU sums it in float32."""
    rows, columns, inner = sizes
    left = current(torch.randn(rows, inner, device=DEVICE), kinds[0])[0]
    right = current(torch.randn(columns, inner, device=DEVICE) / 7, kinds[1])[0]
    exact = dequantize(left).double() @ dequantize(right).double().T
    size = dequantize(left).abs().double() @ dequantize(right).abs().double().T
    for product, rounding in ((product_naive, 2.0**-22), (product_scaled_mm, 2.0**-12)):
        # On a GPU the tensor core aligns its terms to about 14 bits.
        got = product(left, right, torch.float32).double()
        limit = inner**0.5 * (rounding if DEVICE == "cuda" else 2.0**-22) * size
        assert ((got - exact).abs() <= limit).all()
    got = product_scaled_mm(left, right, torch.bfloat16)
    assert got.dtype is torch.bfloat16
    assert ((got.double() - exact).abs() <= 2.0**-8 * exact.abs() + limit).all()


@pytest.mark.cuda
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("sizes", [(256, 128, 512), (144, 384, 1024)], ids=str)
def test_product_of_blocks_is_the_emulations(sizes, square):
    """Strips with strips, as for dW, and with squares, as for y and dx.

    A tensor core aligns the terms of a sum to about 14 bits below the largest; between the blocks
    of 128 the sums are promoted to float32. With one block much larger, a scale that met the wrong
    block would be seen at once.
    """
    rows, columns, inner = sizes
    left, right = (
        torch.randn(rows, inner, device=DEVICE),
        torch.randn(columns, inner, device=DEVICE),
    )
    left[:, 128:256] *= 64
    right[:, :128] *= 16
    right[:128] /= 8
    a = quantize_blocks(left, E4M3)[0]
    b = quantize_blocks(right, E4M3, (128, 128) if square else (1, 128))[0]
    exact = dequantize(a).double() @ dequantize(b).double().T
    # A term is cut at 2^-13 of the largest of the terms beside it: 128 times, in each block.
    largest_right = spread(448 * b.inverse, (b.block[0], 1), torch.Size((columns, inner // 128)))
    limit = 128 * 2.0**-13 * (448 * a.inverse).double() @ largest_right.double().T
    got = product_scaled_mm(a, b, torch.bfloat16).double()
    assert ((got - exact).abs() <= limit + 2.0**-8 * exact.abs()).all()
    assert limit.mean() < exact.abs().mean() / 4  # it says something


@pytest.mark.parametrize("device", ["meta", DEVICE])
def test_a_history_lives_where_the_weight_does(device):
    layer = Fp8Linear(nn.Linear(16, 16, device=device), make_recipe("delayed"))
    assert layer.recipe.input.history.device == layer.weight.device


def test_scaled_mm_refuses_in_words():
    def scaled(rows, inner, dtype=E4M3):
        return Scaled(torch.zeros(rows, inner).to(dtype), torch.tensor(1.0))

    square = scaled(128, 768)._replace(block=(128, 128))
    for left, right, sentence in (
        (scaled(4, 17), scaled(16, 17), "16 numbers at a time, got 17 and 16"),
        (scaled(4, 16), scaled(15, 16), "16 numbers at a time, got 16 and 15"),
        (scaled(4, 16, E5M2), scaled(16, 16, E5M2), "no product of e5m2 with e5m2"),
        (scaled(128, 768), square, "inner size in multiples of 512, got 768"),
        (square, scaled(128, 768), "inner size in multiples of 512, got 768"),
    ):
        with pytest.raises(ValueError, match=sentence):
            product_scaled_mm(left, right, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_three_products_with_their_operands(name):
    """Output and gradients are the products of what each operand was rounded to, in the direction
    in which it is summed. With operands that fp8 holds exactly, they are nn.Linear's."""
    linear = nn.Linear(256, 32)
    exact = torch.tensor([-4.0, -1.0, -0.5, 0.0, 0.25, 2.0, 4.0])  # · 112: 1.75 · 2^k
    linear.weight.data = exact[torch.randint(7, linear.weight.shape)]
    x = exact[torch.randint(7, (2, 128, 256))].requires_grad_()
    upstream = exact[torch.randint(7, (2, 128, 32))]
    want = linear(x)
    gradients = torch.autograd.grad(want, (x, linear.weight, linear.bias), upstream)
    layer = Fp8Linear(linear, make_recipe(name))
    got = layer(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)
    ours = torch.autograd.grad(got, (x, layer.weight, layer.bias), upstream)
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)  # inverses of 1 / 112


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_close_to_the_linear_layers(name):
    """Relative errors of a few percent, e5m2's gradients' twice e4m3's: 2^-3 and 2^-4 at most."""
    linear = nn.Linear(384, 128, bias=False)
    x, upstream = torch.randn(256, 384).requires_grad_(), torch.randn(256, 128)
    want = [linear(x), *torch.autograd.grad(linear(x), (x, linear.weight), upstream)]
    layer = Fp8Linear(linear, make_recipe(name))
    for _ in range(2):  # delayed scaling knows nothing in the first step
        y = layer(x)
        got = [y, *torch.autograd.grad(y, (x, layer.weight), upstream)]
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    gradient_limit = 0.045 if name == "block" else 0.07
    assert errors[0] < 0.045 and max(errors[1:]) < gradient_limit
    assert min(errors) > 0.01  # it was rounded at all


def test_what_is_kept_for_the_backward_pass_is_8_bits():
    kept = []
    layer = Fp8Linear(nn.Linear(64, 32, bias=False), make_recipe("current"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(16, 64))
    assert {t.dtype for t in kept if t.numel() > 1} == {E4M3}
    assert sum(t.numel() for t in kept if t.numel() > 1) == 16 * 64 + 32 * 64


def test_a_models_linear_layers_are_exchanged():
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 8)))
    names = set(model.state_dict())
    weight = model[1][1].weight
    model = with_fp8(model, lambda: make_recipe("delayed"))
    assert isinstance(model[0], Fp8Linear) and model[1][1].weight is weight
    added = set(model.state_dict()) - names
    assert len(added) == 6 and all(name.endswith("_scaling.history") for name in added)
    model(torch.randn(4, 16)).sum().backward()
    histories = {name: model.state_dict()[name][0].item() for name in added}
    assert len(set(histories.values())) == 6 and 0 not in histories.values()


def test_the_output_follows_autocast():
    layer = Fp8Linear(nn.Linear(16, 16), make_recipe("current"))
    x = torch.randn(2, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16 and layer(x).dtype is torch.float32
    y.float().sum().backward()
    assert x.grad.dtype is layer.weight.grad.dtype is torch.float32


def test_mistakes_are_refused(unchecked):
    with pytest.raises(ValueError, match="a scaling is of a matrix"):
        quantize(torch.ones(2), E4M3, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"float32 or a narrower float, got torch\.float64"):
        quantize_both(torch.ones(2, 2).double(), E4M3, torch.tensor(1.0))
    with pytest.raises(ValueError, match="recipes are current, delayed and block"):
        make_recipe("blocks")
