"""VQ-VAE: nearest entries as scipy finds them, gradients that step over, averages as k-means."""

import math

import pytest
import torch
from scipy.cluster.vq import vq
from sklearn.cluster import KMeans
from torch import nn

from implementations.generative.vq_vae import (
    VQVAE,
    Averages,
    follow,
    nearest_code,
    perplexity,
    quantize,
    straight_through,
)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("codes, dim", [(1, 1), (7, 3), (63, 16)])
def test_nearest_is_scipys(codes, dim):
    x, codebook = numbers(257, dim), numbers(codes, dim, seed=1)
    theirs, _ = vq(x.numpy(), codebook.numpy())
    assert nearest_code(x, codebook).tolist() == theirs.tolist()


def test_axes_in_front_are_kept():
    x, codebook = numbers(2, 3, 5, 4), numbers(9, 4, seed=1)
    flat = nearest_code(x.flatten(0, 2), codebook)
    assert torch.equal(nearest_code(x, codebook), flat.view(2, 3, 5))


def test_straight_through_is_the_entry_forward_and_the_input_backward():
    """Value of the second, gradient 1 to the first and none to the second."""
    x, entry = numbers(3).requires_grad_(), numbers(3, seed=1).requires_grad_()
    output = straight_through(x, entry)
    torch.testing.assert_close(output, entry, rtol=1e-14, atol=1e-14)
    upstream = numbers(3, seed=2)
    output.backward(upstream)
    assert torch.equal(x.grad, upstream) and entry.grad is None


def test_the_output_moves_the_encoder_and_leaves_the_codebook():
    x, codebook = numbers(5, 3).requires_grad_(), numbers(4, 3, seed=1).requires_grad_()
    found = quantize(x, codebook)
    assert (found.output - codebook[found.codes]).abs().max() < 1e-14
    weights = numbers(5, 3, seed=2)
    gradients = torch.autograd.grad(
        (found.output * weights).sum(), [x, codebook], materialize_grads=True
    )
    assert torch.equal(gradients[0], weights) and gradients[1].abs().max() == 0


def test_the_two_losses_are_one_number_that_pulls_at_opposite_ends():
    """|x - e|² by hand: x = 0 and 3, entries 1 and 10: (1 + 4) / 2; so are the gradients."""
    x = torch.tensor([[0.0], [3.0]], requires_grad=True)
    codebook = torch.tensor([[1.0], [10.0]], requires_grad=True)
    found = quantize(x, codebook)
    assert found.codes.tolist() == [0, 0]
    assert found.codebook_loss.item() == found.commitment_loss.item() == 2.5
    pull = torch.autograd.grad(found.codebook_loss, [x, codebook], materialize_grads=True)
    assert pull[0].flatten().tolist() == [0, 0] and pull[1].flatten().tolist() == [-1, 0]
    push = torch.autograd.grad(found.commitment_loss, [x, codebook], materialize_grads=True)
    assert push[0].flatten().tolist() == [-1, 2] and push[1].flatten().tolist() == [0, 0]


def test_without_memory_averages_take_one_step_of_k_means():
    """scikit-learn's KMeans from the same centres, one iteration of Lloyd's algorithm."""
    x, centres = numbers(300, 3), numbers(5, 3, seed=1)
    start = Averages(torch.ones(5).double(), centres)
    ours = follow(start, x, nearest_code(x, centres), decay=0.0).codebook
    step = KMeans(5, init=centres.numpy(), n_init=1, max_iter=1, algorithm="lloyd").fit(x.numpy())
    torch.testing.assert_close(ours, torch.tensor(step.cluster_centers_), rtol=1e-10, atol=1e-12)


def test_averages_remember_by_their_decay():
    """By hand: count 1, sum 2; then two points 5 and 7 at decay ¾: count 1.25, sum 4.5."""
    start = Averages(torch.tensor([1.0]), torch.tensor([[2.0]]))
    after = follow(start, torch.tensor([[5.0], [7.0]]), torch.tensor([0, 0]), decay=0.75)
    assert after.counts.tolist() == [1.25] and after.sums.tolist() == [[4.5]]


def test_an_entry_that_nothing_chooses_stays_where_it_is():
    """10,000 batches would shrink count and sum to 0 / 0."""
    averages = Averages(torch.ones(2), torch.tensor([[0.0], [50.0]]))
    for _ in range(10_000):
        averages = follow(averages, torch.ones(3, 1), torch.zeros(3, dtype=torch.int64), decay=0.9)
    assert averages.codebook.tolist() == [[pytest.approx(1.0)], [50.0]]


def test_perplexity_counts_codes_in_even_use():
    assert perplexity(torch.arange(8).repeat(5), 32).item() == pytest.approx(8)
    assert perplexity(torch.zeros(9, dtype=torch.int64), 32).item() == pytest.approx(1)
    half_and_quarters = torch.tensor([0, 0, 1, 2])
    assert perplexity(half_and_quarters, 3).item() == pytest.approx(2**1.5)


def test_the_encoder_gets_the_gradient_of_the_decoder():
    """Identity networks: d|x - e|²/dx is 2 (x - e) twice over, from the input and straight
    through, with opposite signs; commitment is what is left.
    """
    model = VQVAE(nn.Linear(2, 2, bias=False), nn.Identity(), codes=3, width=2).double()
    with torch.no_grad():
        model.encoder.weight.copy_(torch.eye(2))
    x = numbers(1, 2)
    model.loss(x).backward()
    _, found = model(x)
    entry = model.codebook[found.codes[0, 0]]
    pulled = -2 * (x[0] - entry) + 2 * 0.25 * (x[0] - entry)
    torch.testing.assert_close(
        model.encoder.weight.grad, pulled[:, None] * x, rtol=1e-10, atol=1e-10
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: nearest_code(torch.zeros(2, 3), torch.zeros(0, 3)), "at least one entry"),
        (lambda: quantize(torch.tensor([[math.nan]]), torch.zeros(2, 1)), "not finite"),
        (lambda: quantize(torch.tensor([[math.inf]]), torch.zeros(2, 1)), "not finite"),
        (
            lambda: follow(
                Averages(torch.ones(1), torch.ones(1, 1)), torch.ones(1, 1),
                torch.zeros(1, dtype=torch.int64), decay=1.0,
            ),
            "got 1.0",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_answered_with_the_rule(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
