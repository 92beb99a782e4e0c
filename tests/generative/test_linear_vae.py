"""The linear VAE: scikit-learn's PCA and FactorAnalysis, torch's Gaussians, and its own optimum."""

import math

import pytest
import torch
from sklearn.decomposition import PCA, FactorAnalysis
from torch.distributions import MultivariateNormal, kl_divergence

from implementations.generative.diagonal_gaussian import DiagonalGaussian
from implementations.generative.likelihoods import gaussian_log_likelihood
from implementations.generative.linear_vae import LinearVAE, best_linear_vae, principal_axes


def data(rows=200, dim=6):
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(rows, dim, generator=generator, dtype=torch.float64) @ mixing + 3


def random_model(dim=6, latent=3):
    torch.manual_seed(2)
    weight, mean = torch.randn(dim, latent).double(), torch.randn(dim).double()
    return LinearVAE(weight, mean, torch.tensor(0.3, dtype=torch.float64))


def random_q(x, latent=3):
    return DiagonalGaussian(*torch.randn(2, len(x), latent, dtype=torch.float64))


@pytest.mark.parametrize("latent", [1, 3, 5])
def test_best_model_is_scikit_learns_probabilistic_pca(latent):
    """Same covariance but for the divisor n - 1 of scikit-learn's, and the same likelihood of x.

    Two eigensolvers agree to 1e-9 here.
    """
    x = data()
    model, theirs = best_linear_vae(x, latent), PCA(latent).fit(x.numpy())
    ours = model.weight @ model.weight.mT + model.variance * torch.eye(6, dtype=torch.float64)
    correction = (len(x) - 1) / len(x)
    expected = torch.tensor(theirs.get_covariance()) * correction
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)

    theirs.explained_variance_ *= correction
    theirs.noise_variance_ *= correction
    likelihood = torch.tensor(theirs.score_samples(x.numpy()))
    torch.testing.assert_close(model.log_likelihood(x), likelihood, rtol=1e-9, atol=1e-9)


def test_log_likelihood_equals_scikit_learns_factor_analysis_where_noise_is_shared():
    """Factor analysis with our weights and one noise variance for all is this model."""
    x, model = data(), random_model()
    theirs = FactorAnalysis(3).fit(x.numpy())
    theirs.components_, theirs.mean_ = model.weight.mT.numpy(), model.mean.numpy()
    theirs.noise_variance_ = model.variance.expand(6).numpy()
    likelihood = torch.tensor(theirs.score_samples(x.numpy()))
    torch.testing.assert_close(model.log_likelihood(x), likelihood, rtol=1e-9, atol=1e-9)


def test_posterior_is_the_conditional_of_the_joint_gaussian():
    """Condition the covariance of (z, x) on x by the textbook formula, which knows no M."""
    x, model = data(5), random_model()
    covariance = model.weight @ model.weight.mT + model.variance * torch.eye(6).double()
    gain = torch.linalg.solve(covariance, model.weight).mT
    mean = (x - model.mean) @ gain.mT
    spread = torch.eye(3).double() - gain @ model.weight
    torch.testing.assert_close(model.posterior_mean(x), mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.precision().inverse(), spread, rtol=1e-10, atol=1e-10)


def test_elbo_equals_its_samples():
    """200,000 samples, 4.5 standard errors: false alarm 7e-6 for each of five points."""
    x, model = data(5), random_model()
    q = random_q(x)
    z = q.at(torch.randn(200_000, 5, 3, dtype=torch.float64))
    log_variance = model.variance.log().expand(6)
    terms = gaussian_log_likelihood(x, z @ model.weight.mT + model.mean, log_variance)
    bound = terms.mean(0) - q.kl_to_standard()
    assert ((bound - model.elbo(x, q)).abs() < 4.5 * terms.std(0) / 200_000**0.5).all()


def test_the_gap_is_the_divergence_from_the_posterior():
    """log p(x) - ELBO = KL(q || p(z | x)), the latter also by torch's full Gaussians."""
    x, model = data(5), random_model()
    q = random_q(x)
    gap = model.log_likelihood(x) - model.elbo(x, q)
    torch.testing.assert_close(gap, model.kl_to_posterior(x, q), rtol=1e-10, atol=1e-8)
    posterior = MultivariateNormal(model.posterior_mean(x), model.precision().inverse())
    theirs = kl_divergence(
        MultivariateNormal(q.mean, torch.diag_embed(q.log_variance.exp())), posterior
    )
    torch.testing.assert_close(gap, theirs, rtol=1e-9, atol=1e-8)
    assert (gap > 0.1).all()


def test_at_the_optimum_the_elbo_is_the_log_likelihood():
    x = data()
    model = best_linear_vae(x, 3)
    gap = model.log_likelihood(x) - model.elbo(x, model.best_diagonal(x))
    assert gap.abs().max() < 1e-6  # the demand; float64 leaves 1e-12
    assert gap.abs().max() < 1e-10


