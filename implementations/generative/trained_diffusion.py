"""A trained diffusion model for whoever needs one: trained once, then read from the cache.

    train_or_load(config, device) = the model that config describes, from a folder named by config
                                    and code; a run that was stopped goes on

    update: rows, noise, times of this step -> loss -> gradient, clipped -> AdamW -> average
    look:   the held-out pictures' loss under fixed noise, by the average; the best average is kept

Four thousand digits invite to be learnt by heart, so a tenth of the training pictures are held out,
and training stops when their loss has not fallen for a while. Test pictures are never seen here.
On a GPU the whole update is one CUDA graph: a small network is otherwise waiting for its launches.
Only the network in it is compiled, so that every kind of answer shares what inductor has cached.

Paper   Ho et al. 2020, arXiv:2006.11239; Karras et al. 2022, arXiv:2206.00364
Shapes  pixels [picture, channel, row, column], from -1 to 1
Run     uv run python implementations/generative/trained_diffusion.py
"""

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from implementations.attention.vendor import attention_sdpa
from implementations.generative.denoiser import (
    Denoiser,
    dequantized,
    generate,
    log_snr_at,
    to_signed,
    training_loss,
)
from implementations.generative.ema import decay_at, follow_weights
from implementations.generative.guidance import leave_out
from implementations.generative.samplers import SAMPLERS
from implementations.generative.schedules import SCHEDULES, Schedule
from implementations.lab.files import run_folder
from implementations.models.diffusion_transformer import DiffusionTransformer, TransformerConfig
from implementations.models.picture_classifier import drawn
from implementations.models.unet import UNet, UNetConfig
from implementations.sources.images import Images, digits, kanji
from implementations.training.checkpoint import State, load_latest, save
from implementations.training.guard import exclusive, stop_requests
from implementations.training.run import Diverged
from implementations.training.schedule import learning_rate

VALIDATION = 10  # one training picture of so many is held out
CLIP = 1.0
CHECK_EVERY = 50  # updates between looks at whether the loss is finite: each waits for the GPU
LEAST_APART = 25  # updates between looks: a look costs as much as some of them
LOOKS_A_CHECKPOINT = 10


@dataclass(frozen=True)
class DiffusionConfig:
    """What to train, on what, and how."""

    data: Literal["mnist_5k", "digits", "kanji", "openmoji"] = "mnist_5k"
    size: int = 28
    """pixels of a picture's side; digits have 8"""
    model: Literal["unet", "transformer"] = "unet"
    widths: tuple[int, ...] = (64, 128, 128)
    """channels at each height of the U-Net"""
    parts: int = 2
    """of the U-Net, at each height"""
    groups: int = 32
    head: int = 32
    """channels of an attention head"""
    patch: int = 4
    """of the transformer"""
    width: int = 192
    layers: int = 6
    dropout: float = 0.1
    labelled: bool = True
    """whether the network reads labels; they are left out of a tenth of the pictures"""
    kind: Literal["data", "noise", "v", "flow"] = "v"
    """what the network answers"""
    schedule: Literal["linear", "cosine", "straight", "even"] = "cosine"
    times: Literal["uniform", "logit_normal"] = "uniform"
    dequantized: bool = False
    """learn a density of pixels with uniform noise between the levels, and not of the levels"""
    steps: int = 6000
    batch: int = 128
    learning_rate: float = 1e-3
    decay: float = 0.999
    """of the average of the weights"""
    looks: int = 40
    """at the held-out loss"""
    patience: int = 10
    """looks without progress after which training stops"""
    seed: int = 0


class Pictures(NamedTuple):
    """Pictures from -1 to 1, and the number of what each shows."""

    pixels: Float[Tensor, "picture channel row column"]
    labels: Int[Tensor, " picture"]


class Data(NamedTuple):
    """Three parts of a set, and how many levels and labels there are."""

    train: Pictures
    validation: Pictures
    test: Pictures
    levels: int
    classes: int


