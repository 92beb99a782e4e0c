"""A network that denoises: what goes in, what comes out, and how it is trained and asked.

    x' = x / sqrt(alpha² + sigma²)           every schedule on one circle
    answer = network(x', position, label)    position = 2/pi · angle of noise on the circle, 0 to 1
    D = the data that x' and the answer amount to (diffusion.py's table)
    loss = mean squared error of the answer's target

Pixels are scaled to [-1, 1]: noise has variance one, and data must be of its size. A guess of the
data outside of [-1, 1] is cut off while sampling.

Paper   Ho et al. 2020, arXiv:2006.11239, section 3.3; Karras et al. 2022, arXiv:2206.00364, section
        5 (the network should not see the schedule)
Shapes  x, pixels [batch, channel, row, column]    alpha, sigma, labels [batch]
Run     uv run python implementations/generative/denoiser.py
"""

import math

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from implementations.generative.diffusion import Parts, loss_ratio, noised, parts_of, target
from implementations.generative.guidance import guided
from implementations.generative.samplers import Denoise, Sampler, sample
from implementations.generative.schedules import Level, Schedule

Pictures = Float[Tensor, "batch channel row column"]
Numbers = Float[Tensor, " batch"]
QUIETEST, NOISIEST = 12.0, -12.0  # log SNR between which a network is trained and asked


def to_signed(levels: UInt8[Tensor, "*shape"], count: int) -> Float[Tensor, "*shape"]:
    """Whole levels 0 ... count - 1 as numbers from -1 to 1."""
    return levels.float() * (2 / (count - 1)) - 1


def to_unit(pixels: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Numbers from -1 to 1 as 0 to 1, what lies outside cut off."""
    return ((pixels + 1) / 2).clamp(0, 1)


def dequantized(
    pixels: Float[Tensor, "*shape"], levels: int, uniform: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Signed whole levels with noise in [0, 1) added to each, over [-1, 1] evenly."""
    whole = ((pixels + 1) / 2 * (levels - 1)).round()
    return 2 * (whole + uniform) / levels - 1


class Denoiser(nn.Module):
    """A network and the meaning of its answer.

    Args:
        network: network(x, position, labels), as large as x.
        kind: its answer's target, one of diffusion.py's.
    """

    def __init__(self, network: nn.Module, kind: str):
        super().__init__()
        self.network, self.kind = network, kind

    @property
    def classes(self) -> int:
        """How many labels it knows."""
        return self.network.config.classes

    def forward(
        self,
        x: Pictures,
        alpha: Numbers,
        sigma: Numbers,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Pictures, Parts]:
        """The network's answer, and the data and noise that it amounts to."""
        size = (alpha.square() + sigma.square()).sqrt()
        angle = torch.atan2(sigma, alpha) * (2 / math.pi)
        x = x / spread(size, x)
        answer = self.network(x, angle, labels).to(x.dtype)
        place = (spread(alpha / size, x), spread(sigma / size, x))
        return answer, parts_of(self.kind, answer, x, *place)


def spread(number: Numbers, x: Tensor) -> Tensor:
    """One number a picture, to be multiplied with pictures."""
    return number.reshape(-1, *[1] * (x.ndim - 1))


def training_loss(
    denoiser: Denoiser,
    data: Pictures,
    noise: Pictures,
    log_snr: Numbers,
    labels: Int[Tensor, " batch"] | None = None,
    measured: str | None = None,
) -> Numbers:
    """Mean squared error of each picture, of the network's own target or of another one.

    Args:
        measured: the target whose error is asked for, the network's own unless given.
    """
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    place = (spread(alpha, data), spread(sigma, data))
    answer, _ = denoiser(noised(data, noise, *place), alpha, sigma, labels)
    error = answer - target(denoiser.kind, Parts(data, noise), *place)
    loss = error.square().flatten(1).mean(1)
    if measured is None:
        return loss
    return loss * loss_ratio(denoiser.kind, measured, alpha, sigma)


def log_snr_at(schedule: Schedule, time: Numbers) -> Numbers:
    """Of a schedule, but no quieter and no noisier than a network is trained for."""
    return schedule.log_snr(time.double()).clamp(NOISIEST, QUIETEST).to(time.dtype)


def levels_for(schedule: Schedule, steps: int) -> list[Level]:
    """Evenly spaced times from the noisiest level that a network knows, the last without noise.

    Raises:
        ValueError: there is no step.
    """
    if steps < 1:
        raise ValueError(f"pictures need one step at least, got {steps}")
    ends = torch.tensor([NOISIEST, QUIETEST], dtype=torch.float64)
    first, last = schedule.time_of(ends).tolist()
    # The last step leads to no noise at all: as long as the others, if that is not too quiet.
    times = torch.linspace(first, max(last, first / steps), steps, dtype=torch.float64)
    return [*map(schedule.level, times.tolist()), Level(1.0, 0.0, 0.0)]


def asked(
    denoiser: Denoiser, labels: Int[Tensor, " batch"] | None = None, scale: float = 1.0
) -> Denoise:
    """The denoiser as samplers want it: in eval mode, guided, its guesses within [-1, 1].

    On a GPU its matrix products are in bfloat16.

    Raises:
        ValueError: guidance of a network without labels.
    """
    denoiser.eval()

    def ask(x: Tensor, alpha: float, sigma: float, labels: Tensor | None = None) -> Tensor:
        numbers = (x.new_full((len(x),), number) for number in (alpha, sigma))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return denoiser(x, *numbers, labels)[1].data

    if labels is not None:
        ask = guided(ask, labels, scale, denoiser.classes)
    elif scale != 1:
        raise ValueError(f"guidance by {scale} needs labels to follow")
    return lambda x, alpha, sigma: ask(x, alpha, sigma).clamp(-1, 1)


@torch.no_grad()
def generate(
    denoiser: Denoiser,
    noise: Pictures,
    schedule: Schedule,
    steps: int,
    sampler: Sampler,
    *,
    labels: Int[Tensor, " batch"] | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Pictures:
    """Pictures between -1 and 1 out of standard normal noise."""
    levels = levels_for(schedule, steps)
    first = levels[0]
    size = math.hypot(first.alpha, first.sigma)
    generator = torch.Generator(noise.device).manual_seed(seed)
    return sample(asked(denoiser, labels, scale), size * noise, levels, sampler, generator)


def main() -> None:
    from implementations.generative.samplers import SAMPLERS
    from implementations.generative.schedules import SCHEDULES
    from implementations.models.unet import UNet, UNetConfig

    torch.manual_seed(0)
    network = UNet(UNetConfig(widths=(8, 16), attends=(False, True), groups=4, head=8, parts=1))
    denoiser, data = Denoiser(network, "v"), torch.full((16, 1, 8, 8), 0.5)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    for step in range(150):
        log_snr = log_snr_at(SCHEDULES["cosine"], torch.rand(16))
        loss = training_loss(denoiser, data, torch.randn_like(data), log_snr).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, 149):
            print(f"step {step:3}  loss {loss.item():.4f}")
    noise = torch.randn(4, 1, 8, 8)
    for name in ("ddpm", "dpm++"):
        made = generate(denoiser, noise, SCHEDULES["cosine"], 20, SAMPLERS[name])
        print(f"{name:6} in 20 steps: mean {made.mean():.3f}, deviation {made.std():.3f}")


if __name__ == "__main__":
    main()
