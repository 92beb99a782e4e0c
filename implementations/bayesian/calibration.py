"""Calibration: is it the posterior that the sampler draws from? Two tests that need no reference.

    θ ~ p(θ),   y ~ p(y | θ)        then θ is one exact draw from the posterior p(θ | y)

*Simulation-based calibration.* So θ must be one among the sampler's draws: the number of draws
below it, its rank, is uniform on 0 ... draws. The chain starts at θ itself, and θ stands at a
random place in it: a reversible sampler runs as well backward, so the chain is stationary and the
ranks are uniform exactly, without warm-up and however slowly the chain moves (Besag & Clifford).

*Geweke's joint test.* Alternate y ~ p(y | θ) and θ ~ sampler(θ | y). Whatever the number of rounds,
θ and y keep their joint distribution; an error in the sampler, or in the density, grows by rounds.
It is looked at after the sampler's half: new data would agree with any θ.

Each quantity is judged twice by Kolmogorov and Smirnov's test: as it is, which sees a shift, and
folded about the middle, which sees a wrong width.

Paper   Talts et al. 2018, arXiv:1804.06788; Modrák et al. 2023, arXiv:2211.02383 (the log-density
        as a quantity); Besag & Clifford 1989, doi:10.1093/biomet/76.4.633; Geweke 2004,
        doi:10.1198/016214504000001132
Shapes  position [dim]    ranks, values [replication, quantity]: dim entries and the log-density
Run     uv run python implementations/bayesian/calibration.py
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from scipy.stats import ks_2samp, kstest

from implementations.bayesian.integrators import LogDensity

Move = Callable[[PRNGKeyArray, Float[Array, " dim"], LogDensity], Float[Array, " dim"]]
"""one step of a reversible sampler: a key, where it stands and the density give where it goes"""


class Model(NamedTuple):
    """A prior and a likelihood, to draw from and to evaluate."""

    draw_parameters: Callable[[PRNGKeyArray], Float[Array, " dim"]]
    """free numbers from the prior"""
    draw_data: Callable[[PRNGKeyArray, Float[Array, " dim"]], Any]
    """data from the likelihood at these free numbers"""
    log_joint: Callable[[Float[Array, " dim"], Any], Float[Array, ""]]
    """log p(free numbers, data), change of variables included; the claim that is on trial"""


def sbc_ranks(
    key: PRNGKeyArray,
    model: Model,
    move: Move,
    *,
    draws: int = 31,
    thin: int = 1,
    replications: int = 20_000,
    batch: int = 2_000,
) -> Int[np.ndarray, "replication quantity"]:
    """How many of the sampler's draws lie below the truth, for each quantity.

    Args:
        draws: of each chain; ranks are 0 to `draws`.
        thin: sampler steps from one draw to the next; more, and errors show in fewer replications.
        replications: independent truths, each with data and a chain of its own.
        batch: how many are computed side by side.

    Raises:
        ValueError: a number is not positive.
    """
    require_positive(draws=draws, thin=thin, replications=replications, batch=batch)

    def replicate(key: PRNGKeyArray) -> Int[Array, " quantity"]:
        truth_key, data_key, place_key, chain_key, tie_key = jax.random.split(key, 5)
        truth = model.draw_parameters(truth_key)
        data = model.draw_data(data_key, truth)
        place = jax.random.randint(place_key, (), 0, draws + 1)

        def advance(position, step):
            number, key = step
            # Draws 0 to place - 1 run from the truth into its past, the others into its future.
            start = jnp.where(number == place, truth, position)
            position = run(key, model, move, start, data, thin)
            # A chain that stays must repeat the value to the last bit: another program rounds anew.
            stays = (position == truth).all()
            values = jnp.where(stays, true_values, quantities(model, position, data))
            return position, values

        true_values = quantities(model, truth, data)
        steps = jnp.arange(draws), jax.random.split(chain_key, draws)
        _, values = jax.lax.scan(advance, truth, steps)
        ties = jnp.sum(values == true_values, axis=0)  # the truth is any of its equals
        among = jax.random.randint(tie_key, ties.shape, 0, ties + 1)
        return jnp.sum(values < true_values, axis=0) + among

    return in_batches(replicate, key, replications, batch)


def geweke_values(
    key: PRNGKeyArray,
    model: Model,
    move: Move,
    *,
    rounds: int = 20,
    thin: int = 1,
    replications: int = 20_000,
    batch: int = 2_000,
) -> Float[np.ndarray, "replication quantity"]:
    """Quantities after so many rounds of new data and sampler; 0 rounds draw the joint itself.

    Raises:
        ValueError: a number is not positive, or the rounds are negative.
    """
    require_positive(rounds=rounds + 1, thin=thin, replications=replications, batch=batch)

    def replicate(key: PRNGKeyArray) -> Float[Array, " quantity"]:
        truth_key, data_key, rounds_key = jax.random.split(key, 3)
        position = model.draw_parameters(truth_key)
        data = model.draw_data(data_key, position)

        def alternate(joint, key):
            data_key, move_key = jax.random.split(key)
            data = model.draw_data(data_key, joint[0])
            return (run(move_key, model, move, joint[0], data, thin), data), None

        keys = jax.random.split(rounds_key, rounds)
        joint, _ = jax.lax.scan(alternate, (position, data), keys)
        return quantities(model, *joint)

    return in_batches(replicate, key, replications, batch)


def quantities(
    model: Model, position: Float[Array, " dim"], data: Any
) -> Float[Array, " quantity"]:
    """Every free number, and the log-density: it alone sees whether the data are used."""
    return jnp.append(position, model.log_joint(position, data))


def run(key, model: Model, move: Move, position, data, steps: int) -> Float[Array, " dim"]:
    """So many steps of the sampler on the posterior of these data."""

    def advance(position, key):
        return move(key, position, lambda x: model.log_joint(x, data)), None

    return jax.lax.scan(advance, position, jax.random.split(key, steps))[0]


def in_batches(function: Callable, key, replications: int, batch: int) -> np.ndarray:
    """The function of so many keys, a batch side by side at a time."""
    keys = jax.random.split(key, replications)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(function, keys, batch_size=batch))(keys))


def require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"calibration needs {name} >= 1, got {number}")


def rank_p_values(
    ranks: Int[np.ndarray, "replication quantity"], draws: int, seed: int = 0
) -> Float[np.ndarray, "2 quantity"]:
    """Of each quantity: are its ranks uniform on 0 ... draws, and so folded about the middle?

    A uniform number is added to each rank, so that the continuous test is exact.
    """
    jitter = np.random.default_rng(seed).uniform(size=ranks.shape)
    uniform = (ranks + jitter) / (draws + 1)
    return np.array(
        [
            [kstest(column, "uniform").pvalue for column in values.T]
            for values in (uniform, np.abs(2 * uniform - 1))
        ]
    )


def joint_p_values(
    values: Float[np.ndarray, "replication quantity"],
    fresh: Float[np.ndarray, "other quantity"],
) -> Float[np.ndarray, "2 quantity"]:
    """Of each quantity: is it distributed as in fresh draws, and so folded about their median?"""
    middle = np.median(fresh, axis=0)
    pairs = ((values, fresh), (np.abs(values - middle), np.abs(fresh - middle)))
    return np.array(
        [
            [ks_2samp(*columns).pvalue for columns in zip(mine.T, theirs.T, strict=True)]
            for mine, theirs in pairs
        ]
    )


def calibrated(p_values: Float[np.ndarray, "2 quantity"], false_alarms: float = 1e-3) -> bool:
    """Whether no p-value is below its share of the rate of false alarms (Bonferroni)."""
    return bool(p_values.min() >= false_alarms / p_values.size)


def main() -> None:
    from implementations.bayesian.calibration_models import line
    from implementations.bayesian.nuts import init, step

    def move(key, position, log_density):
        state = init(position, log_density)
        return step(key, state, log_density, 0.3, jnp.ones(len(position)))[0].position

    print("a straight line with unknown noise, NUTS, 2,000 replications; smallest p-values")
    for name, precision in {"as it should be": 1.0, "precision wrong by 20%": 1.2}.items():
        model = line(precision)
        ranks = sbc_ranks(jax.random.key(0), model, move, replications=2_000)
        values, fresh = (
            geweke_values(jax.random.key(seed), model, move, rounds=rounds, replications=2_000)
            for seed, rounds in ((1, 20), (2, 0))
        )
        p_ranks, p_joint = rank_p_values(ranks, 31).min(), joint_p_values(values, fresh).min()
        print(f"  {name:24} ranks {p_ranks:.1e}   Geweke {p_joint:.1e}")


if __name__ == "__main__":
    main()
