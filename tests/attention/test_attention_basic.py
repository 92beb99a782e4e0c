"""attention_basic: the equation against torch, a table worked by hand, and its own derivatives."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from implementations.attention_basic import (
    Config,
    attention_naive,
    attention_weights,
    future,
    main,
    repeat_heads,
)
from implementations.lab.compare import assert_same_function, error

ROOT = Path(__file__).parents[2]

# batch, heads, key heads, queries, keys, dim: ones, odd sizes, groups of 1, 4 and 8, queries < keys
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 4, 4, 63, 63, 16),
    (1, 8, 2, 5, 257, 64),
    (2, 8, 1, 63, 64, 80),
    (1, 3, 3, 1, 63, 256),
]


def draw(batch, heads, key_heads, queries, keys, dim, dtype=torch.float64):
    """Random query, key and value of one shape."""
    sizes = [(heads, queries), (key_heads, keys), (key_heads, keys)]
    return [torch.randn(batch, h, tokens, dim, dtype=dtype) for h, tokens in sizes]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(shape):
    """Output and gradients are those of torch's attention, heads in groups included."""
    torch_attention = lambda *inputs: sdpa(*inputs, enable_gqa=True)  # noqa: E731
    assert_same_function(attention_naive, torch_attention, *draw(*shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_causal_equals_torch_aligned_at_the_last_key(shape):
    """Torch's own lower-right causal bias is the authority for queries < keys."""
    inputs = draw(*shape)
    bias = causal_lower_right(shape[3], shape[4])
    expected = lambda *x: sdpa(*x, attn_mask=bias._materialize(), enable_gqa=True)  # noqa: E731
    assert_same_function(lambda *x: attention_naive(*x, causal=True), expected, *inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks_equal_torchs(shape, kind):
    """A mask is True where a query may look, or a number added to the score, as in torch."""
    query, key, value = draw(*shape)
    mask = torch.rand(shape[0], 1, shape[3], shape[4]) > 0.5
    mask[..., 0] = True  # rows that see nothing have a test of their own
    mask = mask if kind == "boolean" else torch.randn(mask.shape, dtype=torch.float64)
    assert_same_function(
        lambda *x: attention_naive(*x, mask=mask),
        lambda *x: sdpa(*x, attn_mask=mask, enable_gqa=True),
        query,
        key,
        value,
    )


def test_scale_replaces_one_over_root_dim():
    inputs = draw(1, 2, 2, 5, 5, 16)
    expected = lambda *x: sdpa(*x, scale=0.7)  # noqa: E731
    assert_same_function(lambda *x: attention_naive(*x, scale=0.7), expected, *inputs)


def test_causal_alignment_by_hand():
    """Two queries at the end of four keys: only the first has a future, the last key."""
    assert future(2, 4).tolist() == [[False, False, False, True], [False, False, False, False]]
    assert future(3, 3).tolist() == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]


def test_weights_by_hand():
    """Scores ln 1, ln 2, ln 5 give weights 1/8, 2/8, 5/8, and those average the values."""
    query = torch.tensor([[[1.0]]], dtype=torch.float64)
    key = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log()[None, :, None]
    value = torch.tensor([8.0, 16.0, 80.0], dtype=torch.float64)[None, :, None]
    weights = attention_weights(query, key)
    torch.testing.assert_close(weights.flatten().tolist(), [1 / 8, 2 / 8, 5 / 8])
    assert attention_naive(query, key, value).item() == pytest.approx(1 + 4 + 50)


@pytest.mark.parametrize("mask_type", [torch.bool, torch.float64])
def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient(mask_type):
    """As in torch: zeros, not NaN, in the output and in every gradient."""
    inputs = [x.requires_grad_() for x in draw(1, 2, 2, 3, 4, 16)]
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    if mask_type != torch.bool:
        mask = torch.zeros(3, 4, dtype=mask_type).masked_fill(~mask, -torch.inf)
    output = attention_naive(*inputs, mask=mask)
    assert output[..., 1, :].count_nonzero() == 0
    assert error(output, sdpa(*inputs, attn_mask=mask)).largest < 1e-12
    gradients = torch.autograd.grad(output, inputs, torch.randn_like(output))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][..., 1, :].count_nonzero() == 0


def test_gradcheck_and_gradgradcheck():
    """First and second derivatives by finite differences, causal, in groups, with a hidden row."""
    inputs = [x.requires_grad_() for x in draw(1, 2, 1, 3, 4, 3)]
    mask = torch.tensor([[True] * 4, [False] * 4, [True, False, True, True]])
    function = lambda *x: attention_naive(*x, causal=True, mask=mask)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_narrow_inputs_are_widened(dtype):
    """float32 inside: the result is exact up to one rounding to the narrow type, and keeps it."""
    inputs = draw(2, 4, 2, 63, 63, 64, dtype=dtype)
    output = attention_naive(*inputs, causal=True)
    exact = attention_naive(*(x.double() for x in inputs), causal=True)
    assert output.dtype == dtype
    # The rounding to dtype, and float32's own error in sums of 64 and 63 terms of size about one.
    limit = torch.finfo(dtype).eps / 2 * exact.abs().max() + 64 * torch.finfo(torch.float32).eps
    assert error(output, exact).largest <= limit


def test_each_row_is_a_distribution_over_the_visible_keys():
    query, key, _ = draw(2, 4, 2, 7, 9, 16)
    weights = attention_weights(query, key, causal=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights.masked_select(future(7, 9)) == 0).all()


def test_equal_keys_average_the_values():
    query, key, value = draw(1, 2, 2, 5, 6, 16)
    output = attention_naive(query, key[..., :1, :].expand_as(key), value)
    torch.testing.assert_close(output, value.mean(-2, keepdim=True).expand_as(output))


def test_a_forbidden_key_does_not_matter():
    """Changing a masked key and value, by however much, changes no bit of the output."""
    query, key, value = draw(1, 2, 2, 5, 6, 16)
    mask = torch.arange(6) < 4
    before = attention_naive(query, key, value, mask=mask[None])
    key[..., 4:, :], value[..., 4:, :] = 1e6, -1e6
    assert torch.equal(attention_naive(query, key, value, mask=mask[None]), before)


def test_heads_of_a_group_are_neighbours():
    """Heads 0 and 1 read key head 0, heads 2 and 3 read key head 1: as in Llama, by hand."""
    repeated = repeat_heads(torch.tensor([10.0, 20.0])[:, None, None], 4)
    assert repeated.flatten().tolist() == [10, 10, 20, 20]


@pytest.mark.parametrize("queries, keys", [(0, 3), (3, 0), (0, 0)])
def test_empty_inputs(queries, keys):
    """No query gives no row; no key gives rows of zeros, as torch says."""
    inputs = draw(2, 4, 2, queries, keys, 16)
    output = attention_naive(*inputs)
    assert output.shape == (2, 4, queries, 16)
    assert output.count_nonzero() == 0


def test_a_nan_is_never_hidden():
    query, key, value = draw(1, 1, 1, 3, 3, 16)
    key[..., 1, 0] = torch.nan
    assert attention_naive(query, key, value).isnan().all()


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"causal": True}, "causal attention needs queries <= keys, got 5 > 3"),
        ({"mask": torch.ones(5, 3, dtype=torch.long)}, "a mask is Boolean or added"),
    ],
)
def test_bad_input_is_a_sentence(unchecked, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        attention_naive(*draw(1, 2, 2, 5, 3, 16), **change)


def test_key_heads_must_divide_heads(unchecked):
    with pytest.raises(ValueError, match="3 key heads cannot be shared evenly by 4 query heads"):
        attention_naive(*draw(1, 4, 3, 5, 5, 16))


def test_walk_prints_the_words_and_saves_the_picture(tmp_path, capsys):
    """The default sentence: in layer 3, head 1, 'it' looks at the animal."""
    main(Config(output=tmp_path / "heat.png"))
    printed = capsys.readouterr().out
    assert "'it'          looks at animal 0.68" in printed
    assert all(f"{number:2}. " in printed for number in range(1, 11))
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--text", ""], "the text is empty"),
        (["--text", "word " * 511], "at most 512 tokens, got 513"),
        (["--layer", "6"], "the model has layers 0 to 5, got layer 6"),
        (["--head", "-1"], "the model has heads 0 to 11, got head -1"),
        (["--output", "/nowhere/heat.png"], "cannot write there"),
        (["--output", "heat.txt"], "pictures end in one of"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_command_lines(tmp_path, monkeypatch, capsys, arguments, sentence):
    """One sentence, exit code 2, and no file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attention_basic.py", *arguments])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(ROOT / "implementations/attention_basic.py"), run_name="__main__")
    assert leaving.value.code == 2
    complaint = capsys.readouterr().err
    assert sentence in complaint and len(complaint.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_runs_by_path_from_anywhere(tmp_path):
    """As a learner starts it, in a process of its own."""
    script = ROOT / "implementations/attention_basic.py"
    command = [sys.executable, script, "--text", "Dog bites man.", "--layer", "0", "--head", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bites" in done.stdout and (tmp_path / "attention.png").exists()


@pytest.mark.cuda
def test_cuda_paths_are_compared(capsys):
    from implementations.attention_basic import compare_on_cuda

    compare_on_cuda()
    assert "torch's kernel" in capsys.readouterr().out
