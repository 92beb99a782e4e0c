"""Sampling: a log-density of named parameters in, draws and their statistics out.

    sample(key, log_density, {"mean": 0.0, "spread": 1.0}) -> ArviZ InferenceData

The parameters are laid out in one flat vector, on which every sampler works. What cannot be sampled
is said before: a start with no density, integers, a log-density that is no number. What went wrong
is said after, by the parameter's name: a chain that never moved, chains that disagree, a parameter
that the log-density does not look at.

Paper   Vehtari et al. 2021, arXiv:1903.08008 (R-hat)
Run     uv run python implementations/bayesian/sampling.py
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from tqdm import tqdm

from implementations.bayesian.chains import PROGRESS, Draws, run_chains
from implementations.bayesian.diagnostics import entrywise, r_hat
from implementations.bayesian.integrators import LogDensity

Named = dict[str, np.ndarray]

STATISTICS = {
    "acceptance": "acceptance_rate",
    "divergent": "diverging",
    "depth": "tree_depth",
    "steps": "n_steps",
}
"""ArviZ's names for fields of Info that have others here"""

DISAGREE = 1.1
"""R-hat over which a run warns: where the papers would not even look at the draws"""


def sample(
    key: PRNGKeyArray,
    log_density: Callable[[Any], Float[Array, ""]],
    initial: PyTree,
    *,
    chains: int = 4,
    warm_up: int = 1000,
    draws: int = 1000,
    jitter: float = 0.0,
    progress: bool = False,
    **settings: Any,
):
    """Tune, draw, and hand the draws over as ArviZ's InferenceData.

    Args:
        log_density: of what `initial` is, up to a constant.
        initial: where every chain starts: named parameters in a dict, or a flat vector ("x").
        chains: how many; a multiple of the devices keeps all of them busy.
        jitter: standard deviation of normal noise on each chain's start.
        progress: show a bar.
        settings: init and step of another sampler than NUTS (`functools.partial` sets its own
            arguments), the target acceptance, the metric ("diagonal", "dense" or "fisher") and the
            first step_size, as in `run_chain`.

    Raises:
        ValueError: no chain or draw is asked for, there is nothing to sample, a parameter is not of
            floats, or the log-density is no scalar, or not finite at the start.

    Warns:
        UserWarning: steps diverged, chains disagree, a parameter stood still, or the log-density
            does not change with it.
    """
    if chains < 1 or draws < 1 or warm_up < 0:
        counts = f"{chains} chains, {warm_up} warm-up steps and {draws} draws"
        raise ValueError(f"sampling needs a chain, a draw and no negative warm-up, got {counts}")
    initial = jax.tree.map(jnp.asarray, initial)
    check_parameters(initial)
    start, unravel = ravel_pytree(initial)
    leaves, structure = jax.tree.flatten(initial)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    flat = flat_log_density(log_density, structure, shapes)
    check_start(flat, start, unravel)
    key, noise_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (chains, len(start)), start.dtype)
    settings = {**settings, "warm_up": warm_up, "draws": draws, "progress": progress}
    with bar(chains * (warm_up + draws), progress):
        raw = jax.block_until_ready(run_chains(key, start + jitter * noise, flat, **settings))
    posterior = named(jax.vmap(jax.vmap(unravel))(raw.position))
    slopes = named(jax.vmap(lambda x: unravel(jax.grad(flat)(x)))(raw.position[:, -1]))
    for sentence in complaints(posterior, slopes, raw):
        warnings.warn(sentence, stacklevel=2)
    return inference_data(posterior, raw)


@lru_cache(maxsize=64)  # the same function again, or every run would compile anew
def flat_log_density(log_density: Callable, structure: Any, shapes: tuple) -> LogDensity:
    """The log-density as a function of the flat vector."""
    zeros = [jnp.zeros(shape, dtype) for shape, dtype in shapes]
    _, unravel = ravel_pytree(jax.tree.unflatten(structure, zeros))
    return lambda position: log_density(unravel(position))


