"""Who asks for a trained model shares it: waits while another trains, reads what is finished."""

import shutil

import pytest
import torch

from implementations.contrastive import trained as contrastive
from implementations.generative import trained as autoencoders
from implementations.generative import trained_diffusion as diffusion
from implementations.generative.diffusion_config import DiffusionConfig
from implementations.models import picture_classifier as classifiers
from implementations.training.guard import exclusive

UNET = {"widths": (8, 8), "parts": 1, "groups": 4, "head": 8}
TOWER = {"image": 16, "patch": 8, "width": 16, "layers": 1, "dim": 8, "pictures": 60}
SHARED = {
    "autoencoder": (
        autoencoders,
        autoencoders.VAEConfig(data="digits", latent=2, hidden=8, steps=3, batch=8),
    ),
    "classifier": (
        classifiers,
        classifiers.ClassifierConfig(
            size=14, width=8, layers=1, heads=2, hidden=8, steps=3, batch=4
        ),
    ),
    "contrastive": (contrastive, contrastive.SimCLRConfig(**TOWER, steps=2, batch=8)),
    "diffusion": (diffusion, DiffusionConfig(data="digits", size=8, **UNET, steps=3, batch=8)),
}


@pytest.mark.parametrize("kind", SHARED)
def test_one_trains_another_waits_and_a_third_reads(kind, cache, tmp_path, monkeypatch, while_held):
    """The one that waited finds it trained; the third one needs no turn. Both change nothing."""
    module, config = SHARED[kind]

    def asked_for(name):
        monkeypatch.setattr(module, "run_folder", lambda *settings: tmp_path / name)
        found = module.train_or_load(config)
        return torch.nn.utils.parameters_to_vector(getattr(found, "model", found).parameters())

    def saved(name):
        paths = (tmp_path / name).glob("step-*/*")
        return {path.relative_to(tmp_path / name): path.stat().st_mtime_ns for path in paths}

    def other():
        shutil.copytree(tmp_path / "other", tmp_path / "shared", dirs_exist_ok=True)

    first = asked_for("other")
    waited = while_held(tmp_path / "shared", lambda: asked_for("shared"), other)
    with exclusive(tmp_path / "shared"):
        assert torch.equal(asked_for("shared"), first)
    assert torch.equal(waited, first) and saved("shared") == saved("other") != {}
