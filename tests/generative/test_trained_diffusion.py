"""Training: the same twice, the same when it was stopped, on parts that share no picture."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from implementations.generative import diffusion_training, trained_diffusion
from implementations.generative.denoiser import generate, training_loss
from implementations.generative.diffusion_config import DiffusionConfig, for_device, untrained
from implementations.generative.diffusion_pictures import pictures
from implementations.generative.diffusion_training import Training
from implementations.generative.ema import decay_at
from implementations.generative.samplers import SAMPLERS
from implementations.generative.schedules import SCHEDULES
from implementations.generative.trained_diffusion import make, train_or_load
from implementations.lab.compare import allowed, error
from implementations.training.run import Diverged

TINY = DiffusionConfig(
    data="digits", size=8, widths=(8, 8), parts=1, groups=4, head=8, steps=60, batch=8, dropout=0.2
)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(cache, monkeypatch):
    whole = train_or_load(TINY)

    @contextmanager
    def stop_at_once():
        class Later(list):
            asks = 0

            def __bool__(self):  # asked before every update: stop before the fortieth
                self.asks += 1
                return self.asks > 40

        yield Later([15])

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "other"))
    with monkeypatch.context() as patch:
        patch.setattr(trained_diffusion, "stop_requests", stop_at_once)
        with pytest.raises(SystemExit) as leaving:
            train_or_load(TINY)
    assert leaving.value.code == 143
    resumed = train_or_load(TINY)
    for ours, wanted in ((resumed.model, whole.model), (resumed.raw, whole.raw)):
        assert torch.equal(weights(ours), weights(wanted))
    assert [look["held_out"] for look in resumed.history] == [
        look["held_out"] for look in whole.history
    ]
    assert not resumed.model.training
    again = train_or_load(TINY)
    assert torch.equal(weights(again.model), weights(whole.model))
    assert whole.history[-1]["held_out"] < whole.history[0]["held_out"]


def test_the_average_follows_after_the_optimizers_step():
    """After one update: decay_0 of the first weights and the rest of the second, exactly."""
    training = Training(TINY, "cpu")
    before = weights(training.model)
    training.update(0)
    after, decay = weights(training.model), decay_at(0, TINY.decay)
    assert (after - before).abs().max() > 1e-5
    wanted = decay * before + (1 - decay) * after
    torch.testing.assert_close(weights(training.average), wanted, rtol=0, atol=1e-6)


def test_parts_share_no_picture_and_are_signed():
    data = pictures("digits", 8)
    rows = [
        {tuple(row) for row in part.pixels.flatten(1).tolist()}
        for part in (data.train, data.validation, data.test)
    ]
    assert [len(part.labels) for part in data[:3]] == [1295, 143, 359]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    assert data.train.pixels.min() == -1 and data.train.pixels.max() == 1
    mnist = pictures("mnist_5k", 14)
    assert mnist.train.pixels.min() >= -1.001 and mnist.train.pixels.max() <= 1.001
    assert mnist.train.pixels.min() < -0.99 and mnist.train.pixels.max() > 0.9


def test_times_of_a_batch_are_spread():
    training = Training(TINY, "cpu")
    data, noise, log_snr, labels = training.draw(3)
    assert data.shape == noise.shape == (8, 1, 8, 8)
    # One time in every eighth of the schedule.
    time = training.schedule.time_of(log_snr.double())
    assert (time.sort().values * 8 - torch.arange(8)).diff().abs().max() < 1.0
    assert labels.max() <= 10
    for ours, again in zip(training.draw(3), (data, noise, log_snr, labels), strict=True):
        assert torch.equal(ours, again)


def test_nan_stops_the_run(cache, monkeypatch):
    def broken(*args):
        return training_loss(*args) * torch.nan

    monkeypatch.setattr(diffusion_training, "training_loss", broken)
    with pytest.raises(Diverged, match="the loss is nan between steps 0 and 25"):
        train_or_load(replace(TINY, steps=30))


def test_made_pictures_do_not_depend_on_the_batch(cache):
    model = train_or_load(replace(TINY, steps=2)).model
    labels, shape = torch.arange(6) % 10, (1, 8, 8)
    way = {"sampler": "ddim", "steps": 3}
    whole = make(model, labels, 6, shape, **way)
    parts = make(model, labels, 6, shape, at_once=4, **way)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


def test_other_models_are_trained_too(cache):
    changes = {"model": "transformer", "width": 16, "layers": 1, "head": 8, "patch": 4}
    flow = {"kind": "flow", "schedule": "straight", "times": "logit_normal", "labelled": False}
    trained = train_or_load(replace(TINY, steps=3, dequantized=True, **changes, **flow))
    assert trained.history[-1]["step"] == 3


def test_bad_settings():
    with pytest.raises(ValueError, match="sets are mnist_5k"):
        pictures("cifar", 32)
    with pytest.raises(ValueError, match="kanji has no labels to learn from"):
        untrained(replace(TINY, data="kanji", size=8))
    assert for_device("cpu").size == 14 and for_device("cuda").size == 28


def gradients(model: nn.Module, inputs: list[torch.Tensor], narrow: bool) -> torch.Tensor:
    """Of an update's loss by the equation, as one vector, its length cut to one."""
    with torch.autocast("cuda", torch.bfloat16, enabled=narrow):
        loss = training_loss(model, *inputs).mean()
    found = torch.autograd.grad(loss, list(model.parameters()))
    found = torch.cat([gradient.flatten() for gradient in found])
    return found * (diffusion_training.CLIP / found.norm()).clamp(max=1)