@cache
def pictures(data: str, size: int) -> Data:
    """The parts of a set: every tenth of the training pictures is for validation.

    Raises:
        ValueError: the set is unknown or has no such size.
    """
    if data in ("mnist_5k", "openmoji"):
        levels, classes = 256, 10
        parts = [Pictures(2 * part.pixels - 1, part.labels) for part in drawn(data, size)]
    elif data == "digits" and size == 8:
        levels, classes = 17, 10
        parts = [signed(part) for part in digits().split()]
    elif data == "kanji":
        levels, classes = 256, 0
        parts = [signed(part) for part in kanji(size).split()]
    else:
        raise ValueError(
            f"sets are mnist_5k, digits of size 8, kanji, openmoji: got {data}, {size}"
        )
    train, test = parts
    held_out = torch.arange(len(train.labels)) % VALIDATION == VALIDATION - 1
    parts = [Pictures(train.pixels[rows], train.labels[rows]) for rows in (~held_out, held_out)]
    return Data(*parts, test, levels, classes)


def signed(part: Images) -> Pictures:
    return Pictures(to_signed(part.pixels, part.levels), part.labels)


def for_device(device: str, *, size: int = 0, steps: int = 0, **changes) -> DiffusionConfig:
    """The model that the weekly scripts share: of real size on a GPU, a small one on a CPU.

    Args:
        size: pixels of a side, 0 for the device's own; `steps` of training likewise.
        changes: of the other settings.
    """
    changes |= {"size": size} if size else {}
    changes |= {"steps": steps} if steps else {}
    small = {"size": 14, "widths": (16, 32), "parts": 1, "groups": 8, "head": 16, "dropout": 0.0}
    small |= {"steps": 1200, "batch": 32, "decay": 0.995, "learning_rate": 2e-3, "looks": 20}
    small |= {"width": 64, "layers": 2, "patch": 2}
    return DiffusionConfig(**(small if device == "cpu" else {}) | changes)


def untrained(config: DiffusionConfig) -> Denoiser:
    """The model as it is before training.

    Raises:
        ValueError: labels are asked for where there are none, or sizes do not fit.
    """
    data = pictures(config.data, config.size)
    if config.labelled and not data.classes:
        raise ValueError(f"{config.data} has no labels to learn from: set labelled to False")
    torch.manual_seed(config.seed)
    channels, classes = data.train.pixels.shape[1], data.classes if config.labelled else 0
    shared = {"channels": channels, "dropout": config.dropout, "classes": classes}
    if config.model == "transformer":
        network = DiffusionTransformer(
            TransformerConfig(
                image=config.size,
                patch=config.patch,
                width=config.width,
                layers=config.layers,
                heads=config.width // config.head,
                hidden=4 * config.width,
                **shared,
            ),
            attention_sdpa,
        )
    else:
        attends = (False,) * (len(config.widths) - 1) + (True,)
        sizes = {"widths": config.widths, "parts": config.parts, "attends": attends}
        network = UNet(
            UNetConfig(**sizes, groups=config.groups, head=config.head, **shared), attention_sdpa
        )
    return Denoiser(network, config.kind)


def placed(config: DiffusionConfig, device: torch.device) -> Denoiser:
    """Untrained, on its device; on a GPU with the channels last, as its convolutions want them."""
    memory = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return untrained(config).to(device, memory_format=memory)


class Trained(NamedTuple):
    """A model, and how it became what it is."""

    model: Denoiser
    """the average of the weights, at the look at which held-out pictures were denoised best"""
    raw: Denoiser
    """the last weights, not averaged"""
    history: list[dict[str, float]]
    """step, training loss and held-out loss at each look"""
    seconds: float
    """of training, on the clock, in all calls"""


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


def train_or_load(config: DiffusionConfig, device: str = "cpu") -> Trained:
    """The trained model, in eval mode and on that device; from the cache if it was trained there.

    Raises:
        ValueError: a setting is wrong; Diverged, one too, if training ends in NaN.
        SystemExit: after Ctrl-C or SIGTERM, when the checkpoint is written.
    """
    folder = run_folder(f"diffusion-{config.data}", asdict(config) | {"device": device})
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with (
        torch.random.fork_rng(devices),
        exclusive(folder_made(folder)),
        stop_requests() as asked,
    ):
        found = load_latest(folder)
        history, seconds, best = [], 0.0, {}
        if found and found[1].scalars["finished"]:
            step, (groups, scalars) = found
            model, raw = (placed(config, torch.device(device)) for _ in range(2))
            for network, part in ((model, groups["best"]), (raw, groups["weights"])):
                network.load_state_dict(part)
            return Trained(model.eval(), raw.eval(), scalars["history"], scalars["seconds"])
        training = Training(config, device)
        step = 0
        if found:
            step, (groups, scalars) = found
            history, seconds, best = scalars["history"], scalars["seconds"], groups["best"]
            put_back(training.tensors(), groups["state"])
            print(f"going on from step {step} in {folder}", file=sys.stderr)
        loop(training, folder, step, history, seconds, best, asked)
        if asked:
            print(f"stopped; the same command goes on: {folder}", file=sys.stderr)
            raise SystemExit(128 + asked[0])
    return train_or_load(config, device)


