"""Training in fp8 never writes a NaN: the step is refused, and the last good checkpoint goes on."""

import math
import os

import pytest
import torch
from torch import nn

from implementations.precision.fp8 import make_recipe, with_fp8
from implementations.training.accumulation import next_token_loss
from implementations.training.batches import RandomWindows
from implementations.training.checkpoint import checkpoints, load_latest
from implementations.training.loop import train
from implementations.training.run import Diverged
from implementations.training.settings import TrainingConfig


def model_in_fp8() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Embedding(13, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 13)
    return with_fp8(nn.Sequential(*layers), lambda: make_recipe("delayed"))


PLANTED = [("loss", math.nan), ("activation", math.nan), ("gradient", math.inf)]


@pytest.mark.parametrize(("where", "bad"), PLANTED)
def test_the_last_good_checkpoint_stands_and_goes_on(where, bad, tmp_path, monkeypatch):
    """What is planted in step 7 passes through the scalings' histories, which are saved too."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # there is no power cut here
    text = torch.randint(13, (500,), generator=torch.Generator().manual_seed(5))
    batches = RandomWindows(text, batch=4, length=16, seed=7)
    config = TrainingConfig(
        steps=12, warmup=2, learning_rate=0.02, checkpoint_every=4, progress=False
    )
    calls = []

    def spoiled(model, batch):
        calls.append(1)
        planted = len(calls) == 7
        hook = model[1].register_forward_pre_hook(
            lambda _, inputs: inputs[0] * bad if planted and where == "activation" else None
        )
        total, count = next_token_loss(model, batch)
        hook.remove()
        if planted and where == "gradient":
            model[3].weight.register_hook(lambda gradient: gradient * bad)
        return total * bad if planted and where == "loss" else total, count

    model = model_in_fp8()
    with pytest.raises(Diverged, match=r"at step 7.*step-00000004"):
        train(model, batches, config, tmp_path / "broken", loss=spoiled)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert [path.name[-1] for path in checkpoints(tmp_path / "broken")] == ["0", "4"]
    step, state = load_latest(tmp_path / "broken")
    assert step == 4 and any("history" in name for name in state.tensors["weights"])
    for name in ("weights", "moments"):
        assert all(value.isfinite().all() for value in state.tensors[name].values())

    again, unbroken = model_in_fp8(), model_in_fp8()
    assert train(again, batches, config, tmp_path / "broken").resumed_from == 4
    train(unbroken, batches, config, tmp_path / "unbroken")
    for ours, theirs in zip(
        again.state_dict().values(), unbroken.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
