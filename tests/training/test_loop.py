"""train(): torch's own optimizer in a plain loop, bit for bit, and every way a run may stop."""

import errno
import io
import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from implementations.models.decoder import Decoder, DecoderConfig
from implementations.training.accumulation import next_token_loss
from implementations.training.checkpoint import checkpoint_path, checkpoints, load_latest
from implementations.training.guard import exclusive
from implementations.training.journal import LOG, processor_seconds, read
from implementations.training.loop import status, train
from implementations.training.run import Diverged, Run
from implementations.training.schedule import learning_rate


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def plain_loop(model, batches, config):
    """Training as one would write it by hand."""
    decayed = ["embedding.weight", "head.weight"]
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[name] for name in decayed], "weight_decay": config.weight_decay},
            {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
        ],
        betas=config.betas,
        eps=config.epsilon,
    )
    for step in range(config.steps):
        tokens = batches(step)
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step + 1, peak=config.learning_rate, steps=config.steps, warmup=config.warmup
            )
        optimizer.step()


@pytest.mark.parametrize("clip", [0.05, math.inf])
def test_twenty_steps_equal_a_plain_loop_to_the_bit(tiny, batches, config, clip, tmp_path):
    """Clipping at 0.05 shortens every gradient here; 64 tokens a batch divide without rounding."""
    settings = config(clip=clip)
    theirs = tiny()
    plain_loop(theirs, batches, settings)
    ours = tiny()
    train(ours, batches, settings, tmp_path)
    assert same_weights(ours, theirs)


def test_clipping_shortens_the_whole_gradient_once_it_is_complete(tiny, batches, config, tmp_path):
    """The log has the norm before; what the optimizer gets has the length 0.05, over all."""
    run = Run(tiny(), batches, config(clip=0.05, micro_batches=4), tmp_path, next_token_loss)
    line = run.update()
    norm = torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item()
    assert line["gradient_norm"] > 0.2
    assert norm == pytest.approx(0.05, rel=1e-4)  # torch adds 1e-6 to the norm it divides by


def test_micro_batches_change_nothing_but_rounding(tiny, batches, config, tmp_path):
    """Float64, no dropout, padded rows of uneven length: 20 steps in one part, in two, in three."""

    def padded(step):
        tokens = batches(step).clone()
        tokens[1, 3:] = tokens[3, 9:] = -100
        return tokens

    models = []
    for parts in (1, 2, 3):
        models.append(tiny(dropout=0.0).double())
        train(models[-1], padded, config(micro_batches=parts), tmp_path / str(parts))
    for other in models[1:]:
        for ours, theirs in zip(other.parameters(), models[0].parameters(), strict=True):
            # 1e-14 a step, carried through 20 steps of Adam, which divides by small numbers.
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_rate_follows_updates_not_micro_batches(tiny, batches, config, tmp_path):
    settings = config(micro_batches=4)
    train(tiny(), batches, settings, tmp_path)
    rates = [line["learning_rate"] for line in read(tmp_path / LOG)]
    assert len(rates) == 20
    assert rates[3] == max(rates) == settings.learning_rate  # warm-up of 4 updates
    assert rates[-1] == pytest.approx(0.1 * settings.learning_rate, rel=1e-12)


# Stopping and going on


class Stop(Exception):
    """Power, memory, patience: anything that ends a process."""