def make(
    model: Denoiser,
    labels: Int[Tensor, " picture"] | None,
    count: int,
    shape: tuple[int, int, int],
    *,
    schedule: str | Schedule = "cosine",
    sampler: str = "dpm++",
    steps: int = 50,
    scale: float = 1.0,
    seed: int = 0,
    at_once: int = 500,
    compiled: bool = False,
) -> Float[Tensor, "picture channel row column"]:
    """New pictures, on the CPU; the first noise is the same for the same seed, whatever the way.

    Args:
        compiled: pays off where the network is asked some thousand times.
    """
    device = next(model.parameters()).device
    if compiled and model.network._compiled_call_impl is None:
        model.network.compile(dynamic=False)
    if isinstance(schedule, str):
        schedule = SCHEDULES[schedule]
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    parts = []
    for index, part in enumerate(noise.split(at_once)):
        known = None if labels is None else labels[index * at_once :][: len(part)].to(device)
        way = {"labels": known, "scale": scale, "seed": seed * 1_000_003 + index}
        made = generate(model, part.to(device), schedule, steps, SAMPLERS[sampler], **way)
        parts.append(made.float().cpu())
    return torch.cat(parts)


def folder_made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def loop(
    training: Training,
    folder: Path,
    step: int,
    history: list[dict[str, float]],
    seconds: float,
    best: dict[str, Tensor],
    asked: list,
) -> None:
    """Updates and looks until the end, a stop, or no progress; checkpoints on the way."""
    config, began = training.config, time.perf_counter() - seconds
    every, done, since = max(LEAST_APART, config.steps // config.looks), False, step

    def write() -> None:
        groups = {"best": best, "weights": training.model.state_dict()}
        scalars = {"history": history, "seconds": time.perf_counter() - began, "finished": done}
        save(folder, step, State(groups | {"state": training.tensors()}, scalars), keep=1)

    with tqdm(total=config.steps, initial=step, unit="step", disable=None) as bar:
        while not done and not asked:
            training.update(step)
            step += 1
            bar.update()
            look = step % every == 0 or step == config.steps
            if look or step % CHECK_EVERY == 0:
                mean = training.total.item() / (step - since)
                if not math.isfinite(mean):
                    raise Diverged(f"the loss is {mean} between steps {since} and {step}")
            if look:
                found = training.held_out_loss()
                said = f"loss {mean:.4f}, held out {found:.4f}"
                bar.set_postfix_str(said, refresh=False)
                if bar.disable:  # no terminal: a line for the log
                    passed = f"{step:,} of {config.steps:,}, {time.perf_counter() - began:.1f} s"
                    print(f"{passed}: {said}", file=sys.stderr, flush=True)
                if found < min((past["held_out"] for past in history), default=math.inf):
                    state = training.average.state_dict()
                    best = {name: value.detach().clone() for name, value in state.items()}
                history.append({"step": step, "loss": mean, "held_out": found})
                losses = [past["held_out"] for past in history]
                late = len(losses) - 1 - losses.index(min(losses)) >= config.patience
                done = late or step == config.steps
                training.total.zero_()
                since = step
                if done or len(history) % LOOKS_A_CHECKPOINT == 0:
                    write()
        if not done:
            training.total.zero_()  # the loss since the last look is not kept
            write()


def main() -> None:
    config = DiffusionConfig(
        data="digits", size=8, widths=(16, 32), parts=1, groups=8, head=16, steps=300, batch=32
    )
    trained = train_or_load(config)
    parameters = sum(p.numel() for p in trained.model.parameters())
    print(f"digits of 8 x 8, {parameters:,} parameters, trained in {trained.seconds:.0f} s")
    for look in trained.history[:: len(trained.history) // 5]:
        print(f"  step {look['step']:4}  loss {look['loss']:.4f}  held out {look['held_out']:.4f}")


if __name__ == "__main__":
    main()
