"""A judge of made digits: the metrics of metrics.py, on what a small classifier sees in a picture.

    features    the mean over the picture of the classifier's last convolution, 128 numbers
    confidence  the largest probability that it gives to a digit, its temperature set on test digits
    floor       each metric of training digits: what "as good as real" reads on this scale

The usual judge, an Inception network, has seen photographs, not digits, and is no part of any
package here; one that is trained and tested in place can be asked how far it is to be trusted. It
was trained on the training digits, and its labels smoothed: without the temperature it would be
sure of nothing. The kernel distance without bias is about zero between training and test digits, so
its floor is the size of its chance: the root of its mean square between random halves.

Paper   Bińkowski et al. 2018, arXiv:1801.01401 (features of one's own); temperature: Guo et al.
        2017, arXiv:1706.04599
Shapes  pixels [picture, 1, row, column], from -1 to 1
Run     uv run python implementations/generative/judge.py
"""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from implementations.generative.diffusion_config import for_device
from implementations.generative.diffusion_pictures import pictures
from implementations.generative.metrics import (
    copied,
    frechet_distance,
    kernel_distance,
    precision_and_recall,
)
from implementations.generative.trained_diffusion import Trained, make, train_or_load
from implementations.models.picture_classifier import ClassifierConfig
from implementations.models.picture_classifier import train_or_load as trained_classifier

Pixels = Float[Tensor, "picture 1 row column"]


class Verdict(NamedTuple):
    """What the judge says of some pictures."""

    confident: float
    """share that is named with a probability over 0.9"""
    frechet: float
    kernel: float
    precision: float
    recall: float
    copied: float
    """share nearer to a training digit, pixel by pixel, than 95% of test digits are"""


class Judge:
    """A classifier of digits, and the features of those it compares with."""

    def __init__(self, size: int = 28, steps: int = 1500, device: str = "cpu"):
        config = ClassifierConfig(size=size, model="convolutional", steps=steps, learning_rate=3e-3)
        self.size, self.device = size, device
        self.classifier = trained_classifier(config, device).model
        data = pictures("mnist_5k", size)
        self.train, self.test = data.train, data.test
        self.real = self.features(self.test.pixels)
        self.temperature = self.calibrated()

    @torch.no_grad()
    def features(self, pixels: Pixels) -> Float[Tensor, "picture feature"]:
        """On the CPU, where the metrics are computed in float64."""
        stages = self.classifier.stages
        parts = [stages((p.to(self.device) + 1) / 2).mean((-2, -1)) for p in pixels.split(500)]
        return torch.cat(parts).float().cpu()

    def scores(self, features: Float[Tensor, "picture feature"]) -> Float[Tensor, "picture digit"]:
        """The classifier's, of features."""
        head: nn.Linear = self.classifier.head
        return (features.to(self.device) @ head.weight.mT + head.bias).detach().cpu()

    def calibrated(self) -> float:
        """The temperature at which the test digits' labels are likeliest."""
        scores = self.scores(self.real)
        tried = torch.logspace(-1.5, 1.0, 101).tolist()
        return min(tried, key=lambda t: cross_entropy(scores / t, self.test.labels).item())

    def probabilities(self, pixels: Pixels) -> Float[Tensor, "picture digit"]:
        """Of the ten digits."""
        return (self.scores(self.features(pixels)) / self.temperature).softmax(1)

    def accuracy(self, pixels: Pixels, labels: Int[Tensor, " picture"]) -> float:
        """Share of pictures that are named as their labels say."""
        named = self.probabilities(pixels).argmax(1) == labels.cpu()
        return named.double().mean().item()

    def verdict(self, pixels: Pixels) -> Verdict:
        """All metrics, against the test digits."""
        pixels = pixels.detach().float().cpu()
        features = self.features(pixels)
        sure = self.probabilities(pixels).max(1).values > 0.9
        coverage = precision_and_recall(self.real, features)
        flat = [part.flatten(1) for part in (pixels, self.train.pixels, self.test.pixels)]
        return Verdict(
            sure.double().mean().item(),
            frechet_distance(self.real, features),
            kernel_distance(self.real, features),
            coverage.precision,
            coverage.recall,
            copied(*flat),
        )

    def floor(self, count: int) -> Verdict:
        """The verdict on that many training digits; of copies it finds all, as it should."""
        rows = torch.linspace(0, len(self.train.labels) - 1, count).long()
        return self.verdict(self.train.pixels[rows])

    def kernel_floor(self, count: int = 500, draws: int = 20) -> float:
        """Root mean square of the kernel distance between random training and test digits."""
        train, generator = self.features(self.train.pixels), torch.Generator().manual_seed(0)
        squares = []
        for _ in range(draws):
            a, b = (
                part[torch.randperm(len(part), generator=generator)[:count]]
                for part in (train, self.real)
            )
            squares.append(kernel_distance(a, b) ** 2)
        return (sum(squares) / draws) ** 0.5


judge_of = cache(Judge)  # of a size, steps and device: the same for every model


class Candidate(NamedTuple):
    """A trained model before its judge, and the labels of what it is asked for."""

    trained: Trained
    judge: Judge
    labels: Int[Tensor, " picture"]

    def made(self, model: nn.Module | None = None, **way) -> Pixels:
        """A picture of each label, by the averaged weights unless another model is given.

        Args:
            way: as in `make`.
        """
        model = self.trained.model if model is None else model
        shape = (1, self.judge.size, self.judge.size)
        return make(model, self.labels, len(self.labels), shape, **way)


def candidate(device: str, count: int, judge_steps: int, **changes) -> Candidate:
    """What a weekly script begins with: a model of `for_device`, trained or loaded, and its judge.

    Args:
        count: pictures that it is asked for, of all ten digits in turn.
        judge_steps: of the training of the judge's classifier.
        changes: of the model's settings.
    """
    settings = for_device(device, **changes)
    judge = judge_of(settings.size, judge_steps, device)
    return Candidate(train_or_load(settings, device), judge, torch.arange(count) % 10)


def main() -> None:
    judge = Judge(size=14, steps=300)
    right = judge.accuracy(judge.test.pixels, judge.test.labels)
    print(f"digits of 14 x 14: {right:.1%} of the test digits are named")
    half = judge.test.pixels
    blurred = nn.functional.avg_pool2d(half, 3, stride=1, padding=1, count_include_pad=False)
    for name, made in {
        "training digits": judge.floor(1000),
        "blurred": judge.verdict(blurred),
    }.items():
        row = "  ".join(f"{key} {value:.3f}" for key, value in made._asdict().items())
        print(f"  {name:16}{row}")


if __name__ == "__main__":
    main()
