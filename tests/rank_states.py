"""A program for torchrun: loads a run's checkpoint on all ranks, and writes what each holds and what it all comes to.

python rank_states.py CONFIG CHECKPOINT OUT
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from kontext_min import parallel, presets
from kontext_min.checkpoints import load
from kontext_min.config import read_config
from kontext_min.memory import held
from kontext_min.training.optim import make_optimizer
from kontext_min.training.plan import Plan, bytes_of_one
from train import load_model


def local(tensor: Tensor) -> int:
    """Bytes that this rank holds of a tensor."""
    mine = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return mine.untyped_storage().nbytes()


def main(config_file: str, checkpoint: str, out: str):
    config = read_config(Path(config_file), ["model_type=full"])
    parallel.join(1.0, anyway=True)
    model = load.find(presets.locate(config.pretrained_model_name_or_path))
    flux, _ = load_model(config, model, torch.device("cpu"), torch.float32, Plan())
    optimizer = make_optimizer(config.optimizer, [*flux.parameters()], 1e-4, **config.optimizer_options())
    parallel.Shards(flux, optimizer).load(Path(checkpoint))
    states = {}
    for name, parameter in flux.named_parameters():
        kept = {key: value for key, value in optimizer.state[parameter].items() if value.ndim}
        states |= {f"{name}/{key}": parallel.whole(value) for key, value in kept.items()}
        states[name] = parallel.whole(parameter.detach())
        parameter.grad = torch.zeros_like(parameter)
    tensors = [t for p in flux.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    counted = sum(map(local, tensors))
    parts = held(flux, bytes_of_one(config), torch.float32, parallel.world(), sharded=True)
    predicted = sum(size for what, size in parts.items() if "gathered" not in what)
    found = parallel.gathered((predicted, counted))
    if parallel.rank() == 0:
        torch.save({"states": states, "bytes": found}, out)
    parallel.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
