"""The gradient of an expectation over samples: through the sample, or by its score.

    d/dmean E f(z),   z ~ N(mean, deviation²)

    reparameterized   df/dz at z = mean + deviation · noise           f must be differentiable
    score function    (f(z) - baseline) · noise / deviation           f may be anything

Both are unbiased for any baseline that does not depend on the noise of its own sample, because the
score noise/deviation has mean zero. The first knows the slope of f. The second sees only values,
and has to find the slope from how they differ: it pays with variance, which grows with the number
of coordinates, since each of them moves f for all the others.

Paper   score function: Williams 1992, doi:10.1007/BF00992696
        reparameterized: Kingma & Welling 2013, arXiv:1312.6114
        leave one out: Kool et al. 2019, https://openreview.net/forum?id=r1lgTGL5DE
Shapes  noise and gradients [sample, latent]    f [sample, latent] -> [sample]
Run     uv run python implementations/generative/gradient_estimators.py
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from implementations.generative.diagonal_gaussian import DiagonalGaussian

Function = Callable[[Float[Tensor, "sample latent"]], Float[Tensor, "sample"]]


def reparameterized_gradients(
    function: Function, q: DiagonalGaussian, noise: Float[Tensor, "sample latent"]
) -> Float[Tensor, "sample latent"]:
    """df/dz at every sample: one unbiased gradient for the mean of q from each."""
    z = q.at(noise).detach().requires_grad_()
    (gradients,) = torch.autograd.grad(function(z).sum(), z)
    return gradients


def score_function_gradients(
    function: Function,
    q: DiagonalGaussian,
    noise: Float[Tensor, "sample latent"],
    baseline: float = 0.0,
) -> Float[Tensor, "sample latent"]:
    """(f(z) - baseline) · d log q(z) / dmean at every sample; f is never differentiated."""
    with torch.no_grad():
        return (function(q.at(noise)) - baseline)[:, None] * noise / q.deviation


def leave_one_out_gradients(
    function: Function, q: DiagonalGaussian, noise: Float[Tensor, "sample latent"]
) -> Float[Tensor, "sample latent"]:
    """The score function with the mean of the other samples as each one's baseline.

    Their average is unbiased, but they are not independent of one another.

    Raises:
        ValueError: there are fewer than two samples.
    """
    samples = len(noise)
    if samples < 2:
        raise ValueError(f"leaving one out needs at least two samples, got {samples}")
    with torch.no_grad():
        values = function(q.at(noise))
        # f_i minus the mean of the others is n / (n - 1) times f_i minus the mean of all.
        centred = (values - values.mean()) * samples / (samples - 1)
        return centred[:, None] * noise / q.deviation


def variances_of_a_parabola(latent: int) -> dict[str, float]:
    """Variance of one coordinate's gradient for f(z) = ½ |z|², q = N(0, I), in closed form.

    From E S² noise₁² = (latent + 2)(latent + 4) and E S noise₁² = latent + 2, S being |noise|².
    """
    return {
        "reparameterized": 1.0,
        "score function": (latent + 2) * (latent + 4) / 4,
        "its mean as baseline": (latent + 4) / 2,
        "best baseline": (latent + 2) / 2,
    }


def main() -> None:
    torch.manual_seed(0)
    parabola = lambda z: z.square().sum(-1) / 2  # noqa: E731
    print("variance of a gradient of E ½|z|²   measured   theory")
    for latent in (1, 10, 100):
        q = DiagonalGaussian(torch.zeros(latent), torch.zeros(latent))
        noise, mean = torch.randn(100_000, latent), latent / 2
        theory = variances_of_a_parabola(latent)
        for (name, expected), gradients in zip(
            theory.items(),
            (
                reparameterized_gradients(parabola, q, noise),
                score_function_gradients(parabola, q, noise),
                score_function_gradients(parabola, q, noise, mean),
                score_function_gradients(parabola, q, noise, mean + 1),
            ),
            strict=True,
        ):
            seen = gradients.var(0).mean()
            print(f"  {latent:3} coordinates, {name:21}{seen:9.2f} {expected:8.2f}")


if __name__ == "__main__":
    main()
