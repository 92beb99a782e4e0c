"""One update of a diffusion model's training, as a function of its step.

    update: rows, noise, times of this step -> loss -> gradient, clipped -> AdamW -> average
    look:   the held-out pictures' loss under fixed noise, by the average

On a GPU the whole update is one CUDA graph: a small network is otherwise waiting for its launches.
Only the network in it is compiled, so that every kind of answer shares what inductor has cached.

Paper   Ho et al. 2020, arXiv:2006.11239; Karras et al. 2022, arXiv:2206.00364
Shapes  pixels [picture, channel, row, column], from -1 to 1
Run     uv run python implementations/generative/diffusion_training.py
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from implementations.generative.denoiser import dequantized, log_snr_at, training_loss
from implementations.generative.diffusion_config import DiffusionConfig, for_device, placed
from implementations.generative.diffusion_pictures import Pictures, pictures
from implementations.generative.ema import decay_at, follow_weights
from implementations.generative.guidance import leave_out
from implementations.generative.schedules import SCHEDULES
from implementations.training.schedule import learning_rate

CLIP = 1.0


class Training:
    """A run in progress: model, average, optimizer, and one update as a function of the step."""

    def __init__(self, config: DiffusionConfig, device: str):
        self.config, self.device = config, torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.data = pictures(config.data, config.size)
        self.model = placed(config, self.device).train()
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            # A tensor, and not a number that a CUDA graph would freeze.
            lr=torch.zeros((), device=self.device) if self.on_gpu else 0.0,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=self.on_gpu,
            capturable=self.on_gpu,
        )
        prime(self.optimizer, self.parameters)
        self.train = Pictures(*(part.to(self.device) for part in self.data.train))
        self.schedule = SCHEDULES[config.schedule]
        self.total = torch.zeros((), device=self.device)  # of the losses since the last check
        self.decay = torch.zeros((), device=self.device)
        self.inputs = self.draw(0)
        if self.on_gpu:
            self.model.network.compile(dynamic=False)
        self.run = captured(self.work, self.tensors) if self.on_gpu else self.work

    def draw(self, step: int) -> list[Tensor]:
        """Data, noise, log SNR and labels of an update: a function of its step alone."""
        generator = torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + step)
        chance = {"generator": generator, "device": self.device}
        batch, train = self.config.batch, self.train
        rows = torch.randint(len(train.labels), (batch,), **chance)
        noise = torch.randn(batch, *train.pixels.shape[1:], **chance)
        times = self.times(torch.rand(1, **chance), torch.randperm(batch, **chance))
        labels = train.labels[rows]
        left = leave_out(labels, torch.rand(batch, **chance), 0.1, self.data.classes)
        data = train.pixels[rows]
        if self.config.dequantized:
            data = dequantized(data, self.data.levels, torch.rand(data.shape, **chance))
        return [data, noise, log_snr_at(self.schedule, times), left]

    def times(self, start: Tensor, order: Tensor) -> Tensor:
        """Evenly spread over [0, 1] and shifted at random, so that no batch has only easy ones."""
        uniform = (start + (order + 0.5) / len(order)) % 1
        if self.config.times == "uniform":
            return uniform
        return torch.sigmoid(torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6))).float()

    def work(self) -> None:
        """One update by the inputs that stand ready."""
        data, noise, log_snr, labels = self.inputs
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            known = labels if self.config.labelled else None
            loss = training_loss(self.model, data, noise, log_snr, known).mean()
        loss.backward()
        clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        follow_weights(self.average.parameters(), self.parameters, self.decay)
        self.total += loss.detach()

    def update(self, step: int) -> None:
        """Update number `step`, counted from 0."""
        for kept, drawn_now in zip(self.inputs, self.draw(step), strict=True):
            kept.copy_(drawn_now)
        config = self.config
        rate = learning_rate(
            step + 1, peak=config.learning_rate, steps=config.steps, warmup=config.steps // 20
        )
        for group in self.optimizer.param_groups:
            if self.on_gpu:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.decay.fill_(decay_at(step, config.decay))
        torch.manual_seed(config.seed * 1_000_003 + step)  # of dropout
        self.run()

    @torch.no_grad()
    def held_out_loss(self, draws: int = 4) -> float:
        """Mean loss of the validation pictures by the averaged weights, under fixed noise."""
        pixels, labels = (part.to(self.device) for part in self.data.validation)
        generator = torch.Generator(self.device).manual_seed(0)
        if self.config.dequantized:
            uniform = torch.rand(pixels.shape, generator=generator, device=self.device)
            pixels = dequantized(pixels, self.data.levels, uniform)
        losses = []
        for _ in range(draws):
            noise = torch.randn(pixels.shape, generator=generator, device=self.device)
            order = torch.randperm(len(labels), generator=generator, device=self.device)
            log_snr = log_snr_at(self.schedule, self.times(torch.zeros_like(labels[:1]), order))
            known = labels if self.config.labelled else None
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
                losses.append(training_loss(self.average, pixels, noise, log_snr, known))
        return torch.cat(losses).mean().item()

    def tensors(self) -> dict[str, Tensor]:
        """All that an update changes, by name."""
        found = {"total": self.total}
        for part, model in (("weights", self.model), ("average", self.average)):
            found |= {f"{part}/{name}": p.detach() for name, p in model.named_parameters()}
        for index, parameter in enumerate(self.parameters):
            state = self.optimizer.state[parameter]
            found |= {f"moments/{index}/{name}": value for name, value in state.items()}
        return found


def prime(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Make the optimizer's state now, all zeros: a graph cannot be captured around its birth."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def captured(work: Callable[[], None], tensors: Callable[[], dict[str, Tensor]]) -> Callable:
    """The work as one CUDA graph; warming up leaves the tensors as they were."""
    before = {name: tensor.clone() for name, tensor in tensors().items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    put_back(tensors(), before)
    return graph.replay


@torch.no_grad()
def put_back(tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(kept[name])


def main() -> None:
    config = for_device("cpu", data="digits", size=8, steps=100)
    training = Training(config, "cpu")
    for step in range(config.steps):
        if step in (0, 20):
            print(f"after {step:3} updates: held-out loss {training.held_out_loss():.4f}")
        training.update(step)
    print(f"after {config.steps:3} updates: held-out loss {training.held_out_loss():.4f}")


if __name__ == "__main__":
    main()