def named(parameters: PyTree) -> Named:
    """The leaves of a pytree by name: mean, effect.raw; a bare array is x."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".") or "x"  # noqa: E731
    return {name(path): np.asarray(leaf) for path, leaf in leaves}


def check_parameters(initial: PyTree) -> None:
    """Raise ValueError unless there are numbers, all of them finite floats."""
    parameters = named(initial)
    if not sum(value.size for value in parameters.values()):
        raise ValueError("there is nothing to sample: the parameters hold no number")
    for name, value in parameters.items():
        if not np.issubdtype(value.dtype, np.floating):
            raise ValueError(f"only floats can be sampled, but {name} is of {value.dtype}")
        if not np.isfinite(value).all():
            raise ValueError(f"the start must be finite, but {name} is {value}")


def check_start(flat: LogDensity, start: Float[Array, " dim"], unravel: Callable) -> None:
    """Raise ValueError unless the log-density is one number, finite with its gradient."""
    shape = jax.eval_shape(flat, start)
    if not isinstance(shape, jax.ShapeDtypeStruct) or shape.shape != ():
        raise ValueError(f"a log-density is one number, got {shape}")
    if not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ValueError(f"a log-density is a float, got {shape.dtype}")
    value, gradient = jax.value_and_grad(flat)(start)
    broken = [
        name for name, slope in named(unravel(gradient)).items() if not np.isfinite(slope).all()
    ]
    if not jnp.isfinite(value) or broken:
        where = f"; its gradient is not finite in {', '.join(broken)}" if broken else ""
        raise ValueError(f"the log-density is {value} at the start{where}")


@contextmanager
def bar(total: int, shown: bool) -> Iterator[None]:
    """A bar for the steps that compiled chains report."""
    if not shown:
        yield
        return
    with tqdm(total=total, unit="step") as PROGRESS.bar:
        try:
            yield
            jax.effects_barrier()  # the last reports arrive
        finally:
            PROGRESS.bar = None


def complaints(posterior: Named, slopes: Named, raw: Draws) -> list[str]:
    """A sentence for each parameter that cannot be trusted, and one for divergences."""
    found = []
    for name, draws in posterior.items():
        if (draws == draws[:, :1]).all(1).any() and draws.shape[1] > 1:
            found.append(f"{name} stood still in a chain: no step was accepted")
        elif (slopes[name] == 0).all(0).any():
            found.append(
                f"the log-density does not change with {name}: it is improper, or in steps"
            )
        elif len(draws) > 1 and draws.shape[1] >= 4 and draws.size:
            worst = entrywise(r_hat, draws.astype(float)).max()
            if not worst <= DISAGREE:
                found.append(f"{name}: R-hat is {worst:.2f}, the chains disagree")
    divergent = getattr(raw.info, "divergent", np.zeros(1))
    if divergent.any():
        found.append(f"{divergent.sum()} of {divergent.size} steps diverged after the warm-up")
    return found


def inference_data(posterior: Named, raw: Draws):
    """ArviZ's InferenceData, with its names for the statistics."""
    with warnings.catch_warnings():  # a notice about its next version, once a day
        warnings.simplefilter("ignore", FutureWarning)
        import arviz

    fields = raw.info._asdict().items()
    statistics = {STATISTICS.get(name, name): np.asarray(values) for name, values in fields}
    shape = raw.position.shape[:2]
    statistics["step_size"] = np.broadcast_to(np.asarray(raw.step_size)[:, None], shape)
    return arviz.from_dict(posterior=posterior, sample_stats=statistics)


def main() -> None:
    from implementations.lab.host_devices import use_host_devices

    use_host_devices(2)
    points = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def log_density(unknown):
        spread = jnp.exp(unknown["log_spread"])
        effect = unknown["mean"] + spread * unknown["raw"]
        prior = -((unknown["mean"] / 5) ** 2) / 2 - (unknown["raw"] ** 2).sum() / 2
        prior += unknown["log_spread"] - jnp.log1p((spread / 5) ** 2)
        return prior - (((points - effect) / errors) ** 2).sum() / 2

    initial = {"mean": 0.0, "log_spread": 0.0, "raw": jnp.zeros(8)}
    data = sample(jax.random.key(0), log_density, initial, progress=True)
    print("eight schools, 4 chains of 1000 draws")
    for name in initial:
        draws = data.posterior[name].values
        print(f"  {name:11} mean {draws.mean():6.2f}   R-hat {entrywise(r_hat, draws).max():.3f}")
    depth, diverging = data.sample_stats.tree_depth, data.sample_stats.diverging
    print(f"  trees of depth {float(depth.mean()):.1f}, {int(diverging.sum())} divergences")


if __name__ == "__main__":
    main()
