"""Glow: couplings for images, with learned mixing of the channels in between.

    step        ActNorm -> invertible 1x1 convolution -> affine coupling
    ActNorm     y = (x + shift) exp(log_scale)       log det = pixels · sum(log_scale)
    1x1         y = W x at each pixel                log det = pixels · log |det W|
                W = P L (U + diag(sign · exp(log_diagonal))), so that log |det W| is a sum

ActNorm is set from a first batch, by `initialise`, so that each channel leaves it with mean 0 and
deviation 1; without that call it is the identity. multi_scale.py puts the steps together.

Paper   Kingma & Dhariwal 2018, arXiv:1807.03039, section 3
Shapes  x [batch, channel, row, column]; ActNorm and 1x1 also take [batch, channel]
Run     uv run python implementations/flows/glow.py
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from implementations.flows.affine_coupling import Coupling, check_kept
from implementations.flows.bijection import Bijection, Compose, Mapped


def pixels(x: Float[Tensor, "batch channel ..."]) -> int:
    """How many places have a value in each channel."""
    return x.shape[2:].numel()


def columns(values: Float[Tensor, " channel"], x: Tensor) -> Tensor:
    """One value a channel, so that it can be added to x."""
    return values.view(-1, *(x.ndim - 2) * (1,))


class ActNorm(Bijection):
    """A shift and a scale for each channel, the first ones taken from data."""

    def __init__(self, channels: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "batch channel ..."]) -> Mapped:
        log_det = (pixels(x) * self.log_scale.sum()).expand(len(x))
        return Mapped((x + columns(self.shift, x)) * columns(self.log_scale.exp(), x), log_det)

    def inverse(self, y: Float[Tensor, "batch channel ..."]) -> Mapped:
        log_det = -(pixels(y) * self.log_scale.sum()).expand(len(y))
        return Mapped(y * columns((-self.log_scale).exp(), y) - columns(self.shift, y), log_det)

    @torch.no_grad()
    def initialise(
        self, x: Float[Tensor, "batch channel ..."]
    ) -> Float[Tensor, "batch channel ..."]:
        """Give every channel of this batch mean 0 and deviation 1 (section 3.1).

        Raises:
            ValueError: a channel is the same everywhere: no scale can give it a deviation of 1.
        """
        by_channel = x.transpose(0, 1).flatten(1)
        deviation = by_channel.std(1, correction=0)
        if not (deviation > 0).all():
            channel = int((~(deviation > 0)).nonzero()[0])
            raise ValueError(f"channel {channel} does not vary, so no scale can normalise it")
        self.shift.copy_(-by_channel.mean(1))
        self.log_scale.copy_(-deviation.log())
        return self(x).value


class InvertibleConvolution(Bijection):
    """The same invertible matrix at every pixel, kept as its LU factors (section 3.2).

    Args:
        matrix: to start from; a random rotation unless given. Its permutation and signs stay.

    Raises:
        ValueError: the matrix is singular.
    """

    def __init__(self, channels: int, matrix: Float[Tensor, "channel channel"] | None = None):
        super().__init__()
        if matrix is None:
            matrix = torch.linalg.qr(torch.randn(channels, channels))[0]
        permutation, lower, upper = torch.linalg.lu(matrix)
        diagonal = upper.diagonal()
        # What cannot be told from zero next to rounding: no inverse would have a digit right.
        smallest = torch.finfo(matrix.dtype).eps * channels * matrix.abs().max()
        if not diagonal.abs().min() > smallest:
            raise ValueError(
                f"a 1x1 convolution needs an invertible matrix; its LU factors have "
                f"{diagonal.abs().min().item():.1e} on the diagonal"
            )
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())

    def factors(self) -> tuple[Float[Tensor, "channel channel"], Float[Tensor, "channel channel"]]:
        """L with ones on its diagonal, and U with its own."""
        ones = torch.ones_like(self.log_diagonal)
        lower = self.lower.tril(-1) + ones.diag()
        return lower, self.upper.triu(1) + (self.sign * self.log_diagonal.exp()).diag()

    def forward(self, x: Float[Tensor, "batch channel ..."]) -> Mapped:
        lower, upper = self.factors()
        y = torch.einsum("oc,bc...->bo...", self.permutation @ lower @ upper, x)
        return Mapped(y, (pixels(x) * self.log_diagonal.sum()).expand(len(x)))

    def inverse(self, y: Float[Tensor, "batch channel ..."]) -> Mapped:
        lower, upper = self.factors()
        flat = self.permutation.mT @ y.transpose(0, 1).flatten(1)
        flat = torch.linalg.solve_triangular(lower, flat, upper=False, unitriangular=True)
        flat = torch.linalg.solve_triangular(upper, flat, upper=True)
        x = flat.view(y.shape[1], len(y), *y.shape[2:]).transpose(0, 1)
        return Mapped(x, -(pixels(y) * self.log_diagonal.sum()).expand(len(y)))


class Convolutions(nn.Module):
    """The coupling's network for images: 3x3, 1x1, 3x3; zero before training."""

    def __init__(self, inputs: int, outputs: int, parameters: int, hidden: int):
        super().__init__()
        self.parameters_each = parameters
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, hidden, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.SiLU(),
            nn.Conv2d(hidden, outputs * parameters, 3, padding=1),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(
        self, x: Float[Tensor, "batch kept row column"]
    ) -> Float[Tensor, "batch moved row column parameter"]:
        return rearrange(self.layers(x), "b (m p) row col -> b m row col p", p=self.parameters_each)


def glow_step(channels: int, hidden: int) -> Compose:
    """ActNorm, mixing, coupling: the second half of the channels moves as the first half says.

    Raises:
        ValueError: one channel alone, which cannot be coupled.
    """
    kept = torch.arange(channels) < channels // 2
    check_kept(kept)
    moved = channels - channels // 2
    coupling = Coupling(kept, Convolutions(channels // 2, moved, 2, hidden))
    return Compose(ActNorm(channels), InvertibleConvolution(channels), coupling)


def main() -> None:
    torch.manual_seed(0)
    step = glow_step(channels=4, hidden=8).double()
    x = 3 + 2 * torch.randn(64, 4, 2, 2, dtype=torch.float64)
    y = step.initialise(x)
    print(f"data of mean 3, deviation 2, after ActNorm: {y.mean():.3f} and {y.std():.3f}")
    for parameter in step.parameters():
        nn.init.normal_(parameter, std=0.3)
    y, log_det = step(x[:1])
    jacobian = torch.autograd.functional.jacobian(lambda x: step(x).value.flatten(), x[:1])
    dense = torch.linalg.slogdet(jacobian.flatten(1))[1]
    print(f"log |det| {log_det[0]:.10f}, of the dense 16 x 16 Jacobian {dense:.10f}")
    print(f"there and back {(step.inverse(y).value - x[:1]).abs().max():.1e}")


if __name__ == "__main__":
    main()
