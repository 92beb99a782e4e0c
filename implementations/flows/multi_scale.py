"""Several scales: pixels are folded into channels, and half of them leave as noise at every scale.

    squeeze     2 x 2 pixels become one, of four times the channels
    steps       Glow's, at this scale
    split       half of the channels are done; the other half is squeezed again

The first noise to leave is fine texture, the last to stay is the coarse shape; what has left costs
nothing at the scales that follow.

Paper   Dinh, Sohl-Dickstein & Bengio 2016, arXiv:1605.08803, section 3.6; Kingma & Dhariwal 2018,
        arXiv:1807.03039, figure 2
Shapes  x [batch, channel, row, column]    noise [batch, channel · row · column]
Run     uv run python implementations/flows/multi_scale.py
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from implementations.flows.bijection import Bijection, Compose, Mapped
from implementations.flows.glow import glow_step


class Squeeze(Bijection):
    """Blocks of 2 x 2 pixels as channels: nothing is lost and nothing is stretched."""

    def forward(self, x: Float[Tensor, "batch channel row column"]) -> Mapped:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"only even rows and columns can be halved, got {tuple(x.shape[2:])}")
        y = rearrange(x, "b c (row i) (column j) -> b (c i j) row column", i=2, j=2)
        return Mapped(y, x.new_zeros(len(x)))

    def inverse(self, y: Float[Tensor, "batch channel row column"]) -> Mapped:
        x = rearrange(y, "b (c i j) row column -> b c (row i) (column j)", i=2, j=2)
        return Mapped(x, y.new_zeros(len(y)))


class MultiScale(Bijection):
    """Glow's architecture: from images to noise, which leaves at every scale.

    Args:
        shape: channels, rows and columns of an image.
        scales: how often it is squeezed; rows and columns must halve so often.
        steps: at each scale.
        hidden: channels inside the couplings' networks.

    The noise is one row an example: first what left at the finest scale, last what was left over.

    Raises:
        ValueError: rows or columns cannot be halved so often.
    """

    def __init__(self, shape: tuple[int, int, int], scales: int, steps: int, hidden: int):
        super().__init__()
        channels, rows, wide = shape
        if scales < 1 or rows % 2**scales or wide % 2**scales:
            raise ValueError(f"{rows} rows and {wide} columns cannot be halved {scales} times")
        self.shape, stages = shape, []
        for scale in range(scales):
            channels = 4 * channels
            stages.append(Compose(Squeeze(), *(glow_step(channels, hidden) for _ in range(steps))))
            if scale < scales - 1:
                channels = channels // 2
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Float[Tensor, "batch channel row column"]) -> Mapped:
        if x.shape[1:] != self.shape:
            raise ValueError(f"the flow is for images {self.shape}, got {tuple(x.shape[1:])}")
        done, log_det = [], x.new_zeros(len(x))
        for stage in self.stages:
            x, log_stretch = stage(x)
            log_det = log_det + log_stretch
            if stage is not self.stages[-1]:
                out, x = x.chunk(2, 1)
                done.append(out.flatten(1))
        return Mapped(torch.cat([*done, x.flatten(1)], 1), log_det)

    def inverse(self, y: Float[Tensor, "batch dim"]) -> Mapped:
        pieces, log_det = self.pieces(y), y.new_zeros(len(y))
        x = pieces.pop()
        for stage in reversed(self.stages):
            if stage is not self.stages[-1]:
                x = torch.cat((pieces.pop(), x), 1)
            x, log_stretch = stage.inverse(x)
            log_det = log_det + log_stretch
        return Mapped(x, log_det)

    def pieces(self, y: Float[Tensor, "batch dim"]) -> list[Tensor]:
        """A row of noise as the images that left at each scale."""
        channels, rows, wide = self.shape
        shapes = []
        for scale in range(1, len(self.stages) + 1):
            last = scale == len(self.stages)
            channels = 4 * channels if last else 2 * channels
            shapes.append((channels, rows // 2**scale, wide // 2**scale))
        sizes = [a * b * c for a, b, c in shapes]
        if sum(sizes) != y.shape[1]:
            raise ValueError(f"noise has {sum(sizes)} numbers an example, got {y.shape[1]}")
        parts = zip(y.split(sizes, 1), shapes, strict=True)
        return [part.view(len(y), *shape) for part, shape in parts]

    @torch.no_grad()
    def initialise(
        self, x: Float[Tensor, "batch channel row column"]
    ) -> Float[Tensor, "batch dim"]:
        first = x
        for stage in self.stages:
            x = stage.initialise(x)
            if stage is not self.stages[-1]:
                x = x.chunk(2, 1)[1]
        return self(first).value


def main() -> None:
    torch.manual_seed(0)
    flow = MultiScale((1, 8, 8), scales=2, steps=3, hidden=8).double()
    x = 3 + 2 * torch.randn(64, 1, 8, 8, dtype=torch.float64)
    noise = flow.initialise(x)
    print(
        f"set from data of mean 3 and deviation 2: noise of mean {noise.mean():.3f}, "
        f"deviation {noise.std():.3f}"
    )
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.1)
    y, log_det = flow(x[:1])
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x).value[0], x[:1])
    dense = torch.linalg.slogdet(jacobian.flatten(1))[1]
    print(f"log |det| {log_det[0]:.9f}, of the dense 64 x 64 Jacobian {dense:.9f}")
    print(f"there and back {(flow.inverse(y).value - x[:1]).abs().max():.1e}")


if __name__ == "__main__":
    main()