def stopping(step: int, action, inner=next_token_loss):
    """The loss, and at the given update (counted from 1) something else happens first."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == step:
            action()
        return inner(model, batch)

    return loss


def fail():
    raise Stop


@pytest.mark.parametrize("stop", [1, 4, 6, 13, 20])
def test_a_resumed_run_ends_with_the_same_bits(tiny, batches, config, stop, tmp_path):
    """Weights, buffers, moments, generators, count of tokens and every line of the log."""
    after = []
    expected = train(tiny(), batches, config(micro_batches=2), tmp_path / "whole")
    after.append(torch.rand(3))
    with pytest.raises(Stop):
        loss = stopping(2 * stop, fail)
        train(tiny(), batches, config(micro_batches=2), tmp_path / "pieces", loss=loss)
    torch.rand(17)  # whatever else the machine did
    result = train(tiny(seed=99), batches, config(micro_batches=2), tmp_path / "pieces")
    after.append(torch.rand(3))
    assert result.resumed_from == (stop - 1) // 5 * 5
    ours, theirs = load_latest(tmp_path / "pieces"), load_latest(tmp_path / "whole")
    assert ours[0] == theirs[0] == 20 and ours[1].scalars == theirs[1].scalars
    for group, tensors in theirs[1].tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(ours[1].tensors[group][name], tensor), name
    assert torch.equal(*after)
    assert (result.loss, result.tokens) == (expected.loss, expected.tokens)
    steady = ("step", "loss", "learning_rate", "gradient_norm", "tokens")
    lines = [[[line[key] for key in steady] for line in read(r.log)] for r in (result, expected)]
    assert lines[0] == lines[1]
    assert [line[0] for line in lines[0]] == list(range(1, 21))


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_a_decoder_resumes_and_its_tied_head_stays_tied(batches, config, style, tmp_path):
    """The repository's own model, with dropout: stopped in update 13 of 20, the same bits."""
    styles = {
        "llama": {"key_value_heads": 1},
        "gpt2": {"norm": "layer", "position": "learned", "feed_forward": "gelu", "bias": True},
    }

    def decoder(seed: int) -> Decoder:
        torch.manual_seed(seed)
        sizes = {"vocabulary": 13, "width": 8, "layers": 2, "heads": 2, "hidden": 16}
        return Decoder(DecoderConfig(**sizes, positions=16, dropout=0.1, **styles[style]))

    whole = decoder(3)
    count = sum(parameter.numel() for parameter in whole.parameters())
    train(whole, batches, config(), tmp_path / "whole")
    with pytest.raises(Stop):
        train(decoder(3), batches, config(), tmp_path / "a", loss=stopping(13, fail))
    resumed = decoder(99)
    assert train(resumed, batches, config(), tmp_path / "a").resumed_from == 10
    assert same_weights(resumed, whole)
    assert sum(parameter.numel() for parameter in resumed.parameters()) == count


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_writes_a_checkpoint_between_steps_and_says_how_to_go_on(
    tiny, batches, config, number, code, tmp_path, capfd
):
    whole = tiny()
    train(whole, batches, config(), tmp_path / "whole")
    loss = stopping(8, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as left:
        train(tiny(), batches, config(), tmp_path / "pieces", loss=loss)
    assert left.value.code == code
    said = capfd.readouterr().err
    assert f"stopped by {number.name} after step 8 of 20" in said
    assert "step-00000008 is written: the same command goes on" in said
    result = train(tiny(seed=99), batches, config(), tmp_path / "pieces")
    assert result.resumed_from == 8
    again = tiny(seed=99)
    train(again, batches, config(), tmp_path / "pieces")  # done: it only loads
    assert same_weights(again, whole)


def test_a_damaged_checkpoint_costs_an_interval_and_no_bit(tiny, batches, config, tmp_path, capfd):
    whole = tiny()
    train(whole, batches, config(), tmp_path / "whole")
    with pytest.raises(Stop):
        train(tiny(), batches, config(), tmp_path / "a", loss=stopping(13, fail))
    damaged = checkpoint_path(tmp_path / "a", 10) / "moments.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    resumed = tiny(seed=99)
    assert train(resumed, batches, config(), tmp_path / "a").resumed_from == 5
    assert "step-00000010/moments.safetensors" in capfd.readouterr().err
    assert same_weights(resumed, whole)
    assert [line["step"] for line in read(tmp_path / "a" / LOG)] == list(range(1, 21))


def test_a_finished_run_is_loaded_and_not_repeated(tiny, batches, config, tmp_path):
    model = tiny()
    first = train(model, batches, config(), tmp_path)
    other = tiny(seed=99)
    second = train(other, batches, config(), tmp_path, loss=stopping(1, fail))
    assert second == replace(first, resumed_from=20)
    assert same_weights(other, model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_weights(
    tiny, batches, config, value, where, tmp_path
):
    """The message has the step and the last good checkpoint; nothing that was saved is NaN."""
    updates = []

    def loss(model, batch):
        total, count = next_token_loss(model, batch)
        updates.append(1)
        if len(updates) == 8 and where == "loss":
            return total * value, count
        if len(updates) == 8:
            model.head.bias.register_hook(lambda gradient: gradient * value)
        return total, count

    model = tiny()
    with pytest.raises(Diverged, match="at step 8") as caught:
        train(model, batches, config(), tmp_path, loss=loss)
    assert str(checkpoint_path(tmp_path, 5)) in str(caught.value)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000000", "step-00000005"]
    assert load_latest(tmp_path)[0] == 5
    assert (tmp_path / "loss.png").exists()


def test_weights_that_are_not_finite_are_never_saved(tiny, batches, config, tmp_path):
    model = tiny()
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    with pytest.raises(Diverged, match="some weights are not finite"):
        train(model, batches, config(), tmp_path)
    assert checkpoints(tmp_path) == []


def test_a_batch_of_padding_only_is_an_error_not_a_nan(tiny, config, tmp_path):
    with pytest.raises(ValueError, match="batch 0 asks for no token"):
        train(tiny(), lambda step: torch.full((2, 5), -100), config(), tmp_path)


def test_a_full_disk_costs_one_interval(tiny, batches, config, tmp_path, monkeypatch):
    """The checkpoint of step 10 does not fit; that of step 5 is good, and the run goes on later."""
    whole = tiny()
    train(whole, batches, config(), tmp_path / "whole")
    real = os.fsync
    saved = []

    def fsync(descriptor):
        if len(checkpoints(tmp_path / "a")) == 2:
            saved.append(1)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"No space left.*still there: .*step-00000005"):
            train(tiny(), batches, config(), tmp_path / "a")
    assert saved
    resumed = tiny(seed=99)
    assert train(resumed, batches, config(), tmp_path / "a").resumed_from == 5
    assert same_weights(resumed, whole)


def test_a_folder_that_cannot_be_written_is_noticed_before_any_work(
    tiny, batches, config, tmp_path
):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        train(tiny(), batches, config(), tmp_path / "file" / "run", loss=stopping(1, fail))


def test_two_processes_do_not_share_a_folder(tiny, batches, config, tmp_path):
    with exclusive(tmp_path), pytest.raises(ValueError, match="another process is training"):
        train(tiny(), batches, config(), tmp_path)


def test_a_finished_run_is_read_while_another_process_holds_the_folder(
    tiny, batches, config, tmp_path
):
    whole = tiny()
    expected = train(whole, batches, config(), tmp_path)
    read_back = tiny(seed=99)
    with exclusive(tmp_path):
        written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        found = train(read_back, batches, config(), tmp_path, loss=stopping(1, fail))
    assert same_weights(read_back, whole) and read_back.training
    assert found == replace(expected, resumed_from=20)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written


def test_its_time_is_written_before_the_end_that_others_read(
    tiny, batches, config, tmp_path, monkeypatch
):
    seen, save = {}, Run.save

    def watched(run):
        seen[run.step] = processor_seconds(run.folder)
        return save(run)

    monkeypatch.setattr(Run, "save", watched)
    result = train(tiny(), batches, config(), tmp_path)
    assert 0 == seen[0] < seen[5] < seen[20] <= result.processor_seconds


def test_the_end_of_a_shorter_run_is_no_end(tiny, batches, config, tmp_path):
    """Ten updates more, asked for by who may change the settings; not asked for, a sentence."""
    train(tiny(), batches, config(steps=10), tmp_path)
    with pytest.raises(ValueError, match="began with steps = 10, not 20"):
        train(tiny(), batches, config(), tmp_path)
    longer = train(tiny(), batches, config(allow_changes=True), tmp_path)
    assert (longer.resumed_from, longer.steps) == (10, 20)


@pytest.mark.parametrize("left, trained", [("all of it", 0), ("half of it", 10)])
def test_who_waits_goes_on_from_what_the_other_leaves(
    tiny, batches, config, tmp_path, while_held, left, trained
):
    """From its end nothing is trained; from its last checkpoint the rest, to the same bits."""
    whole = tiny()
    train(whole, batches, config(), tmp_path / "all of it")
    with pytest.raises(Stop):
        train(tiny(), batches, config(), tmp_path / "half of it", loss=stopping(13, fail))
    ours, calls = tiny(seed=99), []

    def loss(model, batch):
        calls.append(1)
        return next_token_loss(model, batch)

    def call():
        return train(ours, batches, config(), tmp_path / "shared", loss=loss, wait=True)

    def other():
        shutil.copytree(tmp_path / left, tmp_path / "shared", dirs_exist_ok=True)

    assert while_held(tmp_path / "shared", call, other).resumed_from == 20 - trained
    assert same_weights(ours, whole) and len(calls) == trained


# Another run than the one that began


def test_changed_settings_are_named_and_may_be_allowed(tiny, batches, config, tmp_path):
    with pytest.raises(Stop):
        train(tiny(), batches, config(), tmp_path, loss=stopping(8, fail))
    slower = config(learning_rate=0.01)
    with pytest.raises(ValueError, match=r"began with learning_rate = 0\.02, not 0\.01"):
        train(tiny(), batches, slower, tmp_path)
    allowed = replace(slower, allow_changes=True)
    assert train(tiny(), batches, allowed, tmp_path).resumed_from == 5


def test_settings_that_teach_nothing_may_change(tiny, batches, config, tmp_path):
    whole = tiny()
    train(whole, batches, config(), tmp_path / "whole")
    with pytest.raises(Stop):
        train(tiny(), batches, config(), tmp_path / "a", loss=stopping(8, fail))
    resumed = tiny(seed=99)
    train(resumed, batches, config(checkpoint_every=3, log_every=7, keep=1), tmp_path / "a")
    assert same_weights(resumed, whole)


def test_other_data_is_refused(tiny, batches, config, tmp_path):
    with pytest.raises(Stop):
        train(tiny(), batches, config(), tmp_path, loss=stopping(8, fail))
    with pytest.raises(ValueError, match="batch 5 is not the one"):
        train(tiny(), replace(batches, seed=8), config(), tmp_path)


# What is shown and written


def test_log_and_picture_are_written(tiny, batches, config, tmp_path):
    result = train(tiny(), batches, config(log_every=3), tmp_path)
    lines = read(result.log)
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18, 20]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["loss"] == result.loss and lines[-1]["tokens"] == result.tokens == 20 * 64
    assert "mfu" not in lines[0]
    assert result.picture.read_bytes().startswith(b"\x89PNG")