@pytest.fixture
def as_users_run_it(unchecked):
    """Deterministic kernels are other ones, and some have no such form."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inductor's own
def test_the_graphs_update_is_the_equation_in_bfloat16(as_users_run_it):
    """Compiled, captured and replayed, its gradient is at most twice as wrong as autocast's.

    Both against float64. Kernels that inductor joins round less often, never more.
    """
    training = Training(replace(TINY, dropout=0.0), "cuda")
    # Zero at first, and with it all other gradients: after a captured update it is not.
    nn.init.normal_(training.model.network.leave.weight, std=0.1)
    model, average = copy.deepcopy(training.model), weights(training.average)
    training.update(0)
    torch.cuda.synchronize()
    data, noise, log_snr, labels = training.inputs
    wide = [data.double(), noise.double(), log_snr.double(), labels]
    exact = gradients(copy.deepcopy(model).double(), wide, narrow=False)
    naive = gradients(model, training.inputs, narrow=True)
    ours = torch.cat([parameter.grad.flatten() for parameter in training.parameters])
    seen, limit = error(ours, exact), allowed(naive, exact)
    assert limit.mean < 0.1 * exact.abs().mean().item()  # it says something
    assert seen.largest <= limit.largest and seen.mean <= limit.mean, (seen, limit)
    decay = decay_at(0, TINY.decay)
    wanted = decay * average + (1 - decay) * weights(training.model)
    torch.testing.assert_close(weights(training.average), wanted, rtol=0, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_run_on_the_gpu_learns_as_one_on_the_cpu_does(cache, as_users_run_it):
    """Other random numbers and narrower ones, and the same loss of held-out digits to a tenth."""
    settings = replace(TINY, steps=300, learning_rate=3e-3)
    last = {
        device: train_or_load(settings, device).history[-1]["held_out"]
        for device in ("cpu", "cuda")
    }
    assert last["cuda"] < 0.6  # 1.1 at first: the variance of v
    assert last["cuda"] == pytest.approx(last["cpu"], rel=0.1)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm++"])
def test_samplers_on_the_gpu_are_those_on_the_cpu(name, as_users_run_it):
    """In float64, with labels and guidance; those with fresh noise draw it on their device."""
    model = untrained(TINY).double()
    nn.init.normal_(model.network.leave.weight, std=0.1)
    noise, labels = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    made = [
        generate(
            copy.deepcopy(model).to(device),
            noise.to(device),
            SCHEDULES["cosine"],
            5,
            SAMPLERS[name],
            labels=labels.to(device),
            scale=2.0,
        ).cpu()
        for device in ("cpu", "cuda")
    ]
    assert made[0].std() > 0.1
    torch.testing.assert_close(made[1], made[0], rtol=1e-9, atol=1e-9)
