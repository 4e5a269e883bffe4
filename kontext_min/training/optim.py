"""Optimizers by the names that users know, and the learning rate over time."""

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


def warmup(step: int, steps: int) -> float:
    """The learning rate's factor at a step counted from 0: linear up over `steps`, then 1."""
    return min(1.0, (step + 1) / steps) if steps else 1.0
