"""Diagnostics: have the chains forgotten where they began, and what are their draws worth?

    R-hat = sqrt((n - 1) / n + B / (n W))                     B, W: variance between, within chains
    ESS   = all draws / (1 + 2 (ρ_1 + ρ_2 + ...))             ρ_t: autocorrelation over all chains
    MCSE  = deviation / sqrt(ESS)                             the standard error of a mean

Each chain is split in two, so that a chain which drifts disagrees with itself. R-hat and bulk ESS
look at ranks made normal, which exist where variances do not; R-hat also at distances from the
median, or chains of different width would pass. Tail ESS is the worse of the 5% and 95% quantiles.
The sum of ρ stops where a pair ρ_2k + ρ_2k+1, which is never negative for a reversible chain, is
noise.

Paper   Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021, arXiv:1903.08008
        pairs: Geyer 1992, doi:10.1214/ss/1177011137    E-BFMI: Betancourt 2016, arXiv:1604.00695
Shapes  draws [chain, draw] of one quantity; `entrywise` for [chain, draw, ...]
Run     uv run python implementations/bayesian/diagnostics.py
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import ndtri

Draws = Float[np.ndarray, "chain draw"]

R_HAT_LIMIT, ESS_PER_CHAIN, BFMI_LIMIT = 1.01, 100, 0.3
"""Vehtari et al. 2021, section 4, and Betancourt 2016, section 4"""


def r_hat(draws: Draws) -> float:
    """Rank-normalised split R-hat, the larger of bulk and folded (section 4.1); 1 is perfect.

    NaN for constant chains and where a draw is NaN.

    Raises:
        ValueError: fewer than two chains or four draws.
    """
    if not enough(draws, chains=2):
        return np.nan
    halves = split(draws)
    folded = np.abs(halves - np.median(halves))
    # Where folding leaves a constant (draws of two values) only the bulk can be judged.
    return float(np.fmax(plain_r_hat(normal_scores(halves)), plain_r_hat(normal_scores(folded))))


def ess_bulk(draws: Draws) -> float:
    """Effective sample size of the middle of the distribution; constant chains count in full.

    NaN where a draw is NaN.

    Raises:
        ValueError: fewer than four draws a chain.
    """
    return plain_ess(normal_scores(split(draws))) if enough(draws) else np.nan


def ess_tail(draws: Draws) -> float:
    """Effective sample size of the 5% or the 95% quantile, whichever is less.

    Raises:
        ValueError: as `ess_bulk`.
    """
    if not enough(draws):
        return np.nan
    below = [draws <= quantile for quantile in np.quantile(draws, [0.05, 0.95])]
    return min(plain_ess(split(indicator.astype(float))) for indicator in below)


def ess_mean(draws: Draws) -> float:
    """Effective sample size for the mean of the draws as they are.

    Raises:
        ValueError: as `ess_bulk`.
    """
    return plain_ess(split(draws)) if enough(draws) else np.nan


def mcse_mean(draws: Draws) -> float:
    """Monte Carlo standard error of the mean.

    Raises:
        ValueError: as `ess_bulk`.
    """
    return float(np.std(draws, ddof=1) / np.sqrt(ess_mean(draws)))


def mcse_deviation(draws: Draws) -> float:
    """Monte Carlo standard error of the standard deviation, by the delta method.

    Raises:
        ValueError: as `ess_bulk`.
    """
    squares = (draws - draws.mean()) ** 2
    with np.errstate(invalid="ignore"):  # a constant has no spread to be wrong about
        return float(np.sqrt(squares.var() / ess_mean(squares) / squares.mean()) / 2)


def e_bfmi(energy: Draws) -> Float[np.ndarray, " chain"]:
    """How far a fresh momentum moves the energy, by how far the energy ranges; low is bad.

    Raises:
        ValueError: as `ess_bulk`.
    """
    enough(energy)
    with np.errstate(invalid="ignore"):
        return (np.diff(energy, axis=1) ** 2).mean(axis=1) / energy.var(axis=1, ddof=1)


def enough(draws: Draws, chains: int = 1) -> bool:
    """Whether there is something to compute: no draw is NaN."""
    if draws.shape[0] < chains or draws.shape[1] < 4:
        raise ValueError(
            f"this diagnostic needs {chains} chains of 4 draws at least, "
            f"got {draws.shape[0]} of {draws.shape[1]}"
        )
    return not np.isnan(draws).any()


def split(draws: Draws) -> Float[np.ndarray, "half_chain half_draw"]:
    """First and second halves as chains of their own; of an odd number the middle draw is lost."""
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, -half:]])


def normal_scores(draws: Draws) -> Draws:
    """Φ⁻¹((rank - 3/8) / (count + 1/4)), equal draws sharing their mean rank (equation 14)."""
    _, place, count = np.unique(draws, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place].reshape(draws.shape)
    return ndtri((rank - 3 / 8) / (draws.size + 1 / 4))


def plain_r_hat(draws: Draws) -> float:
    """Gelman & Rubin's comparison of chains (equations 1 to 4)."""
    length = draws.shape[1]
    within = draws.var(axis=1, ddof=1).mean()
    between = length * draws.mean(axis=1).var(ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):  # constant chains: 0 / 0, or x / 0
        return float(np.sqrt((between / within + length - 1) / length))


