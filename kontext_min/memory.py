"""Trading work for memory: activation checkpointing of the transformer's blocks."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from kontext_min.models.flux import Flux


def apply_checkpointing(flux: Flux, every: int = 1):
    """Keep only the input of every n-th block for backward and compute the rest again. Gradients stay the same."""
    for block in (*flux.double_blocks[::every], *flux.single_blocks[::every]):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
