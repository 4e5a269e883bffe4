"""Many devices, one recipe: `torchrun train.py CONFIG` makes a rank of each, on torch.distributed; alone, rank 0 of 1.

Every rank runs the same program on batches of its own. Gradients are summed, work that is done once is shared out, and
rank 0 alone speaks and writes. A model can lie in shards on all ranks (FSDP2), which gather one block at a time.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, wraps
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # after failures, by torchrun --max-restarts


@cache
def meeting() -> tuple[dist.Store, int, int]:  # where the ranks of this start see each other's notes; rank; world
    store, number, count = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    return dist.PrefixStore(f"start {RESTARTS}", store), number, count


def join(minutes: float, anyway: bool = False):
    """Join the group that torchrun describes in the environment; without torchrun none, or one of this rank `anyway`.
    A rank that waits for another for more than `minutes` gives up. Ranks but the first fall silent.
    """
    if anyway or "RANK" in os.environ:
        (store, number, count), backend = meeting(), "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timedelta(minutes=minutes))
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")


def leave():  # end the group, and a process of torchrun's: left to Python, torch's threads abort one in forty
    if dist.is_initialized():
        dist.destroy_process_group()
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(0)


def rank() -> int:  # this process's number, from 0
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def lost(error: RuntimeError) -> bool:
    return world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


@contextmanager
def errors_in_one_line(program: str, smaller: str = "take less at a time") -> Iterator[None]:
    """Within it an error ends the program with its sentence; smaller: what to do where a GPU's memory is too small.
    The first rank to fail tells it, whichever it is; the others fail of that.
    """
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        said = f"the GPU's memory is too small: {smaller}" if isinstance(error, torch.OutOfMemoryError) else error
        try:
            first = "RANK" not in os.environ or meeting()[0].add("failed", 1) == 1
        except RuntimeError:  # the store has died with its rank
            first = True
        sys.exit(f"{program}: {said}" if first else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        sys.stderr = sys.__stderr__  # that, and a traceback, is for the user, whichever rank's


# ------------------------------------------------------------------------------------------------ together


def by_first(function: Callable) -> Callable:
    """Decorates what rank 0 alone does; on the others it is nothing, and gives None."""

    @wraps(function)
    def done(*arguments, **more):
        return None if rank() else function(*arguments, **more)

    return done


def summed(values: Sequence[Tensor]):  # make every tensor the sum of all ranks', in place; those of shards are already
    if world() > 1:
        for work in [dist.all_reduce(value, async_op=True) for value in values if not isinstance(value, DTensor)]:
            work.wait()


def total(value: float) -> float:
    sums = torch.tensor(value, dtype=torch.float64)
    summed([sums])
    return sums.item()


def wait():
    total(0)


@contextmanager
def first_alone() -> Iterator[None]:  # rank 0 goes first; the others come to what it has made
    if rank():
        wait()
    yield
    if not rank():
        wait()


def gathered(value) -> list:
    found = [value] * world()
    if world() > 1:
        dist.all_gather_object(found, value)
    return found


def shared_out(work: Callable, items: Sequence) -> list:
    """[work(item) for item in items], shared out. All ranks work equally often, as models in shards need it."""
    rounds = -(-len(items) // world())
    found = gathered([work(items[min(i * world() + rank(), len(items) - 1)]) for i in range(rounds)])
    return [found[i % world()][i // world()] for i in range(len(items))]


# ------------------------------------------------------------------------------------------------ shards


def sharding(trained: bool, dtype: torch.dtype, offloaded: bool) -> Callable[[nn.Module, str], None]:
    """For `load_flux(then=...)`: each block becomes shards on all ranks as soon as its last tensor is there.
    trained: whether the shards get gradients; dtype: what blocks compute in; offloaded: they lie in the host's memory.
    At last call `shard` on the whole.
    """

    def then(flux: nn.Module, name: str):
        group, number, *_ = name.split(".")
        if group in ("double_blocks", "single_blocks"):
            block = getattr(flux, group)[int(number)]
            if not any(parameter.is_meta for parameter in block.parameters()):
                shard(block.requires_grad_(trained), dtype, offloaded)

    return then


def shard(module: nn.Module, dtype: torch.dtype, offloaded: bool):
    """Spread all parameters of a module that are not yet so over the ranks. Gradients are summed over them in fp32."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # nothing here works in place on what a model returns
    precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)  # times and angles stay in fp32
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offloaded else OffloadPolicy()
    fully_shard(module, mp_policy=precision, offload_policy=offload)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def place(model: nn.Module) -> torch.device:  # where a model computes; the shards of an offloaded one lie elsewhere
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def whole(tensor: Tensor) -> Tensor:  # a tensor that lies in shards, on every rank; others as they are
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Shards:
    """A model in shards and its optimizer, saved and loaded by all ranks together, however many there then are."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer

    def states(self) -> dict:
        both = get_state_dict(self.model, self.optimizer)
        return dict(zip(("model_state_dict", "optim_state_dict"), both, strict=True))

    def save(self, folder: Path):
        save(self.states(), storage_writer=FileSystemWriter(folder))

    def load(self, folder: Path):
        states = self.states()
        load(states, storage_reader=FileSystemReader(folder))
        set_state_dict(self.model, self.optimizer, **states)
