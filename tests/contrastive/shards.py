"""Two processes that share one batch, for test_gathered.py: `python -P shards.py FOLDER`.

Each takes its half of the pairs in FOLDER/inputs.pt through a shared linear map and the gathered
losses, averages what has to be averaged, and writes FOLDER/found-RANK.pt. The second process is a
fork of the first, made before anything is computed: importing torch once takes long enough.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as distributed
from torch import nn

from implementations.contrastive.gathered import gather, gathered_clip_loss, gathered_info_nce

PROCESSES = 2
LOSSES = {"info_nce": gathered_info_nce, "clip_loss": gathered_clip_loss}


def mean_over_processes(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().clone()
    distributed.all_reduce(x)
    return x / PROCESSES


def error_of(action) -> str:
    try:
        action()
    except ValueError as problem:
        return str(problem)
    return ""


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    inputs = torch.load(folder / "inputs.pt", weights_only=True)
    found = {}
    for name, loss_of in LOSSES.items():
        shards = [inputs[side].chunk(PROCESSES)[rank].requires_grad_() for side in ("x", "y")]
        shared = nn.Linear(*inputs["weight"].shape[::-1], bias=False, dtype=torch.float64)
        shared.weight.data.copy_(inputs["weight"])
        loss = loss_of(*(shared(shard) for shard in shards), 0.3)
        loss.backward()
        found[name] = {
            "loss": mean_over_processes(loss),
            "weight": mean_over_processes(shared.weight.grad),  # as DistributedDataParallel does
            "shards": [shard.grad / PROCESSES for shard in shards],
        }
    found["order"] = gather(torch.full((2, 1), float(rank)))
    one = torch.eye(2, dtype=torch.float64)[rank : rank + 1]
    found["one pair each"] = mean_over_processes(gathered_info_nce(one, one, 1.0))
    found["uneven"] = error_of(lambda: gather(torch.ones(2 + rank, 3)))
    torch.save(found, folder / f"found-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    other = os.fork()
    main(Path(sys.argv[1]), rank=0 if other else 1)
    if other:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
