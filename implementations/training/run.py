"""One run in progress: the update, the observation, the checkpoint.

    gradient of the batch's mean loss, accumulated -> clipped over all parameters
    -> finite? else stop, before the weights take it in -> AdamW at this step's rate

Nothing is decided here about when: that is loop.py.

Paper   Loshchilov & Hutter 2017, arXiv:1711.05101 (AdamW); Pascanu et al. 2012, arXiv:1211.5063
        (clipping by the norm)
Run     uv run python implementations/training/run.py
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from implementations.training.accumulation import Batch, Loss, accumulate, next_token_loss
from implementations.training.batches import RandomWindows
from implementations.training.checkpoint import State, checkpoints, load_finished, load_latest, save
from implementations.training.schedule import learning_rate, parameter_groups
from implementations.training.settings import TrainingConfig
from implementations.training.state import capture, device_of, digest, restore
from implementations.training.utilisation import utilisation

Batches = Callable[[int], Batch]
Observe = Callable[[int], Mapping[str, float] | None]


class Diverged(ValueError):
    """The loss, a gradient or a weight is no longer a finite number."""


class Run:
    """A model, its optimizer and how far they have come: `step` updates, `tokens` asked for."""

    def __init__(
        self, model: nn.Module, batches: Batches, config: TrainingConfig, folder: Path, loss: Loss
    ):
        self.model, self.batches, self.config, self.folder = model, batches, config, folder
        self.step, self.tokens, self.last_loss = 0, 0, math.nan
        self.saved: int | None = None  # step of the newest checkpoint
        self.device = device_of(model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            betas=config.betas,
            eps=config.epsilon,
            fused=self.device.type == "cuda",
        )

        def measure(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | int]:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bfloat16):
                return loss(model, batch)

        self.loss = torch.compile(measure) if config.compiled else measure

    def update(self) -> dict[str, float]:
        """One step of training; returns its line for the log.

        Raises:
            Diverged: loss or gradient is not finite; the weights are still those of before.
            ValueError: the batch asks for nothing.
        """
        started = time.perf_counter()
        self.optimizer.zero_grad()
        batch = move(self.batches(self.step), self.device)
        mean, count = accumulate(self.loss, self.model, batch, self.config.micro_batches)
        norm = clip_grad_norm_(self.trained, self.config.clip)
        # The only wait for a GPU in a step.
        mean, count, norm = torch.stack([mean, count, norm.double()]).tolist()
        if count == 0:
            raise ValueError(f"batch {self.step} asks for no token at all")
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise self.diverged(f"the loss is {mean:.4g}, the gradient's norm {norm:.4g}")
        rate = self.rate(self.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step, self.tokens, self.last_loss = self.step + 1, self.tokens + int(count), mean
        speed = count / (time.perf_counter() - started)
        line = {"step": self.step, "loss": mean, "learning_rate": rate, "gradient_norm": norm}
        line |= {"tokens": self.tokens, "tokens_per_second": round(speed, 1)}
        if self.config.peak_flops:
            flops, peak = self.config.flops_per_token, self.config.peak_flops
            line["mfu"] = round(utilisation(speed, flops, peak), 4)
        return line

    def rate(self, step: int) -> float:
        config = self.config
        sizes = {"steps": config.steps, "warmup": config.warmup, "final": config.final}
        return learning_rate(step, peak=config.learning_rate, **sizes)

    def observe(self, look: Observe) -> dict[str, float]:
        """Let the caller look at the model, without dropout, and change nothing by looking."""
        devices = [self.device] if self.device.type == "cuda" else []
        self.model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices):
            seen = look(self.step) or {}
        self.model.train()
        return dict(seen)

    def save(self) -> Path:
        """Write a checkpoint of this moment.

        Raises:
            Diverged: a weight is not finite: what cannot be trained on is not kept.
            OSError: it cannot be written; earlier ones are intact.
        """
        if not all(parameter.isfinite().all() for parameter in self.trained):
            raise self.diverged("some weights are not finite")
        unfinished = self.step < self.config.steps
        scalars = {
            "tokens": self.tokens,
            "loss": self.last_loss if self.step else None,
            "config": self.config.binding(),
            "next_batch": digest(self.batches(self.step)) if unfinished else None,
            "finished": not unfinished,
        }
        state = State(capture(self.model, self.optimizer), scalars)
        path = save(self.folder, self.step, state, keep=self.config.keep)
        self.saved = self.step
        return path

    def resume(self) -> int | None:
        """Go back to the newest good checkpoint; returns its step, None where there is none.

        Raises:
            ValueError: no checkpoint is good, or it is of another model, settings or data.
        """
        found = load_latest(self.folder)
        if found is None:
            return None
        self.go_back(*found)
        return self.step

    def finished(self) -> bool:
        """Go to this run's end if the folder holds it; nobody needs the folder alone for that.

        Raises:
            ValueError: it is the end of a run of another model, settings or data.
        """
        found = load_finished(self.folder)
        if found is None or found[0] != self.config.steps:
            return False
        self.go_back(*found)
        return True

    def go_back(self, step: int, state: State) -> None:
        tensors, scalars = state
        if not self.config.allow_changes:
            self.require_same(step, scalars)
        restore(self.model, self.optimizer, tensors)
        self.step, self.saved, self.tokens = step, step, scalars["tokens"]
        self.last_loss = math.nan if scalars["loss"] is None else scalars["loss"]
        if step == self.config.steps:
            print(f"{self.folder} holds this run, finished: nothing is trained", file=sys.stderr)
        else:
            print(f"going on from step {step} in {self.folder}", file=sys.stderr)

    def require_same(self, step: int, scalars: dict) -> None:
        """Another setting or text would make a run that no uninterrupted one could have been."""
        advice = "take another folder, or set allow_changes to go on all the same"
        now = self.config.binding()
        for name, value in scalars["config"].items():
            if now.get(name) != value:
                raise ValueError(
                    f"{self.folder} began with {name} = {value}, not {now.get(name)}: {advice}"
                )
        expected = scalars["next_batch"]
        if expected is not None and digest(self.batches(step)) != expected:
            raise ValueError(
                f"batch {step} is not the one that {self.folder} was about to read: {advice}"
            )

    def diverged(self, what: str) -> Diverged:
        good = checkpoints(self.folder)
        where = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was written"
        return Diverged(
            f"{what} at step {self.step + 1}, with learning rate {self.rate(self.step + 1):.2g}: "
            f"stopped before it could be saved; {where}"
        )


def move(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device)
    return tuple(tensor.to(device) for tensor in batch)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))
    batches = RandomWindows(torch.arange(5000) % 50, batch=4, length=16)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(steps=60, warmup=5, learning_rate=0.1)
        run = Run(model, batches, config, Path(folder), next_token_loss)
        for _ in range(30):
            line = run.update()
            if run.step % 10 == 0:
                print(f"  step {run.step:2}  loss {line['loss']:.3f}")
        print("checkpoint:", run.save().name)
        again = Run(model, batches, config, Path(folder), next_token_loss)
        again.resume()
        print(f"  step {again.update()['step']} is the next one")


if __name__ == "__main__":
    main()
