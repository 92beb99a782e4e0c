"""InfoNCE over several processes: each holds a shard of the pairs, all keys are candidates.

    loss_r = mean over the shard's queries i of  -log softmax_j score(query_i, key_j)   all keys j
    loss   = mean over processes r of loss_r

Collecting the keys forgets their gradients: torch's all_gather returns constants, so a key would
learn from its own shard's queries, or from none. Here the way back adds up what every process
asks of a key, and gives it to the process that made it. Averaged over processes, as
DistributedDataParallel does, the gradient then is that of the whole batch in one process.

Paper   the global batch: Chen et al. 2020, arXiv:2002.05709, appendix B.2
Shapes  query, key [pair, dim], a shard of each
Run     uv run python implementations/contrastive/gathered.py
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as distributed
from jaxtyping import Float
from torch import Tensor
from torch.multiprocessing import get_context

from implementations.contrastive.info_nce import (
    Temperature,
    check_pairs,
    cosine_scores,
    info_nce,
    surprise,
)


class Gather(torch.autograd.Function):
    """All shards, in the order of the processes; backward sums over processes."""

    @staticmethod
    def forward(context, shard: Tensor) -> Tensor:
        shards = [torch.empty_like(shard) for _ in range(distributed.get_world_size())]
        distributed.all_gather(shards, shard.contiguous())
        return torch.cat(shards)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def gather(shard: Float[Tensor, "row dim"]) -> Float[Tensor, "all_row dim"]:
    """The rows of all processes, with a gradient for each.

    Raises:
        ValueError: no process group is there, or the shards are not equally large.
    """
    if not distributed.is_initialized():
        raise ValueError("gathering needs a process group: call init_process_group first")
    rows = torch.tensor([len(shard), -len(shard)], device=shard.device)
    distributed.all_reduce(rows, distributed.ReduceOp.MAX)
    most, least = rows[0].item(), -rows[1].item()
    if most != least:  # said on every process: one that raises alone leaves the others waiting
        raise ValueError(f"shards are equally large, got from {least} to {most} rows")
    return Gather.apply(shard)


def gathered_info_nce(
    query: Float[Tensor, "pair dim"],
    key: Float[Tensor, "pair dim"],
    temperature: Temperature = 0.1,
) -> Float[Tensor, ""]:
    """This process's part of `info_nce` of the whole batch; the mean over processes is all of it.

    Errors are those of `gather` and `info_nce`; a shard may be a single pair, the batch may not.
    """
    first = distributed.get_rank() * len(query) if distributed.is_initialized() else 0
    keys = gather(key)
    if query.shape != key.shape or len(keys) < 2:
        check_pairs(query, key)
    positive = torch.arange(first, first + len(query), device=query.device)
    return surprise(cosine_scores(query, keys, temperature), positive)


def gathered_clip_loss(
    image: Float[Tensor, "pair dim"],
    text: Float[Tensor, "pair dim"],
    temperature: Temperature = 0.1,
) -> Float[Tensor, ""]:
    """`gathered_info_nce` both ways, halved."""
    forward = gathered_info_nce(image, text, temperature)
    return (forward + gathered_info_nce(text, image, temperature)) / 2


def example(rank: int, store: Path, processes: int) -> None:
    """Two processes, one loss: printed beside the loss of the whole batch."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=processes
    )
    torch.manual_seed(0)
    query, key = torch.randn(2, 64, 32, dtype=torch.float64)
    query, key = query.requires_grad_(), (query.detach() + key).requires_grad_()
    whole = info_nce(query, key)
    expected = torch.autograd.grad(whole, key)[0].chunk(processes)[rank]
    mine = [x.detach().chunk(processes)[rank].requires_grad_() for x in (query, key)]
    loss = gathered_info_nce(*mine)
    loss.backward()
    mean = loss.detach().clone()
    distributed.all_reduce(mean)
    apart = (mine[1].grad / processes - expected).abs().max().item()
    if rank == 0:
        print(f"one process with 64 pairs            loss {whole.item():.6f}")
        print(
            f"{processes} processes with {64 // processes} pairs each          "
            f"loss {mean.item() / processes:.6f}, gradients differ by {apart:.1e}"
        )
        alone = info_nce(*(x.detach() for x in mine))
        print(f"the same without the others' keys    loss {alone.item():.6f}")
    distributed.destroy_process_group()


def main(processes: int = 2) -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = get_context("spawn").Process
        arguments = [(rank, Path(folder) / "store", processes) for rank in range(processes)]
        running = [start(target=example, args=given) for given in arguments]
        for process in running:
            process.start()
        for process in running:
            process.join()


if __name__ == "__main__":
    main()
