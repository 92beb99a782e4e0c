"""The encoder-decoder against torch's nn.Transformer, and what only its masks can promise."""

import math

import pytest
import torch
from torch import Tensor, nn

from implementations.attention.vendor import attention_sdpa
from implementations.models.encoder import pad
from implementations.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

SMALL = EncoderDecoderConfig(vocabulary=53, width=32, layers=2, heads=4, hidden=80, positions=24)
NAMES = {
    "self_attn.out_proj": "attention.output",
    "multihead_attn.out_proj": "cross_attention.output",
    "linear1": "feed_forward.expand",
    "linear2": "feed_forward.contract",
    "norm1": "attention_norm",
}
NORMS = {"encoder": {"norm2": "feed_forward_norm"}}
NORMS["decoder"] = {"norm2": "cross_attention_norm", "norm3": "feed_forward_norm"}
STACKED = {"self_attn": "attention", "multihead_attn": "cross_attention"}


def small(**changes) -> EncoderDecoder:
    """A model whose every parameter is random, biases and norms too."""
    model = EncoderDecoder(EncoderDecoderConfig(**SMALL.__dict__ | changes)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def from_torch(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """nn.Transformer's weights, or their gradients, under our names; its thirds unstacked."""
    ours = {}
    for name, tensor in theirs.items():
        stack, *rest, kind = name.split(".")
        if rest == ["norm"]:
            ours[f"{stack}_norm.{kind}"] = tensor
            continue
        _, layer, *part = rest
        if kind.startswith("in_proj"):
            for third, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                prefix = f"{stack}.{layer}.{STACKED[part[0]]}.{third}"
                ours[f"{prefix}.{kind.removeprefix('in_proj_')}"] = piece
        else:
            part = (NAMES | NORMS[stack])[".".join(part)]
            ours[f"{stack}.{layer}.{part}.{kind}"] = tensor
    return ours


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # a fast path of theirs, not taken
@pytest.mark.parametrize("norm_first", [True, False])
def test_equals_nn_transformer(norm_first):
    """Logits and the gradient of every parameter; sources of 13, 1 and 6 tokens in one batch."""
    theirs = nn.Transformer(
        32, 4, 2, 2, 80, dropout=0.0, batch_first=True, norm_first=norm_first
    ).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = small(norm_first=norm_first)
    table = ours.embedding.weight
    weights = from_torch(theirs.state_dict()) | {"embedding.weight": table.detach()}
    ours.load_state_dict(weights, strict=True)
    source, mask = pad([torch.randint(53, (length,)).tolist() for length in (13, 1, 6)])
    target = torch.randint(53, (3, 7))

    hidden = theirs(
        ours.embed(source),
        ours.embed(target),
        tgt_mask=~torch.ones(7, 7).tril().bool(),
        src_key_padding_mask=~mask,
        memory_key_padding_mask=~mask,
    )
    expected, actual = hidden @ table.T, ours(source, target, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    upstream = torch.randn_like(expected)
    names, leaves = zip(*theirs.named_parameters(), strict=True)
    *gradients, by_table = torch.autograd.grad(expected, [*leaves, table], upstream)
    wanted = from_torch(dict(zip(names, gradients, strict=True))) | {"embedding.weight": by_table}
    actual.backward(upstream)
    for name, parameter in ours.named_parameters():
        gradient = wanted.pop(name)
        # A key's bias moves all scores of a row alike: its gradient is zero but for rounding.
        limit = 1e-10 * max(1.0, gradient.abs().max().item())
        assert (parameter.grad - gradient).abs().max() <= limit, name
    assert not wanted


def test_the_base_model_has_as_many_parameters_as_torchs():
    """nn.Transformer's defaults are the base model of 2017; the table comes on top."""
    with torch.device("meta"):
        theirs, ours = nn.Transformer(batch_first=True), EncoderDecoder(EncoderDecoderConfig())
    count = sum(parameter.numel() for parameter in theirs.parameters()) + 37000 * 512
    assert sum(parameter.numel() for parameter in ours.parameters()) == count


def test_embeddings_are_scaled_and_waves_added():
    """Section 3.4's sqrt(width), section 3.5's sine and cosine at position 3."""
    model, tokens = small(), torch.tensor([[5, 5, 5, 7]])
    waves = [(math.sin, math.cos)[i % 2](3 / 10000 ** (i // 2 * 2 / 32)) for i in range(32)]
    expected = model.embedding.weight[7] * math.sqrt(32) + torch.tensor(waves, dtype=torch.float64)
    torch.testing.assert_close(model.embed(tokens)[0, 3], expected, rtol=1e-10, atol=1e-10)


def test_a_fresh_embedding_has_size_one():
    """N(0, 1/width) times sqrt(width): 4,096 · 512 draws, the mean square within 5 deviations."""
    with torch.no_grad():
        model = EncoderDecoder(EncoderDecoderConfig(vocabulary=4096, layers=1, position="none"))
        mean_square = model.embed(torch.arange(4096)[None]).pow(2).mean().item()
    assert mean_square == pytest.approx(1, abs=5 * math.sqrt(2 / (4096 * 512)))


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "none"])
def test_the_order_of_the_source_is_told_by_positions_alone(position):
    model, source, target = small(position=position), *torch.randint(53, (2, 1, 9))
    with torch.no_grad():
        apart = (model(source.flip(1), target) - model(source, target)).abs().max()
    assert apart < 1e-10 if position == "none" else apart > 1e-6


def test_batched_with_padding_equals_alone():
    """Whatever the padding token, neither stack sees it."""
    model = small()
    rows = [torch.randint(1, 53, (length,)).tolist() for length in (11, 1, 5)]
    target = torch.randint(53, (3, 6))
    for padding in (0, 52):
        source, mask = pad(rows, padding)
        batched = model(source, target, mask)
        for row, wanted, got in zip(rows, target, batched, strict=True):
            alone = model(torch.tensor([row]), wanted[None])[0]
            torch.testing.assert_close(got, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm_first", [True, False])
def test_no_target_token_sees_the_future(norm_first):
    """Changing token 8 changes no logit before it, to the bit, and every one from it on."""
    model, source, target = small(norm_first=norm_first), *torch.randint(53, (2, 1, 15))
    with torch.no_grad():
        before = model(source, target)
        target[0, 8] = (target[0, 8] + 1) % 53
        after = model(source, target)
    assert torch.equal(before[:, :8], after[:, :8])
    assert (before[:, 8:] != after[:, 8:]).any(-1).all()


def test_every_target_token_reads_every_source_token():
    """Source and target of one length, so that reading the wrong one of them would run."""
    model, source, target = small(), *torch.randint(53, (2, 1, 9))
    with torch.no_grad():
        before = model(source, target)
        for place in range(9):
            other = source.clone()
            other[0, place] = (other[0, place] + 1) % 53
            assert (before - model(other, target)).abs().amax(-1).min() > 1e-6


def test_any_attention_of_the_same_signature_serves():
    naive, vendor = small(), EncoderDecoder(SMALL, attention_sdpa).double()
    vendor.load_state_dict(naive.state_dict())
    source, mask = pad([[1, 2, 3], [4]])
    target = torch.randint(53, (2, 7))
    torch.testing.assert_close(
        naive(source, target, mask), vendor(source, target, mask), rtol=1e-10, atol=1e-10
    )


def test_translating_is_writing_the_best_token_again_and_again():
    """Each text of a batch: its own best tokens, found alone, from the beginning every time."""
    model = small()
    rows = [torch.randint(53, (length,)).tolist() for length in (7, 1, 4)]
    source, mask = pad(rows)
    translations = model.translate(source, start=1, stop=-1, longest=12, mask=mask)
    for row, translation in zip(rows, translations, strict=True):
        written = [1]
        for _ in range(12):
            with torch.no_grad():
                logits = model(torch.tensor([row]), torch.tensor([written]))
            written.append(int(logits[0, -1].argmax()))
        assert translation == written[1:]


def test_translating_ends_before_the_stop_token():
    """Each text at its own stop; one that never stops, after `longest` tokens."""
    model, source = small(), torch.randint(53, (5, 6))
    endless = model.translate(source, start=1, stop=-1, longest=12)
    for stop in {token for row in endless for token in row}:
        expected = [row[: row.index(stop)] if stop in row else row for row in endless]
        assert model.translate(source, start=1, stop=stop, longest=12) == expected


def test_mistakes_are_sentences(unchecked):
    model, tokens = small(position="learned"), torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="25 tokens do not fit into 24 learned positions"):
        model(torch.zeros(2, 25, dtype=torch.long), tokens)
    with pytest.raises(ValueError, match="2 targets need as many sources, got 1"):
        model(tokens[:1], tokens)
    with pytest.raises(ValueError, match=r"the source is \[2, 5\], its mask \[2, 4\]"):
        model(tokens, tokens, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="1 token or more, got longest=0"):
        model.translate(tokens, start=1, stop=2, longest=0)
    with pytest.raises(ValueError, match="5 heads cannot share a width of 32"):
        small(heads=5)
