"""A trained diffusion model for whoever needs one: trained once, then read from the cache.

    train_or_load(config, device) = the model that config describes, from a folder named by config
                                    and code; a run that was stopped goes on
    make(model, labels, ...)      = new pictures by it

Four thousand digits invite to be learnt by heart, so a tenth of the training pictures are held out,
and training stops when their loss has not fallen for a while. The average of the weights that
denoised them best is kept. Test pictures are never seen here.

Paper   Ho et al. 2020, arXiv:2006.11239; Karras et al. 2022, arXiv:2206.00364
Shapes  pixels [picture, channel, row, column], from -1 to 1
Run     uv run python implementations/generative/trained_diffusion.py
"""

import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from implementations.generative.denoiser import Denoiser, generate
from implementations.generative.diffusion_config import DiffusionConfig, for_device, placed
from implementations.generative.diffusion_training import Training, put_back
from implementations.generative.samplers import SAMPLERS
from implementations.generative.schedules import SCHEDULES, Schedule
from implementations.lab.files import run_folder
from implementations.training.checkpoint import State, load_finished, load_latest, save
from implementations.training.guard import exclusive, stop_requests
from implementations.training.run import Diverged

CHECK_EVERY = 50  # updates between looks at whether the loss is finite: each waits for the GPU
LEAST_APART = 25  # updates between looks: a look costs as much as some of them
LOOKS_A_CHECKPOINT = 10


class Trained(NamedTuple):
    """A model, and how it became what it is."""

    model: Denoiser
    """the average of the weights, at the look at which held-out pictures were denoised best"""
    raw: Denoiser
    """the last weights, not averaged"""
    history: list[dict[str, float]]
    """step, training loss and held-out loss at each look"""
    seconds: float
    """of training, on the clock, in all calls"""


def train_or_load(config: DiffusionConfig, device: str = "cpu") -> Trained:
    """The trained model, in eval mode and on that device; from the cache if it was trained there.

    Raises:
        ValueError: a setting is wrong; Diverged, one too, if training ends in NaN.
        SystemExit: after Ctrl-C or SIGTERM, when the checkpoint is written; at once after Ctrl-C
            while it waits for another process that trains the same.
    """
    folder = run_folder(f"diffusion-{config.data}", asdict(config) | {"device": device})
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices):
        found = load_finished(folder)
        if found is None:
            with exclusive(folder, wait=True), stop_requests() as asked:
                if load_finished(folder) is None:  # nor has it been trained while this one waited
                    go_on(Training(config, device), folder, asked)
            if asked:
                print(f"stopped; the same command goes on: {folder}", file=sys.stderr)
                raise SystemExit(128 + asked[0])
            found = load_latest(folder)
        _, (groups, scalars) = found
        model, raw = (placed(config, torch.device(device)) for _ in range(2))
        for network, part in ((model, groups["best"]), (raw, groups["weights"])):
            network.load_state_dict(part)
    return Trained(model.eval(), raw.eval(), scalars["history"], scalars["seconds"])


def go_on(training: Training, folder: Path, asked: list) -> None:
    """Train from the folder's newest checkpoint, or from the beginning."""
    step, history, seconds, best = 0, [], 0.0, {}
    found = load_latest(folder)
    if found:
        step, (groups, scalars) = found
        history, seconds, best = scalars["history"], scalars["seconds"], groups["best"]
        put_back(training.tensors(), groups["state"])
        print(f"going on from step {step} in {folder}", file=sys.stderr)
    loop(training, folder, step, history, seconds, best, asked)


def loop(
    training: Training,
    folder: Path,
    step: int,
    history: list[dict[str, float]],
    seconds: float,
    best: dict[str, Tensor],
    asked: list,
) -> None:
    """Updates and looks until the end, a stop, or no progress; checkpoints on the way."""
    config, began = training.config, time.perf_counter() - seconds
    every, done, since = max(LEAST_APART, config.steps // config.looks), False, step

    def write() -> None:
        groups = {"best": best, "weights": training.model.state_dict()}
        scalars = {"history": history, "seconds": time.perf_counter() - began, "finished": done}
        save(folder, step, State(groups | {"state": training.tensors()}, scalars), keep=1)

    with tqdm(total=config.steps, initial=step, unit="step", disable=None) as bar:
        while not done and not asked:
            training.update(step)
            step += 1
            bar.update()
            look = step % every == 0 or step == config.steps
            if look or step % CHECK_EVERY == 0:
                mean = training.total.item() / (step - since)
                if not math.isfinite(mean):
                    raise Diverged(f"the loss is {mean} between steps {since} and {step}")
            if look:
                found = training.held_out_loss()
                said = f"loss {mean:.4f}, held out {found:.4f}"
                bar.set_postfix_str(said, refresh=False)
                if bar.disable:  # no terminal: a line for the log
                    passed = f"{step:,} of {config.steps:,}, {time.perf_counter() - began:.1f} s"
                    print(f"{passed}: {said}", file=sys.stderr, flush=True)
                if found < min((past["held_out"] for past in history), default=math.inf):
                    state = training.average.state_dict()
                    best = {name: value.detach().clone() for name, value in state.items()}
                history.append({"step": step, "loss": mean, "held_out": found})
                losses = [past["held_out"] for past in history]
                late = len(losses) - 1 - losses.index(min(losses)) >= config.patience
                done = late or step == config.steps
                training.total.zero_()
                since = step
                if done or len(history) % LOOKS_A_CHECKPOINT == 0:
                    write()
        if not done:
            training.total.zero_()  # the loss since the last look is not kept
            write()


def make(
    model: Denoiser,
    labels: Int[Tensor, " picture"] | None,
    count: int,
    shape: tuple[int, int, int],
    *,
    schedule: str | Schedule = "cosine",
    sampler: str = "dpm++",
    steps: int = 50,
    scale: float = 1.0,
    seed: int = 0,
    at_once: int = 500,
    compiled: bool = False,
) -> Float[Tensor, "picture channel row column"]:
    """New pictures, on the CPU; the first noise is the same for the same seed, whatever the way.

    Args:
        compiled: pays off where the network is asked some thousand times.
    """
    device = next(model.parameters()).device
    if compiled and model.network._compiled_call_impl is None:
        model.network.compile(dynamic=False)
    if isinstance(schedule, str):
        schedule = SCHEDULES[schedule]
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    parts = []
    for index, part in enumerate(noise.split(at_once)):
        known = None if labels is None else labels[index * at_once :][: len(part)].to(device)
        way = {"labels": known, "scale": scale, "seed": seed * 1_000_003 + index}
        made = generate(model, part.to(device), schedule, steps, SAMPLERS[sampler], **way)
        parts.append(made.float().cpu())
    return torch.cat(parts)


def main() -> None:
    config = for_device("cpu", data="digits", size=8, steps=300)
    trained = train_or_load(config)
    parameters = sum(p.numel() for p in trained.model.parameters())
    print(f"digits of 8 x 8, {parameters:,} parameters, trained in {trained.seconds:.0f} s")
    for look in trained.history[:: len(trained.history) // 5]:
        print(f"  step {look['step']:4}  loss {look['loss']:.4f}  held out {look['held_out']:.4f}")


if __name__ == "__main__":
    main()
