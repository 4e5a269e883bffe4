"""Choosing the modules to adapt, wrapping them, and taking the updates off again.

Module names are diffusers' (`transformer_blocks.0.attn.to_q`), known to trainers and files; where such a module
is a range of rows in one of our fused linears, the update acts on these rows alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from fnmatch import fnmatchcase

import torch
from torch import nn

from kontext_min.adapters.layers import Adapted, Kronecker, LoKr, LoRA, Update, take_rows
from kontext_min.checkpoints.keys import flux_linears, flux_places
from kontext_min.models.flux import Flux, FluxConfig

# fmt: off
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CONTEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_CONTEXT_FF = ("ff_context.net.0.proj", "ff_context.net.2")
_ALL = (*_ATTENTION, *_CONTEXT)
_FF = ("ff.net.0.proj", "ff.net.2", *_CONTEXT_FF)
_ALL_FF = (*_ALL, *_FF, "proj_mlp", "proj_out")
CLASSES = {"Attention": _ALL, "FeedForward": _FF}  # class in diffusers -> endings of its linears' names
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


def add_lora(
    flux: Flux, names: list[str], rank: int, alpha: float, dropout: float = 0.0, dora: bool = False
) -> list[nn.Parameter]:
    """Put a fresh LoRA on every named module. -> the new parameters on the model's device, in the table's order.

    dropout: share of each update's inputs left out in training. The draws come from torch's global generator: seed it.
    dora: train the length of each row of the weight too, beside its direction.
    """
    return add(flux, names, lambda name, shape, start: LoRA.fresh(name, shape, rank, alpha, start), dropout, dora)


def add_lokr(flux: Flux, names: list[str], size: Kronecker, dropout: float = 0.0) -> list[nn.Parameter]:
    """Put a fresh LoKr on every named module, otherwise as `add_lora`."""
    return add(flux, names, lambda name, shape, start: LoKr.fresh(name, shape, size, start), dropout)


def add(flux: Flux, names: list[str], fresh: Callable, dropout: float, dora: bool = False) -> list[nn.Parameter]:
    """Put what `fresh(name, (rows, in), start)` makes on every named module. -> the new parameters."""
    wanted = set(names)
    parameters = []
    for ours, parts in flux_linears(flux.config).items():
        for part in parts:
            if part.name in wanted:
                linear = flux.get_submodule(ours)
                inputs = (linear.base if isinstance(linear, Adapted) else linear).in_features
                update = fresh(part.name, (part.rows, inputs), part.start)
                update.dropout = dropout
                attach(flux, ours, update)
                if dora:
                    weight = flux.get_submodule(ours).weight_of(update)
                    update.magnitude = nn.Parameter(update.lengths(weight).detach())
                parameters += update.parameters()
    return parameters


def attach(flux: Flux, ours: str, update: Update):
    """Wrap one of our linears (once) and add an update to it."""
    linear = flux.get_submodule(ours)
    if not isinstance(linear, Adapted):
        owner, _, leaf = ours.rpartition(".")
        linear = Adapted(linear)
        setattr(flux.get_submodule(owner), leaf, linear)
    linear.updates.append(update.to(linear.base.weight.device))


def placed(flux: Flux, given: Sequence[Update]) -> list[tuple[Update, str, int]]:
    """Each update with our linear that it belongs to and its first row there. ValueError if it is for another model."""
    places = flux_places(flux.config)
    unknown = sorted({update.name for update in given} - set(places))
    if unknown:
        raise ValueError(f"the LoRA has {len(unknown)} modules that this model does not: {', '.join(unknown[:5])}")
    for update in given:
        ours, part = places[update.name]
        linear = flux.get_submodule(ours)
        inputs = (linear.base if isinstance(linear, Adapted) else linear).in_features
        if update.shape != (part.rows, inputs):
            rows, columns = update.shape
            raise ValueError(
                f"the LoRA's {update.name} maps {columns} to {rows} channels, the model's {inputs} to {part.rows}; "
                f"it was made for another model"
            )
    return [(update, places[update.name][0], places[update.name][1].start) for update in given]


def apply_updates(flux: Flux, given: Sequence[Update], strength: float, dtype: torch.dtype):
    """Attach a trained adapter's updates, copied. `detach_all` takes them off again, for others or other strengths."""
    for update, ours, start in placed(flux, given):
        update = at_strength(update, strength)
        for matrix in (parameter for parameter in update.parameters() if parameter.ndim > 1):
            matrix.data = matrix.data.to(dtype)
        update.start = start
        attach(flux, ours, update)


def at_strength(update: Update, strength: float) -> Update:
    """A copy whose change is so many times as large."""
    update = deepcopy(update)
    if update.magnitude is None:
        update.scale *= strength
    else:
        update.strength = strength
    return update


def start_from(flux: Flux, given: Sequence[Update]):
    """Give the fresh updates a trained adapter's values, those of a fused module to its parts.

    ValueError unless both have the same modules and ranks.
    """
    parts, fresh = flux_linears(flux.config), {update.name: update for update in updates(flux)}
    given = [
        update if update.name == part.name else take_rows(update, part.name, (part.start, part.start + part.rows))
        for update, ours, _ in placed(flux, given)
        for part in parts[ours]
        if update.name in (ours, part.name)
    ]
    if odd := sorted(fresh.keys() ^ {update.name for update in given}):
        raise ValueError(f"init_lora: {len(odd)} modules are not in both, {', '.join(odd[:3])}; set flux_lora_target")
    for update in given:
        own = fresh[update.name]
        values, wanted = dict(update.named_parameters()), dict(own.named_parameters())
        if {name: v.shape for name, v in values.items()} != {name: v.shape for name, v in wanted.items()}:
            raise ValueError(
                f"init_lora: {update.name} is a {update.kind} for {list(update.shape)}, this run's is a {own.kind} for "
                f"{list(own.shape)}; set lora_rank, use_dora, or lora_type and lycoris_config"
            )
        for name, value in values.items():
            wanted[name].data.copy_(value)
        (own.B if isinstance(own, LoRA) else own.w2[0]).data.mul_(update.scale / own.scale)


def updates(flux: Flux) -> Iterator[Update]:
    """Every update in the model, in the model's order."""
    return (module for module in flux.modules() if isinstance(module, Update))


def detach_all(flux: Flux):
    """Take every update off: the model is the very one that it was."""
    for name, module in list(flux.named_modules()):
        if isinstance(module, Adapted):
            owner, _, leaf = name.rpartition(".")
            setattr(flux.get_submodule(owner), leaf, module.base)


@contextmanager
def muted(flux: Flux, pattern: str = "*"):
    """Within the context the updates at and below these modules (`single_blocks.1`, `*` for anything) are off.

    With all of them off the outputs are the base model's to the last bit.
    """
    found = ((f"{name}.", module) for name, module in flux.named_modules() if isinstance(module, Adapted))
    adapted = [module for name, module in found if fnmatchcase(name, f"{pattern}.*")]
    kept = [module.updates for module in adapted]
    for module in adapted:
        module.updates = nn.ModuleList()
    try:
        yield
    finally:
        for module, modules_updates in zip(adapted, kept, strict=True):
            module.updates = modules_updates
