"""How fast to learn, and what to shrink: warm-up, cosine decay, and weight decay on matrices only.

    rate(step) = peak step / warmup                                            step <= warmup
                 peak (final + (1 - final) (1 + cos(pi progress)) / 2)         after
    progress   = (step - warmup) / (steps - warmup)

`step` counts updates from 1, so the first update already learns and the last one has the rate
`final * peak`. The rate is a pure function of the step: a run that is resumed has nothing to
restore. Weight decay pulls on matrices (two or more dimensions), embeddings among them: with a tied
head the table is the head's matrix too. Gains of norms and biases are left alone: to shrink them
regularises nothing and moves what the norm just set.

Paper   Loshchilov & Hutter 2017, arXiv:1608.03983 (cosine) and arXiv:1711.05101 (decay apart from
        the gradient); Brown et al. 2020, arXiv:2005.14165, appendix B (warm-up, decay to a tenth)
Run     uv run python implementations/training/schedule.py
"""

import math

from torch import nn


def learning_rate(
    step: int, *, peak: float, steps: int, warmup: int = 0, final: float = 0.1
) -> float:
    """The learning rate of update `step`, counted from 1; update 0 would not move.

    Args:
        peak: the highest rate, reached at the end of the warm-up.
        steps: updates of the whole run; later ones keep the last rate.
        warmup: updates over which the rate rises in a straight line.
        final: the last rate as a part of the peak.

    Raises:
        ValueError: the warm-up is not shorter than the run, or the step is negative.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"a warm-up of {warmup} steps does not fit into {steps} steps")
    if step < 0:
        raise ValueError(f"steps count from 0, got {step}")
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / (steps - warmup))
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Groups for a torch optimizer: what is decayed (matrices, embeddings too), then the rest.

    Parameters that need no gradient are left out; a shared one comes once.

    Raises:
        ValueError: the model has nothing to train.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("the model has no parameter that needs a gradient")
    decayed = [parameter for parameter in trained if parameter.ndim >= 2]
    left_alone = [parameter for parameter in trained if parameter.ndim < 2]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": left_alone, "weight_decay": 0.0},
    ]


def main() -> None:
    for step in (1, 50, 100, 325, 550, 775, 1000):
        rate = learning_rate(step, peak=1.0, steps=1000, warmup=100)
        print(f"  update {step:4}  {rate:.3f} {'#' * round(40 * rate)}")
    model = nn.Sequential(nn.Embedding(100, 16), nn.LayerNorm(16), nn.Linear(16, 100))
    decayed, left_alone = (
        sum(parameter.numel() for parameter in group["params"])
        for group in parameter_groups(model, 0.1)
    )
    print(f"of a small model {decayed:,} parameters are decayed, {left_alone:,} are not")


if __name__ == "__main__":
    main()
