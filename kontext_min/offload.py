"""What a GPU need not hold: modulation on the CPU, blocks' weights and their inputs in the host's memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from kontext_min.checkpoints.load import Checkpoint
from kontext_min.models.flux import Flux
from kontext_min.quantize import EMBEDDERS, MODULATION, QuantisedLinear, is_modulation, is_quantised, open_flux

Ahead = Callable[[Tensor, Tensor, Tensor], object]  # is told timesteps (N,), y (N, vec_in_dim), guidance (N,)

KEPT = 128  # evaluations of which it is kept, at most: some that were foretold may never come
LARGE = 2**20  # bytes from which an input of a block is worth a copy


def open_apart(
    modulation: torch.device, streamed: bool, model: Checkpoint, device: torch.device, *base, **more
) -> tuple[Flux, Ahead]:
    """`open_flux` with the modulation on a device of its own. -> also who is told of what is to come.
    streamed: the blocks' other weights lie in the host's memory.
    """

    def place(name: str) -> torch.device:
        if is_modulation(name):
            return modulation
        return torch.device("cpu") if streamed and is_quantised(name) else device

    flux = open_flux(model, place, *base, **more)
    if streamed:
        Ring(flux, device)
    return flux, Modulation(flux, device).ahead


def unneeded(timesteps: Tensor, y: Tensor, guidance: Tensor):
    pass


class Computed(nn.Module):
    """Stands for a linear of the modulation: gives what it made for the evaluation at hand."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.now = linear, None
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None

    def forward(self, _: Tensor, change: Tensor | None = None) -> Tensor:
        return self.now if change is None else change + self.now


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
        self.places = [Computed(linear) for linear in self.linears.values()]
        flux.embed = self.vec
        for name, place in zip(self.linears, self.places, strict=True):
            flux.set_submodule(name, place)

    def ahead(self, timesteps: Tensor, y: Tensor, guidance: Tensor) -> list[bytes]:
        """Begin with what evaluations with these (N,), (N, vec_in_dim), (N,) will need. -> a key of each."""
        columns = [column.detach().float().cpu() for column in (timesteps[:, None], guidance[:, None], y)]
        rows = torch.cat(columns, dim=1)
        keys = [row.numpy().tobytes() for row in rows]
        new = {key: i for i, key in enumerate(keys) if key not in self.made}
        future = new and self.thread.submit(self.compute, rows[[*new.values()]])
        made = self.made | {key: (future, i) for i, key in enumerate(new)}
        asked = {key: made.pop(key) for key in dict.fromkeys(keys)}
        self.made = dict([*asked.items(), *made.items()][:KEPT])  # of what was asked for, the first is needed first
        if new and self.home.device.type == "mps":  # two threads at once end a process there (pytorch#197805)
            future.result()
        return keys

    @torch.no_grad()
    def compute(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 2 + vec_in_dim) of time, guidance and pooled text -> vec (N, hidden), and all linears' outputs (N, …)."""
        rows = rows.to(self.home.device)
        text = rows[:, 2:].to(self.home.dtype).contiguous()  # in part of a row, some CPUs sum in another order
        vec = self.embed(rows[:, 0], text, rows[:, 1])
        return vec, torch.cat([linear(F.silu(vec)) for linear in self.linears.values()], dim=-1)

    def vec(self, timesteps: Tensor, y: Tensor, guidance: Tensor) -> Tensor:
        if any(p.requires_grad for embedder in self.embedders for p in embedder.parameters()):
            raise ValueError(f"updates on {', '.join(EMBEDDERS)} need modulation_on_cpu=false")
        keys = self.ahead(timesteps, y, guidance)
        found = [(future.result(), i) for future, i in map(self.made.get, keys)]
        self.made = {key: value for key, value in self.made.items() if key not in keys}
        vec, whole = (torch.stack([made[k][i] for made, i in found]).to(self.device) for k in (0, 1))
        widths = [linear.out_features for linear in self.linears.values()]
        for place, part in zip(self.places, whole.split(widths, dim=-1), strict=True):
            place.now = part
        return vec


class Copies:
    """Tensors in the host's memory that come to a device and go, on a CUDA stream of their own, beside the computation;
    on a CPU they are just copies. The streams' order keeps what they share: `record_stream` would let more pile up.
    """

    def __init__(self, device: torch.device):
        self.device, self.cuda, self.hosts, self.there, self.going = device, device.type == "cuda", {}, {}, ()
        self.stream = torch.cuda.Stream(device) if self.cuda else None

    def away(self, key: int, *tensors: Tensor):
        copies = [torch.empty_like(x, device="cpu", pin_memory=self.cuda) for x in tensors]
        with self.beside():
            self.hosts[key] = [copy.copy_(x, non_blocking=True) for copy, x in zip(copies, tensors, strict=True)]
        if tensors[0].is_cuda:
            if self.going:  # the last ones, which the computation may write over once they are copied
                torch.cuda.current_stream(self.device).wait_event(self.going[0])
            self.going = self.stream.record_event(), tensors

    def come(self, key: int, *following: int) -> list[Tensor]:
        """The tensors, on the device; those that are needed next begin to come, to where nothing queued still reads."""
        for one in (key, *following):
            if one in self.hosts and one not in self.there:
                with _disable_current_modes(), self.beside():  # selective checkpoints must not see what comes when
                    tensors = [x.to(self.device, non_blocking=True, copy=True) for x in self.hosts[one]]
                    self.there[one] = tensors, self.cuda and self.stream.record_event()
        tensors, event = self.there[key]
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(event)
        return tensors

    def beside(self) -> AbstractContextManager:
        """Within the context work is queued on the own stream, after all that is queued on the current one."""
        if not self.cuda:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)


class Inputs(Copies):
    """Large inputs of checkpointed blocks, kept in the host's memory from forward to backward."""

    def __init__(self, flux: Flux, device: torch.device):
        super().__init__(device)
        self.count = 0
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
        self.away(self.count, x)
        return self.count

    def unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        (x,) = self.come(packed, packed - 1, packed - 2)  # a double block has two
        del self.hosts[packed], self.there[packed]
        return x


class Ring(Copies):
    """The weights of blocks in the host's memory, of three at most on the device: the one at work and its neighbours.
    Nothing is copied back. Linears ask for theirs in forward, in recomputation and in backward.
    """

    def __init__(self, flux: Flux, device: torch.device):
        super().__init__(device)
        for i, block in enumerate((*flux.double_blocks, *flux.single_blocks)):
            tensors = []
            for name, linear in [*block.named_modules()]:
                if isinstance(linear, nn.Linear) and not is_modulation(f"{name}."):
                    linear = QuantisedLinear(linear, {"weight": linear.weight.detach()})
                    block.set_submodule(name, linear)
                if isinstance(linear, QuantisedLinear):
                    own = [part for part in linear.stored() if part is not None]
                    linear.stored = partial(self.parts, i, slice(len(tensors), len(tensors := tensors + own)))
                    linear.weight, linear.scale = tensors[-1].new_empty(0, device=device), None
            self.away(i, *tensors)

    @torch.compiler.disable
    def parts(self, i: int, which: slice) -> tuple[Tensor, Tensor | None]:
        """A linear's weight, and its scale if it has one."""
        count, backward = len(self.hosts), torch._C._current_graph_task_id() != -1
        near = [(i - 1) % count, i, (i + 1) % count]
        self.there = {one: what for one, what in self.there.items() if one in near}
        weight, *scale = self.come(i, near[0 if backward else 2])[which]
        return weight, *(scale or [None])
