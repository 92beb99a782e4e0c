"""Settings are checked before any work, and each one is known to bind a run or not."""

import math
from dataclasses import fields, replace

import pytest

from implementations.training.settings import FREE, TrainingConfig


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"steps": 0}, "steps is at least 1, got 0"),
        ({"micro_batches": 0}, "micro_batches is at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is at least 1"),
        ({"keep": 0}, "keep is at least 1"),
        ({"log_every": 0}, "log_every is at least 1"),
        ({"observe_every": 0}, "observe_every is at least 1"),
        ({"warmup": 1000}, "warmup is less than steps, got 1000"),
        ({"learning_rate": 0.0}, "learning_rate is positive"),
        ({"learning_rate": math.nan}, "learning_rate is positive, got nan"),
        ({"clip": 0.0}, "clip is positive"),
        ({"final": 1.5}, "final is between 0 and 1, got 1.5"),
        ({"peak_flops": 1e12}, "MFU needs both"),
    ],
)
def test_a_wrong_setting_is_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(TrainingConfig(), **change).check()


def test_settings_that_change_what_is_learned_bind():
    TrainingConfig(clip=math.inf).check()
    names = {field.name for field in fields(TrainingConfig)}
    assert names >= FREE
    assert set(TrainingConfig().binding()) == names - FREE
    assert {"learning_rate", "steps", "betas", "clip", "bfloat16"}.isdisjoint(FREE)
