"""Probes: what can be read off frozen features with next to no learning?

    nearest neighbours  the commonest label among the k training rows of the largest cosine
    linear probe        softmax(W x + b) with  mean cross-entropy + penalty/2 |W|²  at its minimum

Neither can make up for features that do not hold the answer, which is why they measure features.

Paper   linear probe: Alain & Bengio 2016, arXiv:1610.01644; as in Chen et al. 2020,
        arXiv:2002.05709; nearest neighbours: Wu et al. 2018, arXiv:1805.01978
Shapes  train, test [row, width]    labels [row], from 0
Run     uv run python implementations/contrastive/probes.py
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from implementations.contrastive.info_nce import unit


def nearest_neighbours(
    train: Float[Tensor, "row width"],
    labels: Int[Tensor, " row"],
    test: Float[Tensor, "test_row width"],
    test_labels: Int[Tensor, " test_row"],
    *,
    neighbours: int = 5,
) -> float:
    """Accuracy of a vote of the nearest training rows by cosine; of a tie the lowest label wins.

    Raises:
        ValueError: more neighbours than training rows or none, rows without labels, or a row
            without a direction.
    """
    check(train, labels, test, test_labels)
    if not 1 <= neighbours <= len(train):
        raise ValueError(f"{len(train)} rows cannot give {neighbours} neighbours")
    nearest = (unit(test) @ unit(train).T).topk(neighbours, dim=1).indices
    votes = one_hot(labels)[nearest].sum(1)
    return (votes.argmax(1) == test_labels).double().mean().item()


def linear_probe(
    train: Float[Tensor, "row width"],
    labels: Int[Tensor, " row"],
    test: Float[Tensor, "test_row width"],
    test_labels: Int[Tensor, " test_row"],
    *,
    penalty: float = 1e-3,
) -> float:
    """Accuracy of logistic regression on features scaled by the training rows' mean and spread.

    Errors are those of `fit_linear`.
    """
    check(train, labels, test, test_labels)
    mean, spread = train.mean(0), train.std(0).clamp(min=1e-6)
    weight, bias = fit_linear((train - mean) / spread, labels, penalty=penalty)
    scores = ((test - mean) / spread).double() @ weight.T + bias
    return (scores.argmax(1) == test_labels).double().mean().item()


def fit_linear(
    x: Float[Tensor, "row width"],
    labels: Int[Tensor, " row"],
    *,
    penalty: float,
    iterations: int = 500,
) -> tuple[Float[Tensor, "label width"], Float[Tensor, " label"]]:
    """The weight and bias at the minimum, which is the only one; in float64, by L-BFGS.

    scikit-learn's C is 1 / (rows · penalty).

    Raises:
        ValueError: a penalty that is not positive, without which separable rows have no minimum.
    """
    if not penalty > 0:
        raise ValueError(f"the penalty is positive, got {penalty}: else weights grow for ever")
    x, count = x.double(), int(labels.max()) + 1
    weight = nn.Parameter(x.new_zeros(count, x.shape[1]))
    bias = nn.Parameter(x.new_zeros(count))
    options = {"max_iter": iterations, "tolerance_grad": 1e-7, "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS([weight, bias], line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def check(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    """Raise ValueError unless there are rows, and a label for each."""
    for name, x, y in (("training", train, labels), ("test", test, test_labels)):
        if not len(x) or len(x) != len(y):
            raise ValueError(f"{name} rows need a label each, got {len(x)} and {len(y)} labels")


def main() -> None:
    from implementations.sources.images import digits

    train, test = digits().split()
    data = []
    for part in (train, test):
        data += [part.pixels.flatten(1).float(), part.labels]
    torch.manual_seed(0)
    projected = [data[0] @ (p := torch.randn(64, 8)), data[1], data[2] @ p, data[3]]
    print("digits of 8x8: test accuracy of probes")
    for name, given in {"64 pixels": data, "8 random sums of them": projected}.items():
        neighbours, linear = nearest_neighbours(*given), linear_probe(*given)
        print(f"  {name:22} nearest neighbours {neighbours:.3f}, linear {linear:.3f}")


if __name__ == "__main__":
    main()
