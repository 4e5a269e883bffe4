"""Optimizers by the names that users know, and the learning rate over time."""

import math

import torch
from torch import nn


def make_optimizer(
    name: str, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], decay: float, epsilon: float
) -> torch.optim.Optimizer:
    """adamw is torch's; optimi-lion is Lion of torch-optimi with its own betas (0.9, 0.99) and no weight decay."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=decay, eps=epsilon)
    if name == "optimi-lion":
        from optimi import Lion

        return Lion(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    raise ValueError(f"unknown optimizer {name!r}")


SCHEDULES = {  # lr_scheduler -> factor of the learning rate by the share of the run that is done, after the warm-up
    "constant": lambda done: 1.0,
    "constant_with_warmup": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def rate(name: str, step: int, total: int, warmup: int) -> float:
    """The learning rate's factor at a step counted from 0: linear up over `warmup` steps, then by the schedule."""
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[name]((step - warmup) / max(1, total - warmup))
