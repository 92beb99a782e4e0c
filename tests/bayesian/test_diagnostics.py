"""Diagnostics are ArviZ's, and say of chains whose faults are known what those faults are."""

import warnings

import numpy as np
import pytest

from implementations.bayesian.diagnostics import (
    autocovariance,
    complaints,
    e_bfmi,
    entrywise,
    ess_bulk,
    ess_mean,
    ess_tail,
    mcse_deviation,
    mcse_mean,
    normal_scores,
    r_hat,
    split,
)

KINDS = [
    "normal",
    "drift",
    "rounded",
    "two values",
    "slow or swinging",
    "Cauchy",
    "constant",
    "NaN",
]


@pytest.fixture(scope="module")
def arviz():
    """ArviZ, without its once-a-day announcement."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def random_chains(kind: str, rng: np.random.Generator) -> np.ndarray:
    """2 to 5 chains of 4 to 199 draws."""
    chains, length = int(rng.integers(2, 6)), int(rng.integers(4, 200))
    draws = rng.normal(size=(chains, length))
    if kind == "drift":
        return draws.cumsum(axis=1)
    if kind == "rounded":
        return draws.round()
    if kind == "two values":
        return np.sign(draws)
    if kind == "slow or swinging":
        correlation = rng.uniform(-0.99, 0.99)
        for t in range(1, length):
            draws[:, t] += correlation * draws[:, t - 1]
    if kind == "Cauchy":
        return rng.standard_cauchy(size=(chains, length))
    if kind == "constant":
        # Small integers: of other constants ArviZ reports the rounding of its own quantiles.
        values = rng.integers(1, 9, size=(chains, 1)) * rng.integers(0, 2)
        return np.repeat(values + 1.0, length, axis=1)
    if kind == "NaN":
        draws[rng.integers(chains), rng.integers(length)] = np.nan
    return draws


@pytest.mark.parametrize("kind", KINDS)
def test_equals_arviz(kind, arviz, caplog):
    """rtol 1e-10 on 25 random sets of chains of each of 8 kinds, NaN equal to NaN.

    The two sum in different orders; over 2,000 sets the largest difference was below 1e-12.
    """
    rng = np.random.default_rng(KINDS.index(kind))
    pairs = {
        r_hat: lambda draws: arviz.rhat(draws),
        ess_bulk: lambda draws: arviz.ess(draws),
        ess_tail: lambda draws: arviz.ess(draws, method="tail"),
        ess_mean: lambda draws: arviz.ess(draws, method="mean"),
        mcse_mean: lambda draws: arviz.mcse(draws),
        mcse_deviation: lambda draws: arviz.mcse(draws, method="sd"),
        e_bfmi: lambda draws: arviz.bfmi(draws),
    }
    for _ in range(25):
        draws = random_chains(kind, rng)
        for ours, theirs in pairs.items():
            value = ours(draws)  # outside: ours must not warn, whatever the chains
            with np.errstate(all="ignore"):
                expected = theirs(draws)
            np.testing.assert_allclose(value, expected, rtol=1e-10, err_msg=ours.__name__)


def test_normal_scores_by_hand():
    """Five draws, two of them tied: ranks 1, 2, 3.5, 3.5, 5 of 5 (Blom 1958)."""
    from scipy.stats import norm

    scores = normal_scores(np.array([[7.0, 3.0, 9.0, -1.0, 7.0]]))
    ranks = np.array([3.5, 2, 5, 1, 3.5])
    np.testing.assert_allclose(scores[0], norm.ppf((ranks - 0.375) / 5.25), rtol=1e-12)


def test_autocovariance_is_the_sum_of_products():
    """By the definition, lag by lag, at rtol 1e-10: the transform must not wrap around."""
    draws = np.random.default_rng(0).normal(size=(3, 17)).cumsum(axis=1)
    centred = draws - draws.mean(axis=1, keepdims=True)
    for lag in range(17):
        by_hand = (centred[:, : 17 - lag] * centred[:, lag:]).sum(axis=1) / 17
        np.testing.assert_allclose(autocovariance(draws)[:, lag], by_hand, rtol=1e-10, atol=1e-12)


def test_ess_of_an_autoregression_is_known():
    """x_t = a x_{t-1} + noise has ESS = draws (1 - a) / (1 + a): 0.5 and -0.5 are 1/3 and 3.

    Over 200 seeds the ratio to theory had mean 1.00 and deviation 0.04 for both; 0.2 is five of
    those, so a false alarm has probability under 1e-6.
    """
    for correlation in (0.5, -0.5):
        draws = np.random.default_rng(1).normal(size=(4, 5000))
        for t in range(1, 5000):
            draws[:, t] += correlation * draws[:, t - 1]
        theory = 20_000 * (1 - correlation) / (1 + correlation)
        for diagnostic in (ess_bulk, ess_mean):
            assert abs(diagnostic(draws) / theory - 1) < 0.2


def test_a_single_drifting_chain_is_noticed():
    """Its halves disagree: without the split one chain could not be judged, nor two that drift
    alike.
    """
    drift = np.linspace(-2, 2, 500) + np.random.default_rng(2).normal(size=(2, 500))
    assert r_hat(drift) > 1.1
    assert ess_bulk(drift) < 40
    assert split(np.arange(10.0).reshape(2, 5)).tolist() == [[0, 1], [5, 6], [3, 4], [8, 9]]


def test_chains_of_different_width_are_noticed():
    """Equal means hide it from the bulk; distances from the median show it."""
    draws = np.random.default_rng(3).normal(size=(4, 1000)) * np.array([[3.0], [1], [1], [1]])
    assert r_hat(draws) > 1.05
    assert ess_bulk(draws) > 2000 > 400 > ess_tail(draws)


def test_ranks_bear_infinite_variance():
    """Cauchy chains about places 4 apart: the plain ratio of variances drowns in the tails."""
    rng = np.random.default_rng(4)
    draws = rng.standard_cauchy((4, 1000)) + np.array([[4.0], [0], [0], [0]])
    halves = split(draws)
    plain = np.sqrt(1 + halves.mean(1).var(ddof=1) / halves.var(1, ddof=1).mean())
    assert plain < 1.01 < 1.1 < r_hat(draws)


def test_standard_errors_are_the_spread_over_repetitions():
    """400 autoregressions of 4 x 250 draws: mean and deviation scatter as the MCSE says.

    The spread over 400 repetitions is itself known to 1 / sqrt(800) = 3.5%, and the MCSE is biased
    by under 10% at this length; 25% is four of those deviations beyond the bias (rate 1e-4).
    """
    rng = np.random.default_rng(5)
    noise = rng.normal(size=(400, 4, 250))
    for t in range(1, 250):
        noise[:, :, t] += 0.6 * noise[:, :, t - 1]
    for error, statistic in ((mcse_mean, np.mean), (mcse_deviation, np.std)):
        spread = np.std([statistic(draws) for draws in noise])
        typical = np.median([error(draws) for draws in noise])
        assert abs(typical / spread - 1) < 0.25


def test_entrywise_keeps_the_shape():
    draws = np.random.default_rng(6).normal(size=(2, 50, 3, 2))
    values = entrywise(ess_bulk, draws)
    assert values.shape == (3, 2)
    assert values[2, 1] == ess_bulk(draws[:, :, 2, 1])
    assert entrywise(ess_bulk, draws[..., 0, 0]).shape == ()


def test_complaints_name_what_is_wrong():
    """Good chains pass; a constant one, a shifted one, divergences and stuck energies do not."""
    rng = np.random.default_rng(7)
    good, energy = rng.normal(size=(4, 1000)), rng.normal(size=(4, 1000))
    quiet = np.zeros((4, 1000), bool)
    assert complaints({"good": good}, energy, quiet) == []
    shifted = good + np.array([[1.0], [0], [0], [0]])
    found = complaints({"good": good, "stuck": 0 * good, "shifted": shifted})
    assert [sentence.split(":")[0] for sentence in found] == ["stuck", "shifted", "shifted"]
    divergent = quiet.copy()
    divergent[1, :7] = True
    found = complaints({"good": good}, energy.cumsum(axis=1), divergent)
    assert [s.split(" ")[0] for s in found] == ["E-BFMI", "7"]


@pytest.mark.parametrize("diagnostic", [r_hat, ess_bulk, ess_tail, ess_mean, mcse_mean, e_bfmi])
def test_too_few_draws_are_refused(diagnostic):
    with pytest.raises(ValueError, match=r"needs . chains of 4 draws at least, got 2 of 3"):
        diagnostic(np.zeros((2, 3)))


def test_one_chain_has_no_r_hat():
    with pytest.raises(ValueError, match="needs 2 chains"):
        r_hat(np.zeros((1, 100)))
