"""The settings of a training run, checked before any work starts.

Run     uv run python implementations/training/settings.py --help
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from implementations.lab.command_line import clear_errors

# A run may be resumed with other values of these: they change nothing that is learned.
FREE = {"checkpoint_every", "keep", "log_every", "observe_every", "progress"}
FREE |= {"flops_per_token", "peak_flops", "allow_changes"}


@dataclass(frozen=True)
class TrainingConfig:
    """How to train: AdamW, warm-up and cosine, clipping; and how often to write things down."""

    steps: int = 1000
    """updates of the whole run"""
    learning_rate: float = 3e-4
    """the highest one"""
    warmup: int = 100
    """updates until it is reached"""
    final: float = 0.1
    """the last learning rate as a part of the highest"""
    weight_decay: float = 0.1
    """of matrices and embeddings; norms and biases have none"""
    betas: tuple[float, float] = (0.9, 0.95)
    """how long Adam's two averages remember"""
    epsilon: float = 1e-8
    """added to the root in Adam's denominator"""
    clip: float = 1.0
    """the longest gradient allowed, over all parameters together; inf for any"""
    micro_batches: int = 1
    """parts of a batch that are computed one after the other, to save memory"""
    bfloat16: bool = False
    """matrix products in bfloat16; weights stay as they are"""
    compiled: bool = False
    """compile model and loss with torch.compile"""
    checkpoint_every: int = 100
    """updates between checkpoints: the most that a crash can cost"""
    keep: int = 3
    """how many checkpoints stay on the disk"""
    log_every: int = 1
    """updates between lines of the log"""
    observe_every: int = 100
    """updates between calls of `observe`"""
    progress: bool = True
    """show a progress bar where stderr is a terminal"""
    flops_per_token: float | None = None
    """see utilisation.py; with peak_flops, the bar and the log show MFU"""
    peak_flops: float | None = None
    """what the machine could do at best, in FLOP/s: 989e12 for an H200 in bfloat16"""
    allow_changes: bool = False
    """go on although settings or data are not those that the folder's run began with"""

    def check(self) -> None:
        """Raises ValueError with the rule and the value, for the first setting that breaks one."""
        for name in ("steps", "micro_batches", "checkpoint_every", "keep", "log_every"):
            require(getattr(self, name) >= 1, f"{name} is at least 1", getattr(self, name))
        require(self.observe_every >= 1, "observe_every is at least 1", self.observe_every)
        require(0 <= self.warmup < self.steps, "warmup is less than steps", self.warmup)
        require(self.learning_rate > 0, "learning_rate is positive", self.learning_rate)
        require(self.clip > 0, "clip is positive (inf clips nothing)", self.clip)
        require(0 <= self.final <= 1, "final is between 0 and 1", self.final)
        pair = (self.flops_per_token, self.peak_flops)
        require((None in pair) == (pair == (None, None)), "MFU needs both FLOP numbers", pair)

    def binding(self) -> dict[str, Any]:
        """The settings that decide what is learned, as JSON gives them back."""
        names = asdict(self).keys() - FREE
        return json.loads(json.dumps({name: getattr(self, name) for name in sorted(names)}))


def require(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{rule}, got {value}")


def main(config: TrainingConfig) -> None:
    config.check()
    for name, value in asdict(config).items():
        endless = isinstance(value, float) and math.isinf(value)
        print(f"  {name:17}{'none' if endless else value}{'' if name in FREE else '  (binding)'}")


if __name__ == "__main__":
    import tyro

    with clear_errors():
        main(tyro.cli(TrainingConfig))
