"""Updates beside a frozen linear, on all of its output rows or on a part of them: LoRA and LoKr.

An update has `name` (the module's in diffusers' layout, or one of our fused linears'), `shape` (rows, in), `scale`,
`start` (its first row in our linear), `dropout`, `magnitude` (DoRA's, per row, or None), `delta()` and `forward(x)`.
Its rows are in our order.
"""

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
        self.magnitude: nn.Parameter | None = None

    @classmethod
    def fresh(cls, name: str, shape: tuple[int, int], rank: int, alpha: float, start: int = 0) -> "LoRA":
        """A new update of rank `rank` for a weight of shape (rows, in): A Kaiming uniform as in PEFT, B zero, fp32."""
        a = torch.empty(rank, shape[1])
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        return cls(name, a, torch.zeros(shape[0], rank), alpha / rank, start)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, in) of the weight that it updates."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Tensor:
        """What it adds to the weight: scale * B A in fp32, (rows, in)."""
        return self.scale * (self.B.float() @ self.A.float())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> scale * B A x, (..., rows)."""
        x = F.dropout(x, self.dropout, training=torch.is_grad_enabled())
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scale


class LoKr(nn.Module):
    """An update by a Kronecker product, kron(w1, w2), of which each side is full or the product of two factors.

    w1 (a, c) and w2 (b, d) update a weight of shape (a * b, c * d). Each is one tensor, or two: (a, r) and (r, c).
    """

    def __init__(self, name: str, w1: tuple[Tensor, ...], w2: tuple[Tensor, ...], scale: float, start: int = 0):
        super().__init__()
        self.name, self.scale, self.start, self.dropout = name, scale, start, 0.0
        self.w1, self.w2 = (nn.ParameterList(nn.Parameter(factor) for factor in side) for side in (w1, w2))
        self.magnitude: nn.Parameter | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, in) of the weight that it updates."""
        return self.w1[0].shape[0] * self.w2[0].shape[0], self.w1[-1].shape[1] * self.w2[-1].shape[1]

    def sides(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """w1 (a, c) and w2 (b, d)."""
        w1, w2 = ([factor.to(dtype) for factor in side] for side in (self.w1, self.w2))
        return w1[0] @ w1[1] if len(w1) == 2 else w1[0], w2[0] @ w2[1] if len(w2) == 2 else w2[0]

    def delta(self) -> Tensor:
        """What it adds to the weight: scale * kron(w1, w2) in fp32, (rows, in)."""
        return self.scale * torch.kron(*self.sides(torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> scale * kron(w1, w2) x, (..., rows), without making the product."""
        w1, w2 = self.sides(x.dtype)
        x = F.dropout(x, self.dropout, training=torch.is_grad_enabled())
        x = x.unflatten(-1, (w1.shape[1], w2.shape[1]))  # (..., c, d)
        return torch.einsum("ac,bd,...cd->...ab", w1, w2, x).flatten(-2) * self.scale


Update = LoRA | LoKr


def take_rows(update: Update, name: str, *ranges: tuple[int, int]) -> Update:
    """The update, frozen, of these rows (first, end) of an update's own, one after the other, by another name.

    ValueError where a Kronecker product would have to be taken apart within its second side.
    """
    unit = 1 if isinstance(update, LoRA) else len(update.w2[0])  # rows of the product for one of its first factor

    def taken(factor: Tensor, unit: int) -> Tensor:
        return torch.cat([factor[first // unit : end // unit] for first, end in ranges])

    if any(edge % unit for edges in ranges for edge in edges):
        raise ValueError(
            f"{update.name} is a Kronecker product of blocks of {unit} rows, which cannot be cut for {name}"
        )
    if isinstance(update, LoRA):
        made: Update = LoRA(name, update.A, taken(update.B, 1), update.scale)
    else:
        made = LoKr(name, (taken(update.w1[0], unit), *update.w1[1:]), tuple(update.w2), update.scale)
    if update.magnitude is not None:
        made.magnitude = nn.Parameter(taken(update.magnitude, 1))
    return made.requires_grad_(False)


class Adapted(nn.Module):
    """A frozen linear (or what stands for one) with any number of updates, each added to its own output rows."""

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
