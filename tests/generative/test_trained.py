"""Trained models: trained as was asked for, read by the second call, in the right levels."""

import shutil
from dataclasses import replace

import pytest
import torch

from implementations.generative.importance_weighted import importance_weighted_bound
from implementations.generative.trained import (
    VAEConfig,
    batches,
    held_out_pictures,
    images_of,
    objective,
    pictures,
    sampled_log_weights,
    train_or_load,
    untrained,
)
from implementations.sources.images import Images

SMALL = VAEConfig(data="digits", latent=2, hidden=8, steps=12, batch=8, dropout=0.0)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_second_call_reads_what_the_first_trained(cache, capsys):
    first = train_or_load(SMALL)
    (folder,) = (cache / "runs").iterdir()
    capsys.readouterr()
    assert same_weights(first, train_or_load(SMALL))
    assert f"{folder} holds this run, finished" in capsys.readouterr().err
    assert not first.training
    assert not same_weights(first, untrained(SMALL))


def test_a_run_that_was_cut_off_ends_with_the_same_bits(cache, monkeypatch):
    """Stopped after half of its updates, then asked for again."""
    whole = train_or_load(SMALL)
    (folder,) = (cache / "runs").iterdir()
    shutil.rmtree(folder)
    calls = []

    def interrupted(config, model, x):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return objective(config, model, x)

    with monkeypatch.context() as patch:
        patch.setattr("implementations.generative.trained.objective", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_or_load(SMALL)
    assert same_weights(whole, train_or_load(SMALL))


def test_another_setting_is_another_model(cache):
    train_or_load(SMALL)
    train_or_load(replace(SMALL, beta=2.0))
    assert len(list((cache / "runs").iterdir())) == 2


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretized_logistic"])
def test_training_raises_the_bound_on_pictures_it_has_not_seen(cache, likelihood):
    """200 steps halve the distance from an untrained model to nothing; seeds are fixed."""
    config = replace(SMALL, likelihood=likelihood, steps=200, hidden=32, learning_rate=5e-3)
    x = held_out_pictures(config)
    before, after = (
        sampled_log_weights(model, x, 5).mean()
        for model in (untrained(config), train_or_load(config))
    )
    assert after > 0.75 * before and after > before + 5


def test_objective_is_the_negative_bound_summed_over_the_batch():
    """One call by hand for each way to train, from the same noise."""
    config = replace(SMALL, beta=3.0)
    model, x = untrained(config), held_out_pictures(config)[:4]

    def asked(config):
        torch.manual_seed(9)
        loss, count = objective(config, model, x)
        assert count == 4
        return loss.item()

    def noise(samples):
        torch.manual_seed(9)
        return torch.randn(samples, 4, 2)

    q = model.posterior(x)
    log_likelihood = model.log_likelihood(x, q.at(noise(1)))[0]
    kl = q.kl_by_coordinate()
    assert asked(config) == pytest.approx((3 * kl.sum() - log_likelihood.sum()).item(), rel=1e-6)
    free = 4 * kl.mean(0).clamp(min=0.5).sum() - log_likelihood.sum()
    assert asked(replace(SMALL, free_nats=0.5)) == pytest.approx(free.item(), rel=1e-6)
    bound = importance_weighted_bound(model.log_weights(x, noise(7))).sum()
    several = replace(SMALL, importance_samples=7)
    assert asked(several) == pytest.approx(-bound.item(), rel=1e-6)


def test_black_and_white_is_drawn_with_the_probability_of_the_grey():
    """A fifth of each of 40,000 pixels: 4.5 standard errors, false alarm 7e-6."""
    images = images_of(SMALL)
    grey = images._replace(pixels=torch.full((625, 1, 8, 8), 4, dtype=torch.uint8))
    drawn = pictures(SMALL, grey, torch.Generator().manual_seed(3))
    assert drawn.unique().tolist() == [0, 1]
    assert abs(drawn.mean() - 0.25) < 4.5 * (0.25 * 0.75 / 40_000) ** 0.5


def test_batches_are_of_the_step_alone_and_draw_black_and_white_anew(monkeypatch):
    """One grey picture is all there is, so any difference is the drawing's."""
    grey = Images(torch.full((5, 1, 8, 8), 8, dtype=torch.uint8), torch.zeros(5).long(), 17)
    monkeypatch.setattr("implementations.generative.trained.images_of", lambda config: grey)
    draw = batches(SMALL)
    first, second = draw(0), draw(1)
    assert torch.equal(draw(0), first)
    assert len(torch.cat([first, second]).unique(dim=0)) == 16


def test_batches_are_training_pictures_only():
    config = replace(SMALL, likelihood="discretized_logistic", batch=500)
    held_out = set(map(tuple, held_out_pictures(config).tolist()))
    assert not held_out & set(map(tuple, batches(config)(0).tolist()))


def test_levels_stay_whole_for_the_discretized_likelihood():
    config = replace(SMALL, likelihood="discretized_logistic")
    assert held_out_pictures(config).unique().tolist() == list(range(17))
    assert untrained(config).levels == 17 and untrained(SMALL).levels == 2


def test_held_out_pictures_are_of_the_test_part_and_always_the_same():
    config = replace(SMALL, likelihood="discretized_logistic")
    assert torch.equal(
        held_out_pictures(config), images_of(config).split()[1].pixels.flatten(1).float()
    )
    assert torch.equal(held_out_pictures(SMALL), held_out_pictures(SMALL))


def test_weights_are_those_of_the_model_picture_by_picture(cache):
    """Cut into parts or not, each picture has its own column."""
    model = untrained(SMALL).double()
    x = held_out_pictures(SMALL)[:7].double()
    weights = sampled_log_weights(model, x, 4000)  # two pictures at a time
    assert weights.shape == (4000, 7)
    for column in range(7):
        alone = sampled_log_weights(model, x[column : column + 1], 4000, seed=1)
        # 4.5 standard errors of the difference: false alarm 7e-6 for each of 7.
        error = (alone.var() / 4000 + weights[:, column].var() / 4000).sqrt()
        assert abs(alone.mean() - weights[:, column].mean()) < 4.5 * error


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "setting, sentence",
    [
        ({"latent": 0}, "a coordinate and a sample at least, got 0, 1"),
        ({"importance_samples": 0}, "a coordinate and a sample at least, got 2, 0"),
        ({"importance_samples": 5, "beta": 2.0}, "no divergence to weigh: .* got 2.0 and 0.0"),
        ({"importance_samples": 5, "free_nats": 0.1}, "got 1.0 and 0.1"),
        ({"data": "cifar"}, "mnist_5k, digits, .* got 'cifar'"),
        ({"likelihood": "poisson"}, "likelihoods are"),
    ],
)
def test_an_impossible_setting_is_refused(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        untrained(replace(SMALL, **setting))
