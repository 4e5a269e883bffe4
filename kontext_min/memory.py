"""Trading work for memory: activation checkpointing of the transformer's blocks."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from kontext_min.models.flux import Flux


def apply_checkpointing(flux: Flux):
    """Keep only the input of each block for backward and compute the rest again. Gradients stay the same."""
    for block in (*flux.double_blocks, *flux.single_blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