def test_climbing_the_elbo_by_gradients_ends_at_scikit_learns_likelihood():
    """All of W, μ, σ² and a linear encoder start at random; L-BFGS ends within 1e-6 of the optimum
    whose covariance is scikit-learn's.
    """
    x, latent = data(60, 4), 2
    torch.manual_seed(5)
    weight, encode = (torch.randn(4, latent).double().requires_grad_() for _ in range(2))
    mean, offset = torch.zeros(4).double(), torch.zeros(latent).double()
    log_noise, log_variance = torch.zeros(()).double(), torch.zeros(latent).double()
    parameters = [weight, encode, mean, offset, log_noise, log_variance]
    parameters = [p.requires_grad_() for p in parameters]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=400, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        q = DiagonalGaussian(x @ encode + offset, log_variance.expand(len(x), latent))
        value = -LinearVAE(weight, mean, log_noise.exp()).elbo(x, q).mean()
        value.backward()
        return value

    optimizer.step(loss)
    reached = -loss().item()
    theirs = PCA(latent).fit(x.numpy())
    correction = (len(x) - 1) / len(x)
    theirs.explained_variance_ *= correction
    theirs.noise_variance_ *= correction
    assert abs(theirs.score(x.numpy()) - reached) < 1e-6


def test_no_diagonal_q_is_better_than_the_best_diagonal():
    """For a rotated model the gradient of the ELBO with respect to q vanishes there, and moving
    away costs; what is left is the formula ½ (Σ log M_ii/σ² - log det M/σ²).
    """
    x, model = data(4), random_model()
    best = model.best_diagonal(x)
    leaves = [p.clone().requires_grad_() for p in best]
    model.elbo(x, DiagonalGaussian(*leaves)).sum().backward()
    assert max(leaf.grad.abs().max() for leaf in leaves) < 1e-10
    for _ in range(20):
        moved = DiagonalGaussian(*(p + 0.1 * torch.randn_like(p) for p in best))
        assert (model.elbo(x, moved) < model.elbo(x, best)).all()
    precision = model.precision()
    left = (precision.diagonal().log().sum() - precision.logdet()) / 2
    gap = model.log_likelihood(x) - model.elbo(x, best)
    torch.testing.assert_close(gap, left.expand(4), rtol=1e-9, atol=1e-9)


def test_a_rotation_of_z_changes_the_bound_and_not_the_likelihood():
    x, model = data(), best_linear_vae(data(), 3)
    torch.manual_seed(1)
    turned = model.rotated(torch.linalg.qr(torch.randn(3, 3).double()).Q)
    same = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(turned.log_likelihood(x), model.log_likelihood(x), **same)
    assert turned.elbo(x, turned.best_diagonal(x)).mean() < model.log_likelihood(x).mean() - 1e-3


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_best_model_is_a_maximum_of_the_beta_elbo(beta):
    """At a given σ² no gradient is left, and no random step helps."""
    x, variance = data(), 0.4
    model = best_linear_vae(x, 4, variance, beta)

    def value(weight):
        """The β-ELBO of a weight with the best q for it, whose precision is WᵀW/βσ² + I."""
        each = model._replace(weight=weight)
        tempered = each._replace(variance=beta * model.variance)
        return each.elbo(x, tempered.best_diagonal(x), beta).mean()

    weight = model.weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(weight), weight)
    assert gradient.abs().max() < 1e-10
    for _ in range(20):
        assert value(model.weight + 0.05 * torch.randn_like(model.weight)) < value(model.weight)


def test_coordinates_below_beta_times_the_noise_collapse():
    """Variances known, σ² between them: just those above βσ² are kept, with √(λ - βσ²)."""
    x = data()
    variances, _ = principal_axes(x)
    between = (variances[2] * variances[3]).sqrt().item()
    for variance, beta in ((between, 1.0), (between / 4, 4.0), (4 * between, 0.25)):
        model = best_linear_vae(x, 5, variance, beta)
        lengths = model.weight.square().sum(0)
        expected = (variances[:5] - between).clamp(min=0)
        torch.testing.assert_close(lengths, expected, rtol=1e-10, atol=1e-10)
        assert (lengths == 0).tolist() == [False, False, False, True, True]


def test_gradcheck_of_bound_and_likelihood():
    x, model = data(3, 4), random_model(4, 2)
    leaves = [p.clone().requires_grad_() for p in (*model, *random_q(x, 2))]

    def both(weight, mean, variance, q_mean, q_log_variance):
        each = LinearVAE(weight, mean, variance)
        return each.log_likelihood(x), each.elbo(x, DiagonalGaussian(q_mean, q_log_variance))

    assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: best_linear_vae(data(), 6), "between 1 and 5, got 6"),
        (lambda: best_linear_vae(data(), 0), "between 1 and 5, got 0"),
        (lambda: best_linear_vae(data(), 2, 0.0), "positive variance, got 0.0"),
        (lambda: best_linear_vae(data(), 2, math.nan), "positive variance, got nan"),
        (lambda: best_linear_vae(data() * 0, 2), "positive variance, got 0.0"),
        (lambda: best_linear_vae(data(), 2, beta=2.0), "1 unless the variance is given, got 2.0"),
        (lambda: best_linear_vae(data(), 2, 1.0, beta=-1.0), "not negative.*got -1.0"),
        (
            lambda: random_model()._replace(variance=torch.tensor(0.0)).log_likelihood(data()),
            "positive variance, got 0.0",
        ),
        (lambda: random_model().log_likelihood(data() * math.nan), "not finite"),
        (lambda: random_model().elbo(data() / 0, random_q(data())), "not finite"),
        (lambda: random_model().posterior_mean(data() * math.inf), "not finite"),
    ],
)
def test_what_has_no_density_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
