"""How fast does a classifier train? One whole update, in the form in which peers are compared.

    update = cross-entropy of the scores in bfloat16, its gradient, fused AdamW

A classifier of pictures has one row of scores for each, a language model one for each token. Both
sides of a comparison go through this function, so that only their models differ.

Run     uv run python implementations/training/throughput.py
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from implementations.lab.timing import time_interleaved


def training_step(
    scores: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    device: str,
    *,
    compiled: bool = False,
    learning_rate: float = 1e-4,
) -> Callable[[Tensor, Tensor], None]:
    """An update of the parameters by one batch of inputs and their labels.

    Args:
        scores: of the classes, on the last axis, for each label: a model, or what leads to it.
        parameters: what is updated.
        device: where they are: cpu, cuda, cuda:1.
        compiled: forward and backward go through torch.compile.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=True)

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found = scores(inputs)
        return cross_entropy(found.flatten(0, -2).float(), labels.flatten())

    forward = torch.compile(loss) if compiled else loss

    def step(inputs: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(inputs, labels).backward()
        optimizer.step()

    return step


def main() -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(256, 512), torch.randint(1, 10, (256,))
    steps = {}
    for width in (512, 2048):
        model = nn.Sequential(nn.Linear(512, width), nn.GELU(), nn.Linear(width, 10))
        steps[str(width)] = training_step(model, model.parameters(), "cpu")
    timings = time_interleaved(steps, inputs, labels)
    for width in steps:
        print(f"{width:>5} hidden units: {256 / timings.median(width):8,.0f} rows a second")


if __name__ == "__main__":
    main()
