"""HMC in NumPy: the whole algorithm in one function, for reading.

    p ~ N(0, 1)      leapfrog from (q, p) to (q', p')      accept q' if u < exp(H(q, p) - H(q', p'))

Paper   Neal 2011, arXiv:1206.1901, figure 2
Fast    hmc.py: the same step in JAX, for any metric and integrator
Run     uv run python implementations/bayesian/hmc_numpy.py
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Vector = Float[np.ndarray, " dim"]


def step(
    momentum: Vector,
    uniform: float,
    position: Vector,
    log_density: Callable[[Vector], float],
    gradient: Callable[[Vector], Vector],
    step_size: float,
    steps: int,
) -> tuple[Vector, float]:
    """The next position, and the probability with which the flight was accepted."""
    new, thrown = position, momentum
    thrown = thrown + step_size / 2 * gradient(new)
    for i in range(steps):
        new = new + step_size * thrown
        last = i == steps - 1
        thrown = thrown + step_size / (2 if last else 1) * gradient(new)
    before = -log_density(position) + momentum @ momentum / 2
    after = -log_density(new) + thrown @ thrown / 2
    acceptance = min(1.0, np.exp(min(0.0, before - after)))
    return (new if uniform < acceptance else position), float(acceptance)


def main() -> None:
    rng = np.random.default_rng(0)
    position, draws, rates = np.zeros(2), [], []
    for _ in range(5000):
        momentum, uniform = rng.standard_normal(2), rng.uniform()
        position, rate = step(
            momentum, uniform, position, lambda q: -q @ q / 2, lambda q: -q, 0.5, 3
        )
        draws.append(position)
        rates.append(rate)
    print(f"a standard normal: means {np.mean(draws, 0).round(2)}, variances ", end="")
    print(f"{np.var(draws, 0).round(2)}, acceptance {np.mean(rates):.2f}")


if __name__ == "__main__":
    main()
