"""Muon for matrices and convolution kernels, Adam for the rest (Jordan et al. 2024; scaled to Adam's step size).

torch.optim.Muon takes 2-D parameters only and works in bfloat16, which CPUs without bf16 instructions do slowly.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: a quintic Newton-Schulz iteration on (rows, columns)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised and scaled to a root mean square of 0.2 x lr: for parameters of two or more axes."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                update = orthogonalise(p.grad.lerp(momentum, MOMENTUM).flatten(1))
                scale = 0.2 * max(update.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)


def optimizers(models: Iterable[nn.Module], lr: float, adam_lr: float, adam_names: tuple[str, ...] = ()) -> list:
    """Muon for matrices, Adam for vectors and for parameters whose name contains one of `adam_names`."""
    matrices, others = [], []
    for model in models:
        for name, p in model.named_parameters():
            matrix = p.ndim >= 2 and not any(part in name for part in adam_names)
            (matrices if matrix else others).append(p)
    return [Muon(matrices, lr, weight_decay=0.01), torch.optim.Adam(others, adam_lr, betas=(0.9, 0.98), fused=True)]
