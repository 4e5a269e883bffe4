"""Memory: activation checkpointing of the transformer's blocks, what a run will take, and what it takes."""

import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from kontext_min.models.flux import Flux

GB = 1e9  # bytes


def apply_checkpointing(flux: Flux, every: int = 1):
    """Keep only the input of every n-th block for backward and compute the rest again. Gradients stay the same."""
    for block in (*flux.double_blocks[::every], *flux.single_blocks[::every]):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def in_use(device: torch.device) -> dict[str, float]:
    """GB in use (`memory`; the peak of CUDA's) and GB there are (`memory_limit`); {} where the system does not tell."""
    if device.type == "cuda":
        used, limit = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    elif device.type == "mps":
        used, limit = torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory()
    elif (statm := Path("/proc/self/statm")).exists():
        page = os.sysconf("SC_PAGE_SIZE")
        used, limit = int(statm.read_text().split()[1]) * page, os.sysconf("SC_PHYS_PAGES") * page
    else:
        return {}
    return {"memory": round(used / GB, 3), "memory_limit": round(limit / GB, 3)}


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor; of a quantised one, of all that it is made of; of one in shards, of this rank's."""
    if isinstance(tensor, DTensor):
        return size_of(tensor.to_local())
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(size_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def predicted(
    flux: Flux, vae: nn.Module, tokens: int, dtype: torch.dtype, checkpointed: bool, trained: float
) -> list[str]:
    """A training step's memory, line by line. tokens: of the largest batch, computed in dtype; trained: its bytes."""
    frozen = [t for t in (*flux.parameters(), *flux.buffers()) if not t.requires_grad]
    parts = {"transformer": sum(map(size_of, frozen)), "VAE": sum(map(size_of, (*vae.parameters(), *vae.buffers())))}
    parts["what is trained, its gradient, the optimizer's state and the average, if any"] = trained
    rest = "all activations (gradient_checkpointing is off)"
    if checkpointed:
        blocks, rest = len(flux.double_blocks) + len(flux.single_blocks), "what one block computes"
        inputs = blocks * flux.config.hidden_size * dtype.itemsize * tokens
        parts[f"inputs of {blocks} blocks, kept for {tokens} tokens"] = inputs
    parts[f"and {rest}: measured, in the bar and metrics.jsonl"] = sum(parts.values())
    return [f"{size / GB:8.3f} GB  {name}" for name, size in parts.items()]
