"""Memory: what is computed again instead of kept, attention's kernels, what a step will take, and what it takes."""

import os
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

from kontext_min.models.flux import Flux

GB = 1e9  # bytes
POLICIES = ("block", "keep_attn", "keep_gemm", "none")  # of recomputation, from the smallest to the fastest
LESS = dict(zip(POLICIES, (*POLICIES[1:], "none"), strict=True))  # the next of each
ATEN = torch.ops.aten
ATTENTION = {  # the products that attention is, on CUDA and on the CPU
    ATEN._scaled_dot_product_cudnn_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}
# what linears are, also rounded ones -> which argument is the weight, (in, out)
PRODUCTS = {ATEN.mm.default: 1, ATEN.addmm.default: 2, ATEN._int_mm.default: 1, ATEN._scaled_mm.default: 1}
FUSED, FUSED_BACKWARD = (getattr(ATEN, f"_scaled_dot_product_flash_attention_for_cpu{s}") for s in ("", "_backward"))
FLOPS = flop_registry | {  # operator -> its FLOPs: torch's formulas, and those of the same under other names
    FUSED: flop_registry[ATEN._scaled_dot_product_flash_attention],
    FUSED_BACKWARD: flop_registry[ATEN._scaled_dot_product_flash_attention_backward],
    ATEN._int_mm: flop_registry[ATEN.mm],
}


def apply_checkpointing(flux: Flux, policy: str = "block", every: int | None = None, less: int = 0):
    """Compute what every n-th block did again in backward, but for what is kept of it. Gradients stay the same.
    policy: keeps of a block its input (`block`), what attention gives too (`keep_attn`), or what the linears give too,
    so that only what is cheap is computed again (`keep_gemm`), or all (`none`), as the last block does in any case.
    less: that many of them, the last, have the policy after that; the first in backward, they soon let go of it.
    """
    width = flux.config.hidden_size

    def decide(policy: str, _, op, *args, **kwargs) -> CheckpointPolicy:
        keep = op in ATTENTION
        if policy == "keep_gemm" and op in PRODUCTS:
            inputs, outputs = args[PRODUCTS[op]].shape
            keep = width <= inputs <= outputs  # not an adapter's, nor the last of a block: that is never needed again
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    blocks = [*flux.double_blocks, *flux.single_blocks][:-1:every]
    for i, block in enumerate(blocks):
        own = policy if i < len(blocks) - less else LESS[policy]
        if own == "none":
            continue
        contexts = partial(create_selective_checkpoint_contexts, partial(decide, own))
        selective = {} if own == "block" else {"context_fn": contexts}
        gated = any(p.requires_grad for name, p in block.named_parameters() if "mod" in name)
        part = "forward" if gated else "branch"  # a trained gate needs what it multiplies, which is not kept
        setattr(block, part, partial(checkpoint, getattr(block, part), use_reentrant=False, **selective))


def attention_kernels(device: torch.device) -> AbstractContextManager:
    """Within the context, on sm_90, FlashAttention-3 comes first if it is installed, else cuDNN's, as fast there."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return nullcontext()
    first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if find_spec("flash_attn_interface"):
        activate_flash_attention_impl("FA3")  # in the place of torch's flash attention
        first.reverse()
    return sdpa_kernel([*first, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


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


class Counted(TorchDispatchMode):
    """Bytes of tensors made within it, `live` and at most `peak`; `flops` of products; bytes `moved` by the rest."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.moved, self.known, self.flops = 0, 0, 0, set(), Counter()

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        out, operator = func(*args, **(kwargs or {})), func._overloadpacket
        given, made = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
        if operator in FLOPS:
            self.flops[operator] += FLOPS[operator](*args, **(kwargs or {}), out_val=out)
        old = {t.untyped_storage()._cdata for t in given}
        new = {s._cdata: s for s in (t.untyped_storage() for t in made) if s._cdata not in old}
        if operator not in FLOPS and (new or func._schema.is_mutable):  # no view
            self.moved += sum(t.nbytes for t in (*given, *made))
        for storage in new.values():
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key: int, size: int):
        self.known.discard(key)
        self.live -= size


def counted(compute: Callable[[], Tensor]) -> Counted:
    """What `compute`, and the backward pass of a loss, take. On meta nothing is computed, and all of it counted.
    Attention is one product, not a matrix of all pairs, and an RMS norm one operator, for which a layer norm stands.
    """
    plain = F.scaled_dot_product_attention, F.rms_norm
    F.scaled_dot_product_attention = lambda query, key, value, **_: FUSED(query, key, value)[0]
    F.rms_norm = lambda x, shape, scale, eps: F.layer_norm(x, shape, scale, None, eps)
    try:
        with Counted() as found:
            out = compute()
            if out.requires_grad:
                out.backward()
    finally:
        F.scaled_dot_product_attention, F.rms_norm = plain
    return found
