"""The VAE: both forms of the ELBO are one number, and it bounds what integration says."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from implementations.generative.diagonal_gaussian import DiagonalGaussian, standard
from implementations.generative.vae import (
    LIKELIHOODS,
    VAE,
    elbo,
    elbo_of_joint,
    free_bits,
    perceptron,
)


def model(likelihood="bernoulli", levels=2, dim=5, latent=1) -> VAE:
    """A small untrained VAE in float64."""
    torch.manual_seed(3)
    outputs = LIKELIHOODS[likelihood].outputs * dim
    encoder, decoder = perceptron(dim, 8, 2 * latent), perceptron(latent, 8, outputs)
    return VAE(encoder, decoder, likelihood, levels).double()


def picture(levels=2, dim=5, batch=3):
    return torch.randint(levels, (batch, dim), generator=torch.Generator().manual_seed(4)).double()


def gauss_hermite(order=120):
    """Nodes and weights for the expectation over N(0, 1), from NumPy."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    return torch.tensor(nodes), torch.tensor(weights / math.sqrt(2 * math.pi))


@pytest.mark.parametrize(
    "likelihood, levels", [("bernoulli", 2), ("gaussian", 256), ("discretized_logistic", 17)]
)
def test_both_forms_of_the_elbo_are_the_same_expectation(likelihood, levels):
    """E log p(x, z) - log q(z | x) = E log p(x | z) - KL, expectations by quadrature, no samples.

    The decoder is smooth, so 120 nodes leave 1e-9.
    """
    vae, x = model(likelihood, levels), picture(levels)
    nodes, weights = gauss_hermite()
    noise = nodes[:, None, None].expand(-1, len(x), 1)
    q = vae.posterior(x)
    by_ratio = (weights[:, None] * vae.log_weights(x, noise)).sum(0)
    log_likelihood = vae.log_likelihood(x, q.at(noise))
    by_kl = (weights[:, None] * log_likelihood).sum(0) - q.kl_to_standard()
    torch.testing.assert_close(by_ratio, by_kl, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("likelihood, levels", [("bernoulli", 2), ("discretized_logistic", 17)])
def test_the_gap_to_the_integral_is_the_divergence_from_the_true_posterior(likelihood, levels):
    """log p(x) = log ∫ p(z) p(x | z) dz by a sum over 20,001 points; so is KL(q || p(z | x)).

    The sum is exact to 1e-9; 120 nodes for the bound leave 1e-5 of a steep likelihood.
    """
    vae, x = model(likelihood, levels), picture(levels)
    grid = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    z, step = grid[:, None, None].expand(-1, len(x), 1), 20 / 20_000
    joint = vae.log_likelihood(x, z) + standard(z).log_density(z)
    log_evidence = joint.logsumexp(0) + math.log(step)
    q = vae.posterior(x)
    log_q = q.log_density(z)
    divergence = (log_q.exp() * (log_q - (joint - log_evidence))).sum(0) * step
    nodes, weights = gauss_hermite()
    noise = nodes[:, None, None].expand(-1, len(x), 1)
    bound = (weights[:, None] * vae.log_weights(x, noise)).sum(0)
    torch.testing.assert_close(log_evidence - bound, divergence, rtol=1e-5, atol=1e-5)
    assert (divergence > 1e-3).all()


def test_samples_estimate_the_elbo_without_bias():
    """100,000 samples against quadrature, 4.5 standard errors: false alarm 7e-6 for each of six."""
    vae, x = model(), picture()
    nodes, weights = gauss_hermite()
    exact = (weights[:, None] * vae.log_weights(x, nodes[:, None, None].expand(-1, 3, 1))).sum(0)
    noise = torch.randn(100_000, 3, 1, dtype=torch.float64)
    with torch.no_grad():
        log_weights = vae.log_weights(x, noise)
        by_kl = vae.elbo(x, noise)
    error = log_weights.std(0) / len(noise) ** 0.5
    assert ((log_weights.mean(0) - exact).abs() < 4.5 * error).all()
    likelihoods = vae.log_likelihood(x, vae.posterior(x).at(noise))
    assert ((by_kl - exact).abs() < 4.5 * likelihoods.std(0) / len(noise) ** 0.5).all()


def test_samples_with_their_own_divergence_make_both_forms_equal_to_the_bit_of_rounding():
    """Where the KL is estimated from the same z, the forms differ in nothing."""
    vae, x = model(latent=3), picture()
    noise = torch.randn(7, 3, 3, dtype=torch.float64)
    q = vae.posterior(x)
    z = q.at(noise)
    log_likelihood, log_prior, log_q = (
        vae.log_likelihood(x, z),
        standard(z).log_density(z),
        q.log_density(z),
    )
    estimated_kl = (log_q - log_prior).mean(0)
    joint_form = elbo_of_joint(log_likelihood + log_prior, log_q)
    torch.testing.assert_close(joint_form, elbo(log_likelihood, estimated_kl), rtol=1e-12, atol=0)
    torch.testing.assert_close(vae.log_weights(x, noise).mean(0), joint_form, rtol=1e-12, atol=0)


def test_elbo_by_hand():
    """Likelihoods -3 and -5, divergence 2: -4 - 2 = -6; at beta 4, -12; at beta 0, -4."""
    log_likelihood, kl = torch.tensor([[-3.0], [-5.0]]), torch.tensor([2.0])
    assert [elbo(log_likelihood, kl, beta).item() for beta in (1.0, 4.0, 0.0)] == [-6, -12, -4]


def test_free_bits_by_hand():
    """Coordinates of mean KL 0.1 and 3; a floor of 0.5 lifts the first: 3.5. Floor 0: the mean."""
    kl = torch.tensor([[0.0, 2.0], [0.2, 4.0]], requires_grad=True)
    assert free_bits(kl, 0.5).item() == pytest.approx(3.5)
    assert free_bits(kl, 0.0).item() == pytest.approx(kl.sum(1).mean().item())
    free_bits(kl, 0.5).backward()
    assert kl.grad.tolist() == [[0.0, 0.5], [0.0, 0.5]]  # below the floor nothing pulls


def test_the_floor_is_under_the_mean_of_the_batch():
    """KLs of 0 and 1 with a floor of 0.5: together they meet it, so nothing is added."""
    assert free_bits(torch.tensor([[0.0], [1.0]]), 0.5).item() == 0.5


def test_a_batch_is_its_pictures_one_by_one():
    vae, x = model(latent=2), picture(batch=4)
    noise = torch.randn(3, 4, 2, dtype=torch.float64)
    alone = [vae.elbo(x[i : i + 1], noise[:, i : i + 1])[0] for i in range(4)]
    torch.testing.assert_close(vae.elbo(x, noise), torch.stack(alone), rtol=1e-12, atol=1e-12)


def test_pixels_reach_the_encoder_between_0_and_1():
    seen = []
    encoder = nn.Linear(5, 2).double()
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vae = VAE(encoder, nn.Linear(1, 10).double(), "discretized_logistic", 17)
    vae.posterior(torch.tensor([[0.0, 4.0, 8.0, 12.0, 16.0]], dtype=torch.float64))
    assert seen[0].tolist() == [[0.0, 0.25, 0.5, 0.75, 1.0]]


def test_outputs_of_a_pixel_are_mean_and_scale_of_that_pixel():
    """A decoder that ignores z: means 0 ... 4 in units of the brightest, one scale each."""
    decoder = nn.Linear(1, 10)
    with torch.no_grad():
        decoder.weight.zero_()
        decoder.bias.copy_(torch.arange(10.0))
    vae = VAE(nn.Linear(5, 2), decoder, "gaussian", 2)
    assert vae.outputs(torch.zeros(1, 1))[0].tolist() == [[i, i + 5] for i in range(5)]
    assert vae.mean(torch.zeros(1, 1))[0].tolist() == [0, 1, 2, 3, 4]


def test_gradients_of_the_bound_by_finite_differences():
    """Noise held fixed, the bound is a smooth function of every weight: gradcheck."""
    vae, x = model(latent=2), picture()
    noise = torch.randn(2, 3, 2, dtype=torch.float64)
    names, parameters = zip(*vae.named_parameters(), strict=True)

    def bound(*values):
        weights = dict(zip(names, values, strict=True))
        return torch.func.functional_call(Elbo(vae), {f"vae.{n}": w for n, w in weights.items()},
                                          (x, noise))  # fmt: skip

    assert torch.autograd.gradcheck(bound, parameters)


class Elbo(nn.Module):
    """The bound as a module's forward, which functional_call asks for."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, x, noise):
        return self.vae.elbo(x, noise).sum()


def test_a_layer_has_its_activation_and_the_last_has_none():
    kinds = [type(layer).__name__ for layer in perceptron(3, 4, 5, 6, dropout=0.5)]
    assert kinds == ["Linear", "SiLU", "Dropout", "Linear", "SiLU", "Dropout", "Linear"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: elbo(torch.zeros(1, 1), torch.zeros(1), -1.0), "not negative, got -1.0"),
        (lambda: elbo(torch.full((1, 1), math.nan), torch.zeros(1)), "log-likelihood is not fin"),
        (lambda: elbo(torch.full((1, 1), -math.inf), torch.zeros(1)), "log-likelihood is not f"),
        (lambda: free_bits(torch.zeros(1, 1), -0.1), "less than 0 free nats, got -0.1"),
        (lambda: VAE(nn.Identity(), nn.Identity(), "poisson", 2), "bernoulli, .* got 'poisson'"),
        (lambda: VAE(nn.Identity(), nn.Identity(), "bernoulli", 1), "two levels, got 1"),
        (lambda: model().elbo(2 * picture() + 2, torch.zeros(1, 3, 1)), "between 0 and 1"),
        (lambda: model().elbo(picture() * math.nan, torch.zeros(1, 3, 1)), "nan"),
    ],
)
def test_mistakes_are_answered_with_the_rule(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_posterior_is_a_mean_and_a_log_variance():
    """The first half of the encoder's numbers is the mean: an encoder that gives 0 ... 5."""
    vae = VAE(nn.Identity(), nn.Identity(), "bernoulli", 2)
    q = vae.posterior(torch.arange(6.0)[None])
    assert q == DiagonalGaussian(q.mean, q.log_variance)
    assert q.mean.tolist() == [[0, 1, 2]] and q.log_variance.tolist() == [[3, 4, 5]]