def test_mfu_is_speed_times_work_over_peak(tiny, batches, config, tmp_path):
    result = train(tiny(), batches, config(flops_per_token=1e6, peak_flops=1e10), tmp_path)
    for line in read(result.log):
        # Both are rounded for the log: to 0.1 tokens/s and to 0.0001.
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * 1e-4, abs=1e-4)


def test_the_bar_shows_loss_and_speed_and_mfu_if_the_peak_is_known(
    tiny, batches, config, tmp_path, monkeypatch
):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    line = {"loss": 1.23456, "tokens_per_second": 12345.6}
    assert status(line) == "loss 1.235, 12,346 tokens/s"
    assert status(line | {"mfu": 0.4012}) == "loss 1.235, 12,346 tokens/s, MFU 40.1%"
    monkeypatch.setattr(sys, "stderr", Terminal())
    train(tiny(), batches, config(), tmp_path / "a")
    assert "20/20" in sys.stderr.getvalue() and "tokens/s" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    train(tiny(), batches, config(progress=False), tmp_path / "b")
    assert sys.stderr.getvalue() == ""


def test_looking_changes_nothing(tiny, batches, config, tmp_path):
    """`observe` draws random numbers, finds dropout off, and the weights end up the same."""
    modes = []

    def observe(step):
        modes.append((step, model.training, torch.is_grad_enabled()))
        return {"luck": torch.rand(()).item()}

    plain = tiny()
    train(plain, batches, config(), tmp_path / "a")
    model = tiny()
    result = train(model, batches, config(observe_every=8), tmp_path / "b", observe=observe)
    assert modes == [(8, False, False), (16, False, False), (20, False, False)]
    assert [line["step"] for line in read(result.log) if "luck" in line] == [8, 16, 20]
    assert model.training and same_weights(model, plain)


