"""Everything a run must remember to go on bit for bit as if it had never stopped.

    weights       parameters and buffers, by name
    moments       Adam's two averages and its count, by parameter
    generators    torch's random states: dropout's next mask
    step          and with it the place in the data and the learning rate, functions of the step

What is a function of the step is not saved: it cannot disagree with it.

Run     uv run python implementations/training/state.py
"""

import hashlib

import torch
from torch import Tensor, nn

from implementations.training.accumulation import Batch

Groups = dict[str, dict[str, Tensor]]


def capture(model: nn.Module, optimizer: torch.optim.Optimizer) -> Groups:
    """The tensors of a run; those of the model and the optimizer are not copied."""
    names = parameter_names(model)
    moments = {
        f"{names[parameter]}/{kind}": value
        for parameter, values in optimizer.state.items()
        for kind, value in values.items()
    }
    return {"weights": model.state_dict(), "moments": moments, "generators": generators(model)}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, groups: Groups) -> None:
    """Put a run's tensors back into a model and an optimizer made the same way.

    Raises:
        ValueError: they are of a model with other parameters, or with others trained.
    """
    try:
        model.load_state_dict(groups["weights"])
    except RuntimeError as problem:
        raise ValueError(f"the checkpoint is of another model: {problem}") from None
    names = parameter_names(model)
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    places = {names[parameter]: place for place, parameter in enumerate(order)}
    for key, value in groups["moments"].items():
        name, kind = key.rsplit("/", 1)
        if name not in places:
            raise ValueError(f"the checkpoint trains {name}, which this model keeps fixed")
        state.setdefault(places[name], {})[kind] = value
    # torch puts each tensor on its parameter's device; rates and decays are the new optimizer's.
    groups_now = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups_now})
    torch.set_rng_state(groups["generators"]["cpu"])
    if "cuda" in groups["generators"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(groups["generators"]["cuda"], device_of(model))


def generators(model: nn.Module) -> dict[str, Tensor]:
    """The states of torch's generators that the model's dropout may draw from."""
    device = device_of(model)
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Every parameter's name; a shared one has its first."""
    return {parameter: name for name, parameter in model.named_parameters()}


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def digest(batch: Batch) -> str:
    """The SHA-256 of a batch: a run that goes on must find the data that it left."""
    tensors = (batch,) if isinstance(batch, Tensor) else batch
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    optimizer = torch.optim.AdamW(model.parameters())
    for turn in range(2):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        if turn == 0:
            groups = {
                group: {name: tensor.clone() for name, tensor in tensors.items()}
                for group, tensors in capture(model, optimizer).items()
            }
            print("after one update:")
            for group, tensors in groups.items():
                print(f"  {group:11}", *tensors)
            first = model(torch.ones(1, 8))
    restore(model, optimizer, groups)
    same = torch.equal(model(torch.ones(1, 8)), first)
    print(f"restored after the next: the same output, dropout and all: {same}")


if __name__ == "__main__":
    main()
