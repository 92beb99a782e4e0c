"""A NumPyro model, sampled by our samplers: NumPyro's own potential is the log-density.

    log density(free parameters) = -potential(free parameters)

NumPyro moves every constrained parameter to the whole line and adds the log-determinant; its
`postprocess` brings the draws back and computes what the model calls deterministic.

Paper   Phan, Pradhan & Jankowiak 2019, arXiv:1912.11554
Run     uv run python implementations/bayesian/numpyro_model.py
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpyro
import numpyro.distributions as dist
from jaxtyping import PRNGKeyArray
from numpyro.infer import init_to_median
from numpyro.infer.util import initialize_model


class Model(NamedTuple):
    """What `sample` takes, and the way back."""

    log_density: Callable[[dict], Any]
    """of the free parameters"""
    initial: dict
    """free parameters at the prior's medians"""
    constrained: Callable[[dict], dict]
    """one draw of free parameters as the model's own, deterministic ones included"""


def from_numpyro(key: PRNGKeyArray, model: Callable, *arguments: Any, **named: Any) -> Model:
    """The log-density of a NumPyro model given its arguments, observed data among them.

    Raises:
        ValueError: the model has no free parameter that is continuous.
    """
    found = initialize_model(
        key, model, model_args=arguments, model_kwargs=named, init_strategy=init_to_median
    )
    if not found.param_info.z:
        raise ValueError("the model has no continuous parameter to sample")
    potential = found.potential_fn
    return Model(lambda free: -potential(free), found.param_info.z, found.postprocess_fn)


def main() -> None:
    from implementations.bayesian.sampling import sample
    from implementations.lab.host_devices import use_host_devices

    use_host_devices(2)

    def coin(heads):
        fairness = numpyro.sample("fairness", dist.Beta(2, 2))
        numpyro.sample("heads", dist.Binomial(10, fairness), obs=heads)

    model = from_numpyro(jax.random.key(0), coin, 9)
    data = sample(jax.random.key(1), model.log_density, model.initial)
    free = {name: data.posterior[name].values for name in model.initial}
    fairness = jax.vmap(jax.vmap(model.constrained))(free)["fairness"]
    print("9 heads of 10, prior Beta(2, 2): the posterior is Beta(11, 3)")
    print(f"  mean {fairness.mean():.3f}, exactly {11 / 14:.3f}")
    exact = (11 * 3 / (14**2 * 15)) ** 0.5
    print(f"  standard deviation {fairness.std():.3f}, exactly {exact:.3f}")


if __name__ == "__main__":
    main()
