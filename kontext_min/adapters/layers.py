"""Updates beside a frozen linear, on all of its output rows or on a part of them: LoRA and LoKr, either one as DoRA."""

import math
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Update(nn.Module):
    """The change of one module: a LoRA or a LoKr. Its rows are in our order.
    `name`: the module's in diffusers' layout, or one of our fused linears'; `shape`: (rows, in) of the weight;
    `rank`: of a LoRA, or of a LoKr's side in two factors, w2 before w1, else 1; `start`: the first row in our linear;
    `magnitude`: DoRA's, per row, or None; `strength`: of all that a DoRA changes (others have it in `scale`).
    Factors are kept in their own dtype (fp32 in training) and used in the input's.
    """

    def __init__(self, name: str, shape: tuple[int, int], rank: int, scale: float, start: int):
        super().__init__()
        self.name, self.shape, self.rank, self.scale, self.start = name, shape, rank, scale, start
        self.dropout, self.strength = 0.0, 1.0
        self.magnitude: nn.Parameter | None = None

    @property
    def rows(self) -> slice:  # of our linear's outputs
        return slice(self.start, self.start + self.shape[0])

    def lengths(self, weight: Tensor) -> Tensor:  # lengths of the rows of weight + delta, (rows,) in fp32
        return torch.linalg.vector_norm(self.delta().add_(weight), dim=1)


class LoRA(Update):
    """An update by a product of rank `rank`: A (rank, in) and B (rows, rank)."""

    def __init__(self, name: str, a: Tensor, b: Tensor, scale: float, start: int = 0):
        super().__init__(name, (len(b), a.shape[1]), len(a), scale, start)
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)

    @classmethod
    def fresh(cls, name: str, shape: tuple[int, int], rank: int, alpha: float, start: int = 0) -> "LoRA":
        """A new update of rank `rank` for a weight of shape (rows, in): A Kaiming uniform as in PEFT, B zero, fp32."""
        a = torch.empty(rank, shape[1])
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        return cls(name, a, torch.zeros(shape[0], rank), alpha / rank, start)

    @property
    def kind(self) -> str:
        return f"{'LoRA' if self.magnitude is None else 'DoRA'} of rank {self.rank}"

    def delta(self) -> Tensor:  # what it adds to the weight: scale * B A in fp32, (rows, in)
        return self.scale * (self.B.float() @ self.A.float())

    def forward(self, x: Tensor) -> Tensor:  # x (..., in) -> scale * B A x, (..., rows)
        return F.linear(F.linear(x, self.A.to(x.dtype)) * self.scale, self.B.to(x.dtype))


class Kronecker(NamedTuple):
    """The size of a LoKr, in LyCORIS's terms."""

    factor: int = -1  # wanted size of w1's sides; -1: as near to w2's as can be
    full_matrix: bool = False  # w1 and w2 are one matrix each, whatever dim says
    dim: int | None = None  # rank of w2 in two factors, where it is below half of w2's larger side
    alpha: float = 1.0  # strength is alpha / dim; 1 where neither side has two factors
    decompose_both: bool = False  # w1 in two factors too, where dim is below half of w1's larger side


