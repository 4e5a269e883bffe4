"""What a GPU need not hold: modulation on the CPU, the inputs of blocks in the host's memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kontext_min.checkpoints.load import Checkpoint
from kontext_min.models.flux import Flux
from kontext_min.quantize import EMBEDDERS, MODULATION, is_modulation, open_flux

Ahead = Callable[[Tensor, Tensor, Tensor], object]  # is told timesteps (N,), y (N, vec_in_dim), guidance (N,)

KEPT = 128  # evaluations of which it is kept, at most: some that were foretold may never come
LARGE = 2**20  # bytes from which an input of a block is worth a copy


def open_apart(modulation: torch.device, model: Checkpoint, device: torch.device, *base, **more) -> tuple[Flux, Ahead]:
    """`open_flux` with the modulation on a device of its own. -> also who is told of what is to come."""

    def place(name: str) -> torch.device:
        return modulation if is_modulation(name) else device

    flux = open_flux(model, place, *base, **more)
    return flux, Modulation(flux, device).ahead


def unneeded(timesteps: Tensor, y: Tensor, guidance: Tensor):
    pass


class Computed(nn.Module):
    """Stands for a linear of the modulation: gives what it made for the evaluation at hand."""

    def __init__(self, linear: nn.Linear, give: Callable[[], Tensor]):
        super().__init__()
        self.linear, self.give = linear, give
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None

    def forward(self, _: Tensor) -> Tensor:
        return self.give()

    def onto(self, change: Tensor, _: Tensor) -> Tensor:
        return change + self.give()


class Modulation:
    """All modulation of a model, computed where its weights lie, for many evaluations at once and ahead of them.
    A thread does it, so that a GPU goes on meanwhile. Updates on these linears work; on what embeds time and text they
    do not: what is computed ahead carries no gradient.
    """

    def __init__(self, flux: Flux, device: torch.device):
        self.device, self.embed, self.made, self.thread = device, flux.embed, {}, ThreadPoolExecutor(1)
        self.embedders = [flux.get_submodule(name) for name in EMBEDDERS if getattr(flux, name) is not None]
        self.home = self.embedders[0].in_layer.weight
        self.linears = {name: module for name, module in flux.named_modules() if name.endswith(MODULATION)}
        self.now: dict[str, Tensor] = {}
        flux.embed = self.vec
        for name, linear in self.linears.items():
            flux.set_submodule(name, Computed(linear, partial(lambda name: self.now[name], name)))

    def ahead(self, timesteps: Tensor, y: Tensor, guidance: Tensor) -> list[bytes]:
        """Begin with what evaluations with these (N,), (N, vec_in_dim), (N,) will need. -> a key of each."""
        columns = [column.detach().float().cpu() for column in (timesteps[:, None], guidance[:, None], y)]
        rows = torch.cat(columns, dim=1)
        keys = [row.numpy().tobytes() for row in rows]
        new = {key: i for i, key in enumerate(keys) if key not in self.made}
        future = new and self.thread.submit(self.compute, rows[[*new.values()]])
        made = self.made | {key: (future, i) for i, key in enumerate(new)}
        asked = {key: made.pop(key) for key in dict.fromkeys(keys)}
        self.made = dict([*made.items(), *asked.items()][-KEPT:])
        return keys

    @torch.no_grad()
    def compute(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 2 + vec_in_dim) of time, guidance and pooled text -> vec (N, hidden), and all linears' outputs (N, …)."""
        rows = rows.to(self.home.device)
        vec = self.embed(rows[:, 0], rows[:, 2:].to(self.home.dtype), rows[:, 1])
        return vec, torch.cat([linear(F.silu(vec)) for linear in self.linears.values()], dim=-1)

    def vec(self, timesteps: Tensor, y: Tensor, guidance: Tensor) -> Tensor:
        if any(p.requires_grad for embedder in self.embedders for p in embedder.parameters()):
            raise ValueError(f"updates on {', '.join(EMBEDDERS)} need modulation_on_cpu=false")
        keys = self.ahead(timesteps, y, guidance)
        found = [(future.result(), i) for future, i in map(self.made.get, keys)]
        self.made = {key: value for key, value in self.made.items() if key not in keys}
        vec, whole = (torch.stack([made[k][i] for made, i in found]).to(self.device) for k in (0, 1))
        widths = [linear.out_features for linear in self.linears.values()]
        self.now = dict(zip(self.linears, whole.split(widths, dim=-1), strict=True))
        return vec


class Inputs:
    """Large inputs of checkpointed blocks, kept in the host's memory from forward to backward.
    Copies run on a CUDA stream of their own, beside the computation; on a CPU they are just copies.
    """

    def __init__(self, flux: Flux, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.count, self.kept, self.coming = 0, {}, {}
        for block in (*flux.double_blocks, *flux.single_blocks):
            for part in {"branch", "forward"} & block.__dict__.keys():  # what `apply_checkpointing` has put there
                setattr(block, part, partial(self.around, getattr(block, part)))

    def around(self, part: Callable, *inputs):
        with saved_tensors_hooks(self.pack, self.unpack):
            return part(*inputs)

    def pack(self, x: Tensor) -> Tensor | int:
        """Large activations -> their number; others as they are, and rotations, which all blocks share."""
        if x.is_complex() or x.nbytes < LARGE:
            return x
        self.count += 1
        with self.beside():
            self.kept[self.count] = torch.empty_like(x, device="cpu", pin_memory=self.cuda).copy_(x, non_blocking=True)
        if self.cuda:
            x.record_stream(self.stream)
        return self.count

    def unpack(self, packed: Tensor | int) -> Tensor:
        """The tensor again, on the device; the one that backward needs next begins to come."""
        if isinstance(packed, Tensor):
            return packed
        for number in (packed, packed - 1):
            if number in self.kept:
                with self.beside():
                    x = self.kept.pop(number).to(self.device, non_blocking=True)
                    self.coming[number] = x, self.cuda and self.stream.record_event()
        x, event = self.coming.pop(packed)
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(event)
            x.record_stream(torch.cuda.current_stream(self.device))
        return x

    def beside(self) -> AbstractContextManager:
        """Within the context work is queued on the own stream, after all that is queued on the current one."""
        if not self.cuda:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)
