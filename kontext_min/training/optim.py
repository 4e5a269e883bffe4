"""Optimizers by the names that users know, and the learning rate over time."""

import importlib
import inspect
import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

OPTIMIZERS = {  # name -> library, class, what differs from the library's defaults
    "adamw": ("torch.optim", "AdamW", {}),
    "adamw_bf16": ("optimi", "AdamW", {"kahan_sum": True}),
    "ao-adamw8bit": ("torchao.optim", "AdamW8bit", {}),
}
for _kind in ("Adam", "AdamW", "StableAdamW", "Adan", "Lion", "RAdam", "Ranger", "SGD"):
    OPTIMIZERS[f"optimi-{_kind.lower()}"] = ("optimi", _kind, {})


def make_optimizer(name: str, parameters: list[nn.Parameter], lr: float, **options) -> torch.optim.Optimizer:
    """An optimizer of OPTIMIZERS. options: arguments of its class, or beta1 and beta2 alone; ValueError on others.

    adamw_bf16 turns matrices to bf16, moments too: what bf16 rounds away of an update is kept beside them (Kahan) and
    not drawn at random, so that a resumed run is the same. Its beta2 is 0.99: bf16 cannot decay by 0.999. DoRA's
    magnitudes stay in fp32: rounded, they would change the model before anything is learnt.
    ao-adamw8bit keeps moments in 8 bits, where a parameter has 4096 values or more; it runs without a compiler.
    """
    library, kind, special = OPTIMIZERS[name]
    logging.disable(logging.WARNING)  # torchao tells of kernels that it cannot load; none of them is used here
    make = getattr(importlib.import_module(library), kind)
    logging.disable(logging.NOTSET)
    known = inspect.signature(make).parameters
    betas = list(known["betas"].default) if "betas" in known else []
    for i, beta in enumerate(("beta1", "beta2")):
        if betas and beta in options:
            betas[i] = options.pop(beta)
    settings = special | ({"betas": tuple(betas)} if betas else {}) | options
    if unknown := sorted(settings.keys() - known.keys()):
        raise ValueError(f"optimizer {name} does not take {', '.join(unknown)}; it takes {', '.join(known)}")
    if name == "adamw_bf16":
        for matrix in (parameter for parameter in parameters if parameter.ndim > 1):
            matrix.data = matrix.data.bfloat16()
    optimizer = make(parameters, lr=lr, **settings)
    if library == "torchao.optim":
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, lr: float):
    """The learning rate of the next step; torchao keeps it in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


@dataclass(frozen=True)
class Schedule:
    """The learning rate's factor over a run: up linearly from 0 in `warmup` steps, then by the curve of its name."""

    name: str
    total: int  # steps of the run
    warmup: int = 0
    end: float = 0.0  # the factor that the curve comes down to
    power: float = 1.0  # of polynomial
    cycles: int = 1  # of cosine_with_restarts and sine

    def at(self, step: int) -> float:
        """The factor of a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.end + (1 - self.end) * CURVES[self.name](done, self)


CURVES = {  # lr_scheduler -> height between the end's and the full rate, by the share of the run that is done
    "constant": lambda done, schedule: 1.0,
    "constant_with_warmup": lambda done, schedule: 1.0,
    "linear": lambda done, schedule: 1.0 - done,
    "cosine": lambda done, schedule: 0.5 * (1.0 + math.cos(math.pi * done)),
    "cosine_with_restarts": lambda done, schedule: 0.5 * (1.0 + math.cos(math.pi * (schedule.cycles * done % 1.0))),
    "polynomial": lambda done, schedule: (1.0 - done) ** schedule.power,
    "sine": lambda done, schedule: math.sin(math.pi * (schedule.cycles * done % 1.0)),  # up and down in every cycle
}
