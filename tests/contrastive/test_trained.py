"""Trained models: the right batches, the same model again from the cache, refusals."""

from dataclasses import replace

import pytest
import torch

from implementations.contrastive.named_pictures import as_floats, scratch_reader, split_pictures
from implementations.contrastive.trained import (
    CLIPConfig,
    SimCLRConfig,
    batches,
    reader,
    train_or_load,
    untrained,
)
from implementations.lab.files import cache_folder

SMALL = {"image": 16, "patch": 8, "width": 16, "layers": 1, "dim": 8, "pictures": 120}
SMALL |= {"steps": 4, "batch": 16}
CLIP_SMALL = CLIPConfig(**SMALL, text="scratch", languages=("en", "de"))


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory):
    """An empty cache folder for all tests of this file, so that the pictures are drawn once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_a_model_is_trained_once_and_then_read():
    """The second call finds the finished run, and gives the same weights to the bit."""
    first = train_or_load(CLIP_SMALL)
    (folder,) = cache_folder("runs").iterdir()
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    again = train_or_load(CLIP_SMALL)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == written
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    before = untrained(CLIP_SMALL)
    assert not torch.equal(before.log_scale, first.log_scale)
    train_or_load(replace(CLIP_SMALL, seed=1))
    assert len(list(cache_folder("runs").iterdir())) == 2


def test_pairs_are_a_picture_and_its_own_name(monkeypatch):
    """Unaugmented, each picture is found among the training pictures, and its text is one of the
    two names of it."""
    monkeypatch.setattr(
        "implementations.contrastive.trained.augment", lambda pixels, *_, **__: pixels
    )
    shown, _ = split_pictures(16, 120)
    read = reader(CLIP_SMALL)
    pixels, known = as_floats(shown), {word: read(shown.names[word]) for word in ("en", "de")}
    spoken = set()
    for step in range(4):
        seen, texts = batches(CLIP_SMALL, read)(step)
        rows = torch.cdist(seen.flatten(1), pixels.flatten(1)).argmin(1)
        assert len(shown.family[rows].unique()) == 16
        for row, text in zip(rows.tolist(), texts, strict=True):
            named = {word for word in known if torch.equal(known[word][row], text)}
            assert named
            spoken |= named if len(named) == 1 else set()
    assert spoken == {"en", "de"}


def test_views_are_of_one_picture_and_changed_apart(monkeypatch):
    config, asked = SimCLRConfig(**SMALL), []

    def spy(pixels, *_, **options):
        asked.append((pixels, options))
        return torch.stack([pixels, pixels + 1])

    first, second = batches(config, None)(3)
    assert first.shape == second.shape == (16, 3, 16, 16)
    assert ((first - second).abs().amax((1, 2, 3)) > 0.01).all()
    monkeypatch.setattr("implementations.contrastive.trained.two_views", spy)
    first, second = batches(config, None)(3)
    assert torch.equal(second, first + 1)
    assert asked[0][1] == {"seed": 0, "step": 3}


def test_a_frozen_text_tower_has_nothing_to_learn():
    model = untrained(CLIPConfig(**SMALL))
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"image_tower", "image_projection", "text_projection", "log_scale"}


def test_byte_pairs_are_learned_from_training_names_alone():
    shown, hidden = split_pictures(16, 120)
    expected = scratch_reader(shown.names["en"] + shown.names["de"])
    read = reader(CLIP_SMALL)
    assert torch.equal(read(hidden.names["en"]), expected(hidden.names["en"]))


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"text": "word2vec"}, "minilm and scratch, got 'word2vec'"),
        ({"batch": 1}, "from 2 to all"),
        ({"patch": 5}, "patch"),
        ({"pictures": 5}, "got 5"),
    ],
)
def test_bad_settings(changed, sentence, unchecked):
    with pytest.raises(ValueError, match=sentence):
        train_or_load(replace(CLIP_SMALL, **changed))
