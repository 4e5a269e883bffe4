"""Memory: what is computed again instead of kept, attention's kernels, what a run will take, and what it takes."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kontext_min.models.flux import Flux

GB = 1e9  # bytes
ATEN = torch.ops.aten
ATTENTION = {  # the products that attention is, on CUDA and on the CPU
    ATEN._scaled_dot_product_cudnn_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}
# what linears are, also rounded ones -> which argument is the weight, (in, out)
PRODUCTS = {ATEN.mm.default: 1, ATEN.addmm.default: 2, ATEN._int_mm.default: 1, ATEN._scaled_mm.default: 1}


def apply_checkpointing(flux: Flux, policy: str = "block", every: int = 1):
    """Compute what every n-th block did again in backward, but for what is kept of it. Gradients stay the same.

    policy: keeps of a block its input (`block`), what attention gives too (`keep_attn`), or what the linears give too,
    so that only what is cheap is computed again (`keep_gemm`). The last block, whose turn comes first, keeps all.
    """
    width = flux.config.hidden_size

    def decide(_, op, *args, **kwargs) -> CheckpointPolicy:
        keep = op in ATTENTION
        if policy == "keep_gemm" and op in PRODUCTS:
            inputs, outputs = args[PRODUCTS[op]].shape
            keep = width <= inputs <= outputs  # not an adapter's, nor the last of a block: that is never needed again
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    selective = {} if policy == "block" else {"context_fn": partial(create_selective_checkpoint_contexts, decide)}
    for block in [*flux.double_blocks, *flux.single_blocks][:-1:every]:
        gated = any(p.requires_grad for name, p in block.named_parameters() if "mod" in name)
        part = "forward" if gated else "branch"  # a trained gate needs what it multiplies, which is not kept
        setattr(block, part, partial(checkpoint, getattr(block, part), use_reentrant=False, **selective))


def attention_kernels(device: torch.device) -> AbstractContextManager:
    """Within the context cuDNN's attention comes first on sm_90, where it is fastest; elsewhere torch's order stays."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return nullcontext()
    first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(first, set_priority=True)


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
    """Bytes of a tensor; of a quantised one, of all that it is made of; of one in shards, of all ranks' together."""
    if hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, DTensor):
        return sum(size_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def held(flux: Flux, per_trained: float, dtype: torch.dtype, ranks: int = 1, sharded: bool = False) -> dict[str, float]:
    """Bytes of weights and training state on each of so many ranks, by what they are, from shapes alone: meta will do.

    per_trained: bytes of a trained parameter, its gradient and its state; dtype: what blocks compute in. Shards are of
    the base and, where all of it is trained, of that state; an adapter is on every rank.
    """
    trained = sum(p.numel() for p in flux.parameters() if p.requires_grad)
    frozen = sum(size_of(t) for t in (*flux.parameters(), *flux.buffers()) if not t.requires_grad)
    parts = {"transformer": frozen / ranks if sharded else frozen}
    if sharded:
        blocks = [sum(p.numel() for p in block.parameters()) for block in (*flux.double_blocks, *flux.single_blocks)]
        rest = sum(p.numel() for p in flux.parameters()) - sum(blocks)
        parts["two blocks and what is in none, gathered while they work"] = (2 * max(blocks) + rest) * dtype.itemsize
    what = "what is trained, its gradient, the optimizer's state and the average, if any"
    parts[what] = trained * per_trained / (1 if frozen or not sharded else ranks)
    return parts


def inputs(flux: Flux, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of what checkpointed blocks keep of the largest batch."""
    blocks = len(flux.double_blocks) + len(flux.single_blocks)
    size = blocks * flux.config.hidden_size * dtype.itemsize * tokens
    return {f"inputs of {blocks} blocks, kept for {tokens} tokens": size}


def predicted(parts: dict[str, float], vae: nn.Module, checkpointed: bool) -> list[str]:
    """A training step's memory, line by line."""
    parts = {**parts, "VAE": sum(map(size_of, (*vae.parameters(), *vae.buffers())))}
    rest = "what one block computes" if checkpointed else "all that is kept for backward"
    parts[f"and {rest}: measured, in the bar and metrics.jsonl"] = sum(parts.values())
    return [f"{size / GB:8.3f} GB  {name}" for name, size in parts.items()]
