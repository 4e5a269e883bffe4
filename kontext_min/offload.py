"""What a GPU need not hold: modulation on the CPU, inputs of blocks in the host's memory, blocks' weights streamed.

Each is put on the plain model. Copies have a CUDA stream of their own, beside the computation; on a CPU they are just
copies, so that all of this can be tried there.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from kontext_min.checkpoints.load import Checkpoint
from kontext_min.models.flux import Flux
from kontext_min.quantize import Hook, QuantisedLinear, is_quantised, open_flux

Ahead = Callable[[Tensor, Tensor, Tensor], object]  # is told timesteps (N,), y (N, vec_in_dim), guidance (N,)

EMBEDDERS = ("time_in", "guidance_in", "vector_in")
MODULATION = ("mod.lin", "modulation.lin", "adaLN_modulation.1")  # endings of the linears that see one token
LARGE = 2**20  # bytes from which an input of a block is worth a copy
SLOTS = 3  # blocks on the device: the one at work, the next one, and the one before, which backward begins with
ALIGNED = 256  # bytes


def is_modulation(name: str) -> bool:
    """Whether a tensor of the transformer, by our name, sees only time, guidance and pooled text: 27 % of Kontext."""
    stem = name.rpartition(".")[0]
    return stem.endswith(MODULATION) or name.startswith(EMBEDDERS)


def is_streamed(name: str) -> bool:  # whether a tensor is a weight of a block's other linears: 72 %
    return is_quantised(name) and not is_modulation(name)


def open_apart(
    model: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    base: tuple[str, Path],
    modulation: torch.device | None = None,
    blocks: bool = False,
    merge: Hook = None,
) -> tuple[Flux, Ahead]:
    """`open_flux` with parts of the model elsewhere. -> also what likes to know the next evaluations' inputs.

    modulation: where it is computed, never quantised, for many evaluations at once; None: block by block as ever.
    blocks: whether their weights are streamed. base: precision and cache; merge: as in `open_flux`.
    """

    def place(name: str) -> torch.device:
        if modulation and is_modulation(name):
            return modulation
        return torch.device("cpu") if blocks and is_streamed(name) else device

    flux = open_flux(model, place, dtype, *base, merge, is_streamed if modulation else is_quantised)
    ahead = Modulation(flux, device).ahead if modulation else unneeded
    if blocks:
        Ring(flux, device)
    return flux, ahead


def unneeded(timesteps: Tensor, y: Tensor, guidance: Tensor):
    """Of a model that computes everything when its turn comes."""


# ------------------------------------------------------------------------------------------------ modulation


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

    def ahead(self, timesteps: Tensor, y: Tensor, guidance: Tensor):
        """Begin with what evaluations with these (N,), (N, vec_in_dim), (N,) will need."""
        columns = [column.detach().float().cpu() for column in (timesteps[:, None], guidance[:, None], y)]
        rows = torch.cat(columns, dim=1)
        new = {row.numpy().tobytes(): i for i, row in enumerate(rows)}
        new = {key: i for key, i in new.items() if key not in self.made}
        if new:
            future = self.thread.submit(self.compute, rows[[*new.values()]])
            self.made |= {key: (future, i) for i, key in enumerate(new)}
        return [row.numpy().tobytes() for row in rows]

    @torch.no_grad()
    def compute(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 2 + vec_in_dim) of time, guidance and pooled text -> vec (N, hidden), and all linears' outputs (N, …)."""
        rows = rows.to(self.home.device)
        vec = self.embed(rows[:, 0], rows[:, 2:].to(self.home.dtype), rows[:, 1])
        return vec, torch.cat([linear(F.silu(vec)) for linear in self.linears.values()], dim=-1)

    def vec(self, timesteps: Tensor, y: Tensor, guidance: Tensor) -> Tensor:
        """What `Flux.embed` gives; from now on the linears give what belongs to it."""
        if any(p.requires_grad for embedder in self.embedders for p in embedder.parameters()):
            raise ValueError(f"updates on {', '.join(EMBEDDERS)} need modulation_on_cpu=false")
        keys = self.ahead(timesteps, y, guidance)
        found = [(future.result(), i) for future, i in map(self.made.get, keys)]
        self.made = {key: value for key, value in self.made.items() if key not in keys}
        vec, whole = (torch.stack([made[k][i] for made, i in found]).to(self.device) for k in (0, 1))
        widths = [linear.out_features for linear in self.linears.values()]
        self.now = dict(zip(self.linears, whole.split(widths, dim=-1), strict=True))
        return vec