def plain_ess(draws: Draws) -> float:
    """Draws over autocorrelation time (equations 10 to 13), which is at least 1 / log10(draws)."""
    if np.ptp(draws) < np.finfo(float).resolution:
        return float(draws.size)
    chains, length = draws.shape
    covariance = autocovariance(draws).mean(axis=0)
    within = covariance[0] * length / (length - 1)
    between = draws.mean(axis=1).var(ddof=1) if chains > 1 else 0.0
    correlation = 1 - (within - covariance) / (covariance[0] + between)
    correlation[0] = 1.0
    usable = 2 * max((length - 3) // 2, 0) + 2
    pairs = correlation[:usable].reshape(-1, 2).sum(axis=1)
    noise = np.flatnonzero(pairs <= 0)
    last = noise[0] if len(noise) else len(pairs) - 1
    # The even term of the pair that stops the sum still lowers the variance of chains that swing.
    even = correlation[2 * last] if pairs[last] >= 0 else max(correlation[2 * last], 0.0)
    time = -1 + 2 * np.minimum.accumulate(pairs[:last]).sum() + even
    return float(draws.size / max(time, 1 / np.log10(draws.size)))


def autocovariance(draws: Draws) -> Draws:
    """Of each chain at every lag, over the chain's length, by the fast Fourier transform."""
    length = draws.shape[1]
    spectrum = np.fft.rfft(draws - draws.mean(axis=1, keepdims=True), n=2 * length)
    return np.fft.irfft(np.abs(spectrum) ** 2, n=2 * length)[:, :length] / length


def entrywise(
    diagnostic: Callable[[Draws], float], draws: Float[np.ndarray, "chain draw *shape"]
) -> Float[np.ndarray, "*shape"]:
    """A diagnostic of every entry of an array of draws."""
    columns = draws.reshape(*draws.shape[:2], -1)
    values = [diagnostic(columns[..., entry]) for entry in range(columns.shape[2])]
    return np.array(values).reshape(draws.shape[2:])


def complaints(
    draws: Mapping[str, Float[np.ndarray, "chain draw ..."]],
    energy: Draws | None = None,
    divergent: Bool[np.ndarray, "chain draw"] | None = None,
) -> list[str]:
    """A sentence for all that forbids trusting the draws; silence does not prove them good.

    Args:
        draws: of each quantity, by name.
        energy: of each step, if the sampler has one.
        divergent: whether a step left its energy surface.
    """
    found = []
    for name, values in draws.items():
        values = values.astype(float)
        worst = entrywise(r_hat, values).max()
        fewest = min(entrywise(ess, values).min() for ess in (ess_bulk, ess_tail))
        if not worst <= R_HAT_LIMIT:
            found.append(f"{name}: R-hat is {worst:.3f}, over {R_HAT_LIMIT}")
        if not fewest >= ESS_PER_CHAIN * len(values):
            found.append(f"{name}: {fewest:.0f} effective draws, under {ESS_PER_CHAIN} a chain")
    if energy is not None and not (lowest := e_bfmi(energy).min()) >= BFMI_LIMIT:
        found.append(f"E-BFMI is {lowest:.2f}, under {BFMI_LIMIT}: momenta hardly move the energy")
    if divergent is not None and divergent.any():
        found.append(f"{divergent.sum()} of {divergent.size} steps diverged")
    return found


def main() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4, 2000))
    slow = np.copy(noise)
    for t in range(1, 2000):
        slow[:, t] = 0.9 * slow[:, t - 1] + noise[:, t]
    print("4 chains of 2000 draws                R-hat   bulk ESS   tail ESS")
    for name, draws in {
        "independent": noise,
        "each 0.9 of the one before": slow,  # its ESS: 8000 (1 - 0.9) / (1 + 0.9) = 421
        "one chain shifted by 1": noise + np.array([[1.0], [0], [0], [0]]),
        "one chain 3 times as wide": noise * np.array([[3.0], [1], [1], [1]]),
    }.items():
        print(f"  {name:32} {r_hat(draws):8.3f} {ess_bulk(draws):10.0f} {ess_tail(draws):10.0f}")


if __name__ == "__main__":
    main()
