"""A flow: a density that is exact because every step can be undone and says how it stretches.

    z = f(x)      log p(x) = log p_base(f(x)) + log |det df/dx|

Every step is a Bijection and keeps one contract, in both directions:

    forward(x) = (y, log |det dy/dx|)      inverse(y) = (x, log |det dx/dy|)

one log-determinant for each example, never summed over the batch. Forward leads from data to noise,
so a density is one pass forward and a sample one pass back. Steps are put one after another by
Compose, where log-determinants add, and turned around by Inverse.

Paper   Rezende & Mohamed 2015, arXiv:1505.05770; Papamakarios et al. 2019, arXiv:1912.02762
Shapes  x, y [batch, ...]    log_det [batch]
Run     uv run python implementations/flows/bijection.py
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Mapped(NamedTuple):
    """Where a bijection leads, and how much it stretches volumes there."""

    value: Float[Tensor, "batch ..."]
    log_det: Float[Tensor, " batch"]
    """log |det| of the Jacobian of `value` by what was given, in nats, one for each example"""


class Bijection(nn.Module):
    """A map that can be undone, for examples in the rows of a tensor."""

    def forward(self, x: Float[Tensor, "batch ..."]) -> Mapped:
        """f(x) and log |det df/dx|."""
        raise NotImplementedError

    def inverse(self, y: Float[Tensor, "batch ..."]) -> Mapped:
        """The x with f(x) = y, and log |det dx/dy|."""
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Set what depends on the data (ActNorm's scale), from a first batch; returns f(x)."""
        return self(x).value


class Compose(Bijection):
    """One bijection after the other, the first argument first."""

    def __init__(self, *steps: Bijection):
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Mapped:
        return self.through(x, [step.forward for step in self.steps])

    def inverse(self, y: Float[Tensor, "batch ..."]) -> Mapped:
        return self.through(y, [step.inverse for step in reversed(self.steps)])

    def through(self, x: Float[Tensor, "batch ..."], maps: list) -> Mapped:
        log_det = x.new_zeros(len(x))
        for step in maps:
            x, log_stretch = step(x)
            log_det = log_det + log_stretch
        return Mapped(x, log_det)

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        for step in self.steps:
            x = step.initialise(x)
        return x


class Inverse(Bijection):
    """A bijection turned around: what was slow one way is now slow the other way."""

    def __init__(self, turned: Bijection):
        super().__init__()
        self.turned = turned

    def forward(self, x: Float[Tensor, "batch ..."]) -> Mapped:
        return self.turned.inverse(x)

    def inverse(self, y: Float[Tensor, "batch ..."]) -> Mapped:
        return self.turned.forward(y)


class Permute(Bijection):
    """The columns in another order; it stretches nothing."""

    def __init__(self, order: Int[Tensor, " dim"]):
        super().__init__()
        if sorted(order.tolist()) != list(range(len(order))):
            raise ValueError(f"an order names every column once, got {order.tolist()}")
        self.register_buffer("order", order)

    def forward(self, x: Float[Tensor, "batch dim ..."]) -> Mapped:
        return Mapped(x[:, self.order], x.new_zeros(len(x)))

    def inverse(self, y: Float[Tensor, "batch dim ..."]) -> Mapped:
        return Mapped(y[:, self.order.argsort()], y.new_zeros(len(y)))


class Flatten(Bijection):
    """Examples of a shape as rows, for bijections that want rows."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Mapped:
        return Mapped(x.flatten(1), x.new_zeros(len(x)))

    def inverse(self, y: Float[Tensor, "batch dim"]) -> Mapped:
        return Mapped(y.view(len(y), *self.shape), y.new_zeros(len(y)))


class Flow(nn.Module):
    """A bijection from data to a base density, which is the standard normal unless given.

    Args:
        bijection: leads from data to noise.
        shape: of one example of noise.
        base: a torch.distributions object whose `log_prob` gives a number for each example.
    """

    def __init__(
        self,
        bijection: Bijection,
        shape: tuple[int, ...],
        base: torch.distributions.Distribution | None = None,
    ):
        super().__init__()
        self.bijection, self.shape, self.base = bijection, tuple(shape), base

    @property
    def kind(self) -> dict[str, torch.dtype | torch.device]:
        """Type and device of the weights, which are those of the samples."""
        first = next(self.bijection.parameters(), torch.zeros(()))
        return {"dtype": first.dtype, "device": first.device}

    def log_prob(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """log p(x) of each example, in nats.

        Raises:
            ValueError: the data are not finite, or their log density is not.
        """
        check_rows(x.isfinite().flatten(1).all(1), "data must be finite", x)
        noise, log_det = self.bijection(x)
        log_density = log_det + (
            normal_log_density(noise) if self.base is None else self.base.log_prob(noise)
        )
        check_rows(log_density.isfinite(), "the log density must be finite", log_density)
        return log_density

    @torch.no_grad()
    def sample(
        self, count: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch ..."]:
        """Draw examples: noise from the base, led back to data.

        Args:
            temperature: the noise is multiplied by it; below 1 the samples are tamer, and no longer
                those of the density.
            generator: for the standard normal; a torch.distributions base takes none.

        Raises:
            ValueError: the temperature is negative.
        """
        if temperature < 0:
            raise ValueError(f"a temperature is not negative, got {temperature}")
        if self.base is None:
            noise = torch.randn(count, *self.shape, generator=generator, **self.kind)
        else:
            noise = self.base.sample((count,)).to(**self.kind)
        return self.bijection.inverse(temperature * noise).value


def normal_log_density(z: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """-(|z|² + D log 2π) / 2, with D numbers in an example."""
    flat = z.flatten(1)
    return -(flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi)) / 2


def check_rows(good: Bool[Tensor, " batch"], rule: str, values: Tensor) -> None:
    """Raise a ValueError that names the first row that breaks the rule, and what it holds there."""
    if not good.all():
        row = int((~good).nonzero()[0])
        wrong = values[row][~values[row].isfinite()].flatten()[0].item()
        raise ValueError(f"{rule}: row {row} holds {wrong}")


def negative_log_likelihood(
    flow: Flow, x: Float[Tensor, "batch ..."]
) -> tuple[Float[Tensor, ""], int]:
    """The loss of a batch as the training loop wants it: the sum in nats, and how many."""
    return -flow.log_prob(x).sum(), len(x)


def main() -> None:
    class Stretch(Bijection):
        """y = 3 x"""

        def forward(self, x):
            return Mapped(3 * x, torch.full((len(x),), x.shape[1] * math.log(3)))

    x = torch.linspace(-5, 5, 10_001)[:, None]
    with_det = Flow(Stretch(), (1,)).log_prob(x).exp()
    without = normal_log_density(3 * x).exp()
    print("N(3 x) as a density of x: its integral")
    print(f"  with the log-determinant     {torch.trapezoid(with_det, x[:, 0]):.6f}")
    print(f"  without it                   {torch.trapezoid(without, x[:, 0]):.6f}")


if __name__ == "__main__":
    main()
