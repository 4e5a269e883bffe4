"""LoRA: W x + scale * B (A x) beside a frozen linear, on all of its output rows or on a part of them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRA(nn.Module):
    """The update of one module (rows `start` to `start + rows` of a possibly fused linear).

    A (rank, in) and B (rows, rank) are kept in their own dtype (fp32 in training) and used in the input's.
    `name` is the module's name in diffusers' layout, by which files know it. `dropout` is the share of the inputs
    left out, by draws of torch's global generator, wherever gradients are recorded.
    """

    def __init__(self, name: str, a: Tensor, b: Tensor, scale: float, start: int = 0):
        super().__init__()
        self.name, self.scale, self.start, self.dropout = name, scale, start, 0.0
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(b)

    @classmethod
    def fresh(cls, name: str, shape: tuple[int, int], rank: int, alpha: float, start: int = 0) -> "LoRA":
        """A new update of rank `rank` for a weight of shape (rows, in): A Kaiming uniform as in PEFT, B zero, fp32."""
        a = torch.empty(rank, shape[1])
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        return cls(name, a, torch.zeros(shape[0], rank), alpha / rank, start)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> scale * B A x, (..., rows)."""
        x = F.dropout(x, self.dropout, training=torch.is_grad_enabled())
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scale


class Adapted(nn.Module):
    """A frozen linear (or what stands for one) with any number of LoRA updates, each added to its own output rows."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.updates = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for update in self.updates:
            delta = update(x)
            if delta.shape[-1] == y.shape[-1]:
                y = y + delta
            else:
                before, after = update.start, y.shape[-1] - update.start - delta.shape[-1]
                y = y + F.pad(delta, (before, after))
        return y