# ------------------------------------------------------------------------------------------------ copies


class Copies:
    """Copies between a device and the host, on a stream of their own where the device is a GPU."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None

    def beside(self) -> AbstractContextManager:
        """Within the context work is queued on the own stream, after all that is queued on the current one."""
        if not self.cuda:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def done(self) -> Callable[[], None]:
        """-> what makes the current stream wait for all that is queued here by now."""
        event = self.stream.record_event() if self.cuda else None
        return lambda: torch.cuda.current_stream(self.device).wait_event(event) if event else None


class Inputs(Copies):
    """Large inputs of checkpointed blocks, kept in the host's memory from forward to backward."""

    def __init__(self, flux: Flux, device: torch.device):
        super().__init__(device)
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
                    self.coming[number] = self.kept.pop(number).to(self.device, non_blocking=True), self.done()
        x, wait = self.coming.pop(packed)
        wait()
        if self.cuda:
            x.record_stream(torch.cuda.current_stream(self.device))
        return x


class Ring(Copies):
    """The weights of blocks in the host's memory, of which SLOTS are on the device: one at work, the next one coming.

    Nothing is ever copied back. `QuantisedLinear` asks for its parts in forward, recomputation and backward.
    """

    def __init__(self, flux: Flux, device: torch.device):
        super().__init__(device)
        for name, module in list(flux.named_modules()):
            if isinstance(module, nn.Linear) and is_streamed(f"{name}.weight"):
                flux.set_submodule(name, QuantisedLinear(module, {"weight": module.weight.detach()}))
        self.hosts = [self.taken(i, block) for i, block in enumerate((*flux.double_blocks, *flux.single_blocks))]
        size = max(map(len, self.hosts))
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self.there: dict[int, tuple[int, Callable]] = {}  # block -> slot, what waits for it; the last one used last

    def taken(self, i: int, block: nn.Module) -> Tensor:
        """The weights and scales of a block's streamed linears, in one piece of the host's memory, (bytes,)."""
        pieces, end = [], 0
        for linear in (module for module in block.modules() if isinstance(module, QuantisedLinear)):
            places = []
            for part in (part for part in linear.stored() if part is not None):
                pieces.append(F.pad(part.flatten().view(torch.uint8), (0, -part.nbytes % ALIGNED)).cpu())
                places.append((slice(end, end + part.nbytes), part.dtype, part.shape))
                end += len(pieces[-1])
            linear.stored, linear.weight, linear.scale = partial(self.parts, i, places), None, None
        return torch.cat(pieces).pin_memory() if self.cuda else torch.cat(pieces)

    def parts(self, i: int, places: list[tuple[slice, torch.dtype, torch.Size]]) -> tuple[Tensor, Tensor | None]:
        whole = self.block(i)
        weight, *scale = (whole[place].view(dtype).view(shape) for place, dtype, shape in places)
        return weight, *(scale or [None])

    def block(self, i: int) -> Tensor:
        """A block's bytes on the device; the next one's, in the order of forward or backward, begin to come."""
        backward = torch._C._current_graph_task_id() != -1
        self.load(i)
        slot, wait = self.there[i] = self.there.pop(i)  # used last
        self.load((i + (-1 if backward else 1)) % len(self.hosts))
        wait()
        return self.slots[slot]

    def load(self, i: int):  # begin to copy a block, unless it is there, in the place of the one that was used first
        if i in self.there:
            return
        slot = len(self.there) if len(self.there) < SLOTS else self.there.pop(next(iter(self.there)))[0]
        with _disable_current_modes(), self.beside():  # selective checkpoints must not see when a block comes
            self.slots[slot][: len(self.hosts[i])].copy_(self.hosts[i], non_blocking=True)
            self.there[i] = slot, self.done()
