"""How fast does a readable U-Net train?

A training step of the denoising loss (forward, backward, fused AdamW; bfloat16 autocast, channels
last) on random pictures, in turn with the U-Net of diffusers of the very same layout. On a GPU both
networks are compiled; then ours once more as train_ddpm.py trains it, the whole update with its
averaged weights as one CUDA graph. On a CPU at a small shape and not compiled, which says little
about a GPU.

Expected: nothing; as fast as diffusers' is the goal.

Run     uv run python weeks/08_diffusion/unet_throughput.py --device cuda --batch 256
"""

import time
from dataclasses import dataclass

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from implementations.attention.vendor import attention_sdpa
from implementations.generative.diffusion_config import for_device
from implementations.generative.diffusion_training import Training
from implementations.lab.findings import Finding, at_least, equals
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved
from implementations.models.unet import UNet, UNetConfig

SMALL = {"widths": (32, 64), "attends": (False, True), "parts": 1, "groups": 8, "head": 16}


@dataclass(frozen=True)
class Config:
    """A training step of ours against one of diffusers', in turns."""

    device: str = "cpu"
    """cuda measures the U-Net of train_ddpm.py, compiled; cpu a small one, as it stands"""
    batch: int = 16
    """pictures in a step"""
    rounds: int = 15
    """timed rounds"""


def diffusers_unet(shape: UNetConfig, size: int) -> nn.Module:
    """diffusers' U-Net of the same sizes."""
    down = tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in shape.attends)
    up = tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in shape.attends[::-1])
    return UNet2DModel(
        sample_size=size,
        in_channels=shape.channels,
        out_channels=shape.channels,
        block_out_channels=shape.widths,
        layers_per_block=shape.parts,
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=shape.head,
        norm_num_groups=shape.groups,
    )


def training_step(network: nn.Module, answer, device: str):
    """An update by the mean squared error of the answer."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    if device != "cpu":
        network.compile(dynamic=False)

    def step(x: Tensor, wanted: Tensor, position: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found = answer(x, position)
        mse_loss(found.float(), wanted).backward()
        optimizer.step()

    return step


def graphed(config: Config) -> float:
    """Seconds of an update as train_ddpm.py does it, of the same U-Net."""
    plain = {"labelled": False, "dropout": 0.0, "batch": config.batch}
    training = Training(for_device(config.device, **plain), config.device)
    for step in range(3):
        training.update(step)
    torch.cuda.synchronize()
    started, updates = time.perf_counter(), 100
    for step in range(updates):
        training.update(step)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / updates


def main(config: Config) -> list[Finding]:
    torch.manual_seed(0)
    real, size = config.device != "cpu", 28 if config.device != "cpu" else 16
    shape = UNetConfig(**({} if real else SMALL))
    networks = {"ours": UNet(shape, attention_sdpa), "diffusers": diffusers_unet(shape, size)}
    networks = {
        name: network.to(config.device, memory_format=torch.channels_last)
        for name, network in networks.items()
    }
    parameters = [sum(p.numel() for p in network.parameters()) for network in networks.values()]
    ours, theirs = networks["ours"], networks["diffusers"]
    answers = {
        "ours": ours,
        "diffusers": lambda x, position: theirs(x, 1000 * position).sample,
    }
    x, wanted = torch.randn(2, config.batch, 1, size, size, device=config.device)
    position = torch.rand(config.batch, device=config.device)
    steps = {
        name: training_step(networks[name], answer, config.device)
        for name, answer in answers.items()
    }
    timings = time_interleaved(steps, x, wanted, position, rounds=config.rounds)
    speed = {name: config.batch / timings.median(name) for name in steps}
    if real:
        speed["ours, one CUDA graph an update"] = config.batch / graphed(config)
    what = "compiled" if real else "a small one"
    return [
        Finding("parameters of the U-Net", parameters[0]),
        Finding("diffusers' has as many, but for", parameters[1] - parameters[0],
                expected=equals(0)),
        Finding(f"U-Net, {what}: our training step, times diffusers' speed",
                timings.ratio("ours", "diffusers"), "x", goal=at_least(1.0),
                spread=timings.spread("ours", "diffusers"), seeds=config.rounds,
                repeated="rounds"),
        *(Finding(f"{name}: training throughput", rate, "pictures/s")
          for name, rate in speed.items()),
    ]  # fmt: skip


if __name__ == "__main__":
    run(main, Config(), quick=Config(batch=2, rounds=2))
