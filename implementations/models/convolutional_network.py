"""A small convolutional network: what a vision transformer has to beat, and often cannot.

    h_i = maximum over 2 x 2 of relu(norm(convolution 3 x 3 (h_{i-1})))    channels double
    features = mean of h over the picture;  scores = W features + b

It is told two things that a transformer must learn: that neighbours belong together, and that a
thing looks the same wherever it stands. With few pictures that is worth more than freedom.

Paper   LeCun et al. 1989, doi:10.1162/neco.1989.1.4.541; the norm: Ioffe & Szegedy 2015,
        arXiv:1502.03167
Shapes  pixels [batch, channel, row, column]    scores [batch, class]
Run     uv run python implementations/models/convolutional_network.py
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ConvolutionalNetwork(nn.Module):
    """Three stages at half, a quarter and an eighth of the picture's size.

    Args:
        channels: 1 for grey pictures, 3 for colour.
        classes: how many there are to choose from.
        width: channels of the first stage.
    """

    def __init__(self, channels: int, classes: int, width: int = 32):
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                )
                for before, after in pairwise(widths)
            )
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(
        self, pixels: Float[Tensor, "batch channel row column"]
    ) -> Float[Tensor, "batch output"]:
        """Scores of the classes; pictures of any size of at least 8 x 8 pixels.

        Raises:
            ValueError: a picture that three halvings leave nothing of.
        """
        if min(pixels.shape[-2:]) < 8:
            raise ValueError(f"pictures are at least 8 x 8 pixels, got {list(pixels.shape[-2:])}")
        return self.head(self.stages(pixels).mean((-2, -1)))


def main() -> None:
    torch.manual_seed(0)
    model = ConvolutionalNetwork(1, 10).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters")
    picture = torch.zeros(1, 1, 32, 32)
    picture[..., 12:17, 10:15] = torch.rand(5, 5)
    scores = model(picture)
    for shift in (1, 4, 8):
        moved = model(picture.roll(shift, -1))
        print(f"moved by {shift} pixels, the scores move by {(moved - scores).abs().max():.1e}")


if __name__ == "__main__":
    main()