class LoKr(Update):
    """An update by a Kronecker product, kron(w1, w2), of which each side is full or the product of two factors.
    w1 (a, c) and w2 (b, d) update a weight of shape (a * b, c * d). Each is one tensor, or two: (a, r) and (r, c).
    """

    def __init__(self, name: str, w1: tuple[Tensor, ...], w2: tuple[Tensor, ...], scale: float, start: int = 0):
        rank = next((len(side[1]) for side in (w2, w1) if len(side) == 2), 1)
        super().__init__(name, (len(w1[0]) * len(w2[0]), w1[-1].shape[1] * w2[-1].shape[1]), rank, scale, start)
        self.w1, self.w2 = (nn.ParameterList(nn.Parameter(factor) for factor in side) for side in (w1, w2))

    @classmethod
    def fresh(cls, name: str, shape: tuple[int, int], size: Kronecker, start: int = 0) -> "LoKr":
        """A new update of a weight (rows, in) as LyCORIS draws it: w2's last factor zero, others Kaiming; fp32."""
        (a, b), (c, d) = (factors(side, size.factor) for side in shape)
        full_1 = size.full_matrix or not size.decompose_both or size.dim >= max(a, c) / 2
        full_2 = size.full_matrix or size.dim >= max(b, d) / 2
        w2 = (torch.empty(b, d),) if full_2 else (torch.empty(b, size.dim), torch.empty(size.dim, d))
        w1 = (torch.empty(a, c),) if full_1 else (torch.empty(a, size.dim), torch.empty(size.dim, c))
        for factor in (*w2[:-1], *w1):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        nn.init.zeros_(w2[-1])
        return cls(name, w1, w2, 1.0 if full_1 and full_2 else size.alpha / size.dim, start)

    @property
    def kind(self) -> str:
        shapes = ([*(len(factor) for factor in side), side[-1].shape[1]] for side in (self.w1, self.w2))
        return "LoKr of " + " and ".join("x".join(map(str, shape)) for shape in shapes)

    def sides(self) -> tuple[Tensor, Tensor]:  # w1 (a, c) and w2 (b, d) in fp32
        return tuple(reduce(torch.matmul, [factor.float() for factor in side]) for side in (self.w1, self.w2))

    def delta(self) -> Tensor:  # what it adds to the weight: scale * kron(w1, w2) in fp32, (rows, in)
        return self.scale * torch.kron(*self.sides())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> scale * kron(w1, w2) x, (..., rows), without making the product: 1/a + 1/d of its work."""
        w1 = (self.scale * self.sides()[0]).to(x.dtype)
        x = x.unflatten(-1, (w1.shape[1], -1))
        for factor in reversed(self.w2):
            x = F.linear(x, factor.to(x.dtype))
        return torch.einsum("...cb,ac->...ab", x, w1).flatten(-2)


def factors(size: int, factor: int) -> tuple[int, int]:
    """size = m * n with m <= n, as in LyCORIS: m or n is `factor` if that divides; else m is the largest up to it."""
    m = factor
    if factor < 1 or size % factor:
        most = math.isqrt(size) if factor < 0 else min(math.isqrt(size), max(factor, 1))
        m = next(m for m in range(most, 0, -1) if size % m == 0)
    return min(m, size // m), max(m, size // m)


class Shared(torch.autograd.Function):
    """x (..., in) and A (ranks, in) -> x, for the frozen linear, and A x (..., ranks).
    Backward adds A's part of the gradient of x to the linear's, in place: of such a size there is one tensor, not two.
    """

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, a)
        return x.view_as(x), F.linear(x, a)

    @staticmethod
    def backward(ctx, dx: Tensor, dlow: Tensor) -> tuple[Tensor, Tensor]:
        (x, a), dlow, whole = ctx.saved_tensors, dlow.flatten(0, -2), dx.flatten(0, -2)
        same = None if torch.compiler.is_compiling() else whole  # a compiler chooses places itself
        return torch.addmm(whole, dlow, a, out=same).view_as(dx), dlow.t() @ x.flatten(0, -2)


class Adapted(nn.Module):
    """A frozen linear, or what stands for one, with any number of updates, each added to its own output rows.
    What stands for a linear takes a change, too, and adds to it its product with x alone. An update's `dropout` is the
    share of its inputs left out, by draws of torch's global generator, wherever gradients are recorded.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.in_features = base, base.in_features
        self.updates = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out). The linear comes last: a checkpoint need not compute it again for backward."""
        if any(update.magnitude is not None for update in self.updates):
            y = self.base(x)
            return self.change(x, {}, y).add_(y)
        x, lows = self.lows(x)
        edges = [0, *(edge for u in lows for edge in (u.start, u.rows.stop)), self.base.out_features]
        whole = self.base.bias is not None and edges[::2] == edges[1::2]  # LoRAs, one after another, on all rows
        change = self.change(x, lows, bias=self.base.bias if whole else None)
        if self.base.bias is not None and not whole:  # one update's own output stays as it is
            change = (Tensor.add_ if lows or len(self.updates) > 1 else torch.add)(change, self.base.bias)
        if not isinstance(self.base, nn.Linear):
            return self.base(x, change)
        return torch.addmm(change.flatten(0, -2), x.flatten(0, -2), self.base.weight.t()).view(change.shape)

    def lows(self, x: Tensor) -> tuple[Tensor, dict[Update, Tensor]]:
        """x for the linear, and A x (..., rank) of all LoRAs that are given all of it, in one product."""
        own = [u for u in self.updates if isinstance(u, LoRA) and not (u.dropout and torch.is_grad_enabled())]
        if not own:
            return x, {}
        a = torch.cat([update.A * update.scale for update in own]).to(x.dtype)
        x, low = Shared.apply(x, a) if x.requires_grad else (x, F.linear(x, a))
        return x, dict(zip(own, low.split([update.rank for update in own], dim=-1), strict=True))

    def change(self, x: Tensor, lows: dict[Update, Tensor], y: Tensor | None = None, bias=None) -> Tensor:
        """What all updates add, (..., out). y: what the linear gives, if there is a DoRA; bias: a part of it, too."""
        runs, end = [], None  # [(first row, changes of rows that follow each other)]
        for update in self.updates:
            if update.start != end:
                runs.append((update.start, []))
            if update in lows:
                low, b = lows[update].flatten(0, -2), update.B.to(x.dtype).t()
                delta = (low @ b if bias is None else torch.addmm(bias[update.rows], low, b)).view(*x.shape[:-1], -1)
            else:
                given = F.dropout(x, update.dropout, training=torch.is_grad_enabled())
                delta = update(given)
            if update.magnitude is not None:
                delta = self.decomposed(update, delta, given, y if given is x else None)
            runs[-1][1].append(delta)
            end = update.rows.stop
        return reduce(torch.add, (self.widened(start, run) for start, run in runs))

    def widened(self, start: int, run: list[Tensor]) -> Tensor:
        change = run[0] if len(run) == 1 else torch.cat(run, dim=-1)
        after = self.base.out_features - start - change.shape[-1]
        return F.pad(change, (start, after)) if start or after else change

    def weight_of(self, update: Update) -> Tensor:
        """The rows of the frozen weight that an update stands beside, (rows, in), as the forward pass uses them."""
        base = self.linear
        weight = base.weight[update.rows] if isinstance(base, nn.Linear) else base.dequantised(update.rows)
        return weight.to(next(update.parameters()).device)

    @property
    def linear(self) -> nn.Module:  # the base, or the linear whose outputs it gives, computed elsewhere
        return getattr(self.base, "linear", self.base)

    def decomposed(self, update: Update, delta: Tensor, x: Tensor, y: Tensor | None) -> Tensor:
        """What DoRA adds: (gain - 1) W x + gain * delta, gain = magnitude / |W + delta W|, that length held constant.
        delta: the update's own output; y: the linear's for the same x, or None. Source: DoRA (Liu et al. 2024), section
        4.3, as in PEFT. At strength 0 nothing is left of it; PEFT, which weakens delta alone, keeps the magnitudes.
        """
        weight = self.weight_of(update)
        bias = 0.0 if self.linear.bias is None else self.linear.bias[update.rows].to(x.device)
        plain = F.linear(x, weight) if y is None else y[..., update.rows] - bias
        with torch.no_grad():
            lengths = update.lengths(weight).clamp(min=1e-12)
        gain = update.magnitude.float() / lengths
        return update.strength * ((gain - 1).to(x.dtype) * plain + gain.to(x.dtype) * delta)