# Options


def test_bfloat16_computes_narrow_and_keeps_weights_wide(tiny, batches, config, tmp_path):
    narrow, seen = tiny(), []
    narrow.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train(narrow, batches, config(bfloat16=True), tmp_path)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.float32}
    assert next(line for line in read(tmp_path / LOG))["loss"] == pytest.approx(2.7, abs=0.5)


def test_compiled_is_compiled_and_saves_the_models_own_names(
    tiny, batches, config, tmp_path, monkeypatch, unchecked
):
    """Captured whole by torch.compile; the eager backend spares the test a C++ compiler."""
    compile_eagerly = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    plain = tiny()
    train(plain, batches, config(steps=6), tmp_path / "a")
    compiled = tiny()
    train(compiled, batches, config(steps=6, compiled=True), tmp_path / "b")
    assert same_weights(compiled, plain)
    assert load_latest(tmp_path / "b")[1].tensors["weights"].keys() == plain.state_dict().keys()


@pytest.mark.full
def test_inductors_code_trains_the_same(tiny, batches, config, tmp_path, unchecked):
    """Twenty steps without dropout, whose masks inductor draws in its own way."""
    plain, compiled = tiny(dropout=0.0), tiny(dropout=0.0)
    train(plain, batches, config(), tmp_path / "a")
    train(compiled, batches, config(compiled=True), tmp_path / "b")
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        # float32 sums in another order; Adam's first steps have the full length whatever the size.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
def test_on_a_gpu_a_resumed_run_ends_with_the_same_bits(tiny, batches, config, tmp_path):
    """Fused AdamW, bfloat16, and dropout that draws from the GPU's own generator."""
    settings = config(bfloat16=True, micro_batches=2)
    # Made before the seeds are set: tiny() seeds the GPU's generator too.
    whole, stopped, resumed = tiny().cuda(), tiny().cuda(), tiny(seed=99).cuda()
    torch.cuda.manual_seed(1)
    train(whole, batches, settings, tmp_path / "whole")
    torch.cuda.manual_seed(1)
    with pytest.raises(Stop):
        train(stopped, batches, settings, tmp_path / "a", loss=stopping(26, fail))
    torch.rand(7, device="cuda")
    assert train(resumed, batches, settings, tmp_path / "a").resumed_from == 10
    assert same_weights(resumed, whole)
