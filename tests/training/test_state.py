"""What a run must remember comes back, and what does not fit is refused."""

import pytest
import torch
from torch import nn

from implementations.training.state import capture, digest, restore


def copied(groups):
    return {
        group: {name: tensor.clone() for name, tensor in tensors.items()}
        for group, tensors in groups.items()
    }


def updates(model, optimizer, count):
    """A few updates, and what came out of them, dropout and all."""
    outputs = []
    for _ in range(count):
        optimizer.zero_grad()
        outputs.append(model(torch.ones(2, 3, dtype=torch.long)))
        outputs[-1].square().sum().backward()
        optimizer.step()
    return torch.stack(outputs)


def test_a_restored_run_repeats_what_came_after(tiny):
    """Weights, buffers, both averages, their count and dropout's masks, into fresh objects."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    updates(model, optimizer, 3)
    groups = copied(capture(model, optimizer))
    expected = updates(model, optimizer, 3)
    other = tiny(seed=99)
    another = torch.optim.AdamW(other.parameters(), lr=0.1)
    restore(other, another, groups)
    assert torch.equal(updates(other, another, 3), expected)
    assert other.calls == model.calls == 6


def test_moments_go_by_name_not_by_place(tiny):
    """Parameter groups in another order do not exchange two parameters' averages."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    updates(model, optimizer, 1)
    groups = copied(capture(model, optimizer))
    reverse = torch.optim.AdamW(list(model.parameters())[::-1])
    restore(model, reverse, groups)
    for name, parameter in model.named_parameters():
        assert torch.equal(
            reverse.state[parameter]["exp_avg"], groups["moments"][f"{name}/exp_avg"]
        )


def test_another_models_state_is_refused(tiny):
    model, other = tiny(), nn.Linear(2, 2)
    groups = copied(capture(model, torch.optim.AdamW(model.parameters())))
    with pytest.raises(ValueError, match="the checkpoint is of another model"):
        restore(other, torch.optim.AdamW(other.parameters()), groups)


def test_moments_of_what_is_not_trained_are_refused(tiny):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    updates(model, optimizer, 1)
    groups = copied(capture(model, optimizer))
    model.embedding.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match=r"trains embedding\.weight, which this model keeps fixed"):
        restore(model, torch.optim.AdamW(trained), groups)


def test_a_digest_sees_values_shape_and_type():
    batch = torch.arange(6)
    others = [batch.flip(0), batch.view(2, 3), batch.int(), (batch, batch), batch.double()]
    assert len({digest(other) for other in [batch, *others]}) == 6
    assert digest(batch) == digest(batch.clone()) == digest((batch,))
