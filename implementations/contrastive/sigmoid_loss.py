"""The sigmoid loss of SigLIP: every pair of a picture and a text is a question of its own.

    score_ij = scale · cosine(image_i, text_j) + bias
    loss     = -1/N  sum_ij log sigmoid(z_ij score_ij)        z_ij = 1 if i = j, else -1

InfoNCE normalises each row over the whole batch; here "do these two belong together?" is asked N²
times, so a batch can be cut anywhere, and a single pair is allowed. Of N² answers only N are yes:
the bias starts at -10 so that the first steps are not spent on learning to say no.

Paper   Zhai et al. 2023, arXiv:2303.15343, equation 1 and algorithm 1
Shapes  image, text [pair, dim]
Run     uv run python implementations/contrastive/sigmoid_loss.py
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from implementations.contrastive.info_nce import Temperature, cosine_scores

SCALE, BIAS = 10.0, -10.0  # where the paper starts


def sigmoid_loss(
    image: Float[Tensor, "pair dim"],
    text: Float[Tensor, "pair dim"],
    scale: Temperature = SCALE,
    bias: Temperature = BIAS,
) -> Float[Tensor, ""]:
    """The surprise at all N² answers over the number of pairs N, in nats.

    Args:
        scale: the inverse of a temperature; the paper's t.
        bias: added to every score; the paper's b.

    Raises:
        ValueError: shapes that do not pair, no pair, a scale that is not positive, or an embedding
            that has no direction.
    """
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        shapes = f"{list(image.shape)} and {list(text.shape)}"
        raise ValueError(f"row i of both sides is a pair, so shapes [pair, dim] agree: {shapes}")
    if not scale > 0:
        raise ValueError(f"a scale is positive, got {float(scale)}")
    scores = cosine_scores(image, text, 1 / scale) + bias
    belongs = 2 * torch.eye(len(image), device=scores.device, dtype=scores.dtype) - 1
    return -logsigmoid(belongs * scores).sum() / len(image)


class SigmoidLoss(nn.Module):
    """`sigmoid_loss` with a learned scale, kept positive by its logarithm, and a learned bias."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        self.bias = nn.Parameter(torch.tensor(BIAS))

    def forward(
        self, image: Float[Tensor, "pair dim"], text: Float[Tensor, "pair dim"]
    ) -> Float[Tensor, ""]:
        """Errors are those of `sigmoid_loss`."""
        return sigmoid_loss(image, text, self.log_scale.exp(), self.bias)


def main() -> None:
    torch.manual_seed(0)
    image, text = torch.randn(2, 64, 32)
    print("loss of 64 random pairs, and how much of it is asked about pairs that belong together")
    for bias in (0.0, -10.0):
        whole = sigmoid_loss(image, text, bias=bias)
        alone = [sigmoid_loss(image[i : i + 1], text[i : i + 1], bias=bias) for i in range(64)]
        print(f"  bias {bias:5}: {whole:7.3f} nats, {torch.stack(alone).mean() / whole:.1%}")


if __name__ == "__main__":
    main()
