"""Choosing the modules to adapt, wrapping them, and taking the updates off again.

Module names are diffusers' (`transformer_blocks.0.attn.to_q`), known to trainers and files; where such a module
is a range of rows in one of our fused linears, the update acts on these rows alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from kontext_min.adapters.formats import SWAPPED_THEIRS
from kontext_min.adapters.layers import Adapted, LoRA
from kontext_min.checkpoints.keys import SWAPPED, flux_linears
from kontext_min.models.flux import Flux, FluxConfig

# fmt: off
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CONTEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_CONTEXT_FF = ("ff_context.net.0.proj", "ff_context.net.2")
_ALL = (*_ATTENTION, *_CONTEXT)
_ALL_FF = (*_ALL, "ff.net.0.proj", "ff.net.2", *_CONTEXT_FF, "proj_mlp", "proj_out")
TARGETS = {  # `flux_lora_target` -> endings of module names, as SimpleTuner has them
    "all":              _ALL,
    "context":          _CONTEXT,
    "context+ffs":      (*_CONTEXT, *_CONTEXT_FF),
    "all+ffs":          _ALL_FF,
    "all+ffs+embedder": (*_ALL_FF, "x_embedder"),
    "ai-toolkit":       (*_ALL_FF, "norm.linear", "norm1.linear", "norm1_context.linear"),
    "tiny":             ("single_transformer_blocks.7.proj_out", "single_transformer_blocks.20.proj_out"),
    "nano":             ("single_transformer_blocks.7.proj_out",),
    "mmdit":            ("transformer_blocks.*.attn.*", "transformer_blocks.*.ff*"),  # all but the modulation
}
# fmt: on


def matching_modules(config: FluxConfig, patterns: Sequence[str]) -> list[str]:
    """Diffusers names of the linears that match, in the table's order.

    A pattern is the ending of a name in whole dotted words, or has `*` and matches a whole name.
    """
    names = [part.name for parts in flux_linears(config).values() for part in parts]
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name fits a pattern."""
    return fnmatchcase(name, pattern) if "*" in pattern else f".{name}".endswith(f".{pattern}")


def add_lora(flux: Flux, names: list[str], rank: int, alpha: float, dropout: float = 0.0) -> list[nn.Parameter]:
    """Put a fresh update on every named module. -> the new parameters on the model's device, in the table's order.

    dropout: share of each update's inputs left out in training. The draws come from torch's global generator: seed it.
    """
    wanted = set(names)
    parameters = []
    for ours, parts in flux_linears(flux.config).items():
        for part in parts:
            if part.name in wanted:
                linear = flux.get_submodule(ours)
                inputs = (linear.base if isinstance(linear, Adapted) else linear).in_features
                lora = LoRA.fresh(part.name, (part.rows, inputs), rank, alpha, part.start)
                lora.dropout = dropout
                parameters += attach(flux, ours, lora)
    return parameters


def attach(flux: Flux, ours: str, lora: LoRA) -> list[nn.Parameter]:
    """Wrap one of our linears (once) and add an update to it."""
    linear = flux.get_submodule(ours)
    if not isinstance(linear, Adapted):
        owner, _, leaf = ours.rpartition(".")
        linear = Adapted(linear)
        setattr(flux.get_submodule(owner), leaf, linear)
    linear.updates.append(lora.to(linear.base.weight.device))
    return list(lora.parameters())


def apply_weights(flux: Flux, weights: dict[str, tuple[Tensor, Tensor, float]], strength: float, dtype: torch.dtype):
    """Attach a trained adapter: diffusers name -> (A, B, scale). Raises ValueError on unknown names or wrong shapes."""
    places = {part.name: (ours, part) for ours, parts in flux_linears(flux.config).items() for part in parts}
    unknown = sorted(set(weights) - set(places))
    if unknown:
        raise ValueError(f"the LoRA has {len(unknown)} modules that this model does not: {', '.join(unknown[:5])}")
    for name, (a, b, scale) in weights.items():
        ours, part = places[name]
        linear = flux.get_submodule(ours)
        inputs = (linear.base if isinstance(linear, Adapted) else linear).in_features
        if (a.shape[1], b.shape[0]) != (inputs, part.rows):
            raise ValueError(
                f"the LoRA's {name} maps {a.shape[1]} to {b.shape[0]} channels, the model's {inputs} to {part.rows}; "
                f"it was made for another model"
            )
        b = torch.cat(b.chunk(2)[::-1]) if ours == SWAPPED else b
        attach(flux, ours, LoRA(name, a.to(dtype), b.to(dtype), scale * strength, part.start).requires_grad_(False))


def start_from(flux: Flux, weights: dict[str, tuple[Tensor, Tensor, float]]):
    """Give the fresh updates the values of a trained adapter: diffusers name -> (A, B, scale), as files have it.

    Raises ValueError unless both have the same modules and rank.
    """
    fresh = {update.name: update for update in updates(flux)}
    if odd := sorted(fresh.keys() ^ weights.keys()):
        raise ValueError(f"init_lora: {len(odd)} modules are not in both, {', '.join(odd[:3])}; set flux_lora_target")
    for name, (a, b, scale) in weights.items():
        if (a.shape, b.shape) != (fresh[name].A.shape, fresh[name].B.shape):
            raise ValueError(f"init_lora: {name} is of rank {len(a)}, {a.shape[1]} to {len(b)} channels; set lora_rank")
        b = torch.cat(b.chunk(2)[::-1]) if name == SWAPPED_THEIRS else b
        fresh[name].A.data.copy_(a)
        fresh[name].B.data.copy_(b * (scale / fresh[name].scale))


def updates(flux: Flux) -> Iterator[LoRA]:
    """Every update in the model, in the model's order."""
    return (module for module in flux.modules() if isinstance(module, LoRA))


def detach_all(flux: Flux):
    """Take every update off: the model is the very one that it was."""
    for name, module in list(flux.named_modules()):
        if isinstance(module, Adapted):
            owner, _, leaf = name.rpartition(".")
            setattr(flux.get_submodule(owner), leaf, module.base)


@contextmanager
def muted(flux: Flux, pattern: str = "*"):
    """Within the context the updates on modules of such names are off; without any it it is the base, bit by bit."""
    adapted = [m for name, m in flux.named_modules() if isinstance(m, Adapted) and fnmatchcase(name, pattern)]
    kept = [module.updates for module in adapted]
    for module in adapted:
        module.updates = nn.ModuleList()
    try:
        yield
    finally:
        for module, modules_updates in zip(adapted, kept, strict=True):
            module.updates = modules_updates
