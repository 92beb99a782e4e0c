"""The loss over gathered shards is that of the whole batch, and so is every gradient."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from implementations.contrastive.clip import clip_loss
from implementations.contrastive.gathered import gather, gathered_info_nce, main
from implementations.contrastive.info_nce import info_nce

SHARDS = Path(__file__).with_name("shards.py")
WHOLE = {"info_nce": info_nce, "clip_loss": clip_loss}
SAME = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (6, 5), "y": (6, 5), "weight": (4, 5)}
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float64)
        for name, size in sizes.items()
    }


@pytest.fixture(scope="module")
def found(inputs, tmp_path_factory):
    """What two gloo processes made of the halves, started once for all tests."""
    folder = tmp_path_factory.mktemp("shards")
    torch.save(inputs, folder / "inputs.pt")
    subprocess.run([sys.executable, "-P", str(SHARDS), str(folder)], check=True, timeout=110)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("name", WHOLE)
def test_two_shards_equal_one_process(name, inputs, found):
    """Loss, gradient of shared weights averaged over processes, and that of each shard's rows."""
    x, y, weight = (inputs[key].clone().requires_grad_() for key in ("x", "y", "weight"))
    loss = WHOLE[name](x @ weight.T, y @ weight.T, 0.3)
    loss.backward()
    for rank in range(2):
        seen = found[rank][name]
        assert_close(seen["loss"], loss.detach(), **SAME)
        assert_close(seen["weight"], weight.grad, **SAME)
        for whole, shard in zip((x, y), seen["shards"], strict=True):
            assert_close(shard, whole.grad.chunk(2)[rank], **SAME)


@pytest.mark.distributed
def test_shards_come_in_the_order_of_the_processes(found):
    for rank in range(2):
        assert found[rank]["order"].flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.distributed
def test_a_shard_may_be_one_pair_if_the_batch_is_not(found):
    """Two perpendicular pairs, one in each process: each row sees cosines 1 and 0."""
    expected = math.log1p(math.exp(-1))
    assert_close(found[0]["one pair each"].item(), expected, rtol=1e-12, atol=0)


@pytest.mark.distributed
def test_uneven_shards_are_refused_by_every_process(found):
    """By all of them: one that raised alone would leave the other waiting for ever."""
    for rank in range(2):
        assert found[rank]["uneven"] == "shards are equally large, got from 2 to 3 rows"


def test_gathering_without_processes_is_refused():
    for call in (lambda: gather(torch.ones(2, 3)), lambda: gathered_info_nce(*torch.ones(2, 2, 3))):
        with pytest.raises(ValueError, match="needs a process group"):
            call()


@pytest.mark.full
@pytest.mark.distributed
def test_more_processes_print_the_same_loss(capfd):
    main(processes=4)
    printed = capfd.readouterr().out.splitlines()
    assert printed[0].split("loss")[1] == printed[1].split("loss")[1].split(",")[0]
