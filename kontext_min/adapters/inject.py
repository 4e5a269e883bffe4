"""Choosing the modules to adapt, wrapping them, and taking the updates off again.

Module names are diffusers' (`transformer_blocks.0.attn.to_q`), known to trainers and files; where such a module
is a range of rows in one of our fused linears, the update acts on these rows alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from fnmatch import fnmatchcase

import torch
from torch import nn

from kontext_min.adapters.layers import Adapted, Kronecker, LoKr, LoRA, Update
from kontext_min.adapters.rows import SWAPPED_THEIRS, arrange, by_linear
from kontext_min.checkpoints.keys import flux_linears
from kontext_min.models.flux import Flux, FluxConfig

_CONTEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_CONTEXT_FF = ("ff_context.net.0.proj", "ff_context.net.2")
_ALL = ("to_q", "to_k", "to_v", "to_out.0", *_CONTEXT)
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
}  # fmt: skip


def matching_modules(config: FluxConfig, patterns: Sequence[str]) -> list[str]:
    """Diffusers names of the linears that match, in the table's order.
    A pattern is the ending of a name in whole dotted words, or has `*` and matches a whole name.
    """
    names = [part.name for parts in flux_linears(config).values() for part in parts]
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) if "*" in pattern else f".{name}".endswith(f".{pattern}")


def adapt(flux: Flux, sizes: dict[str, tuple[int, float] | Kronecker], dropout=0.0, dora=False) -> list[nn.Parameter]:
    """Put a fresh update on every named module: a LoRA of (rank, alpha), or a LoKr.
    dropout: share of each update's inputs left out in training. The draws come from torch's global generator: seed it.
    dora: train the length of each row of the weight too, beside its direction.
    -> the new parameters on the model's device, in the table's order.
    """
    parameters = []
    for ours, parts in flux_linears(flux.config).items():
        for part in (part for part in parts if part.name in sizes):
            size, shape = sizes[part.name], (part.rows, flux.get_submodule(ours).in_features)
            kind, size = (LoKr, [size]) if isinstance(size, Kronecker) else (LoRA, size)
            update = kind.fresh(part.name, shape, *size, part.start)
            if part.name == SWAPPED_THEIRS and isinstance(update, LoKr) and len(update.w1[0]) % 2:
                raise ValueError(f"{part.name}: no file could hold a LoKr whose w1 has an odd number of rows; use LoRA")
            update.dropout = dropout
            attach(flux, ours, update)
            if dora:
                update.magnitude = nn.Parameter(update.lengths(flux.get_submodule(ours).weight_of(update)).detach())
            parameters += update.parameters()
    return parameters


def attach(flux: Flux, ours: str, update: Update):  # wrap one of our linears (once) and add an update to it
    linear = flux.get_submodule(ours)
    if not isinstance(linear, Adapted):
        linear = Adapted(linear)
        flux.set_submodule(ours, linear)
    beside = getattr(linear.base, "weight", next(flux.parameters()))  # modulation computed elsewhere has none
    linear.updates.append(update.to(beside.device))


def apply_updates(flux: Flux, given: Sequence[Update], strength: float, dtype: torch.dtype):
    """Attach a trained adapter's updates, copied."""
    for whole, (_, here) in by_linear(given, flux).items():
        for update in here:
            update = at_strength(update, strength)
            for matrix in (parameter for parameter in update.parameters() if parameter.ndim > 1):
                matrix.data = matrix.data.to(dtype)
            attach(flux, whole.name, update)


def at_strength(update: Update, strength: float) -> Update:  # a copy whose change is so many times as large
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
    fresh, given = ({update.name: update for update in side} for side in (updates(flux), arrange(given, fused=False)))
    if odd := sorted(fresh.keys() ^ given.keys()):
        raise ValueError(f"init_lora: {len(odd)} modules are not in both, {', '.join(odd[:3])}; set flux_lora_target")
    for name, update in given.items():
        own = fresh[name]
        try:
            own.load_state_dict(update.state_dict())
        except RuntimeError as error:
            theirs, ours = (f"a {some.kind} for {list(some.shape)}" for some in (update, own))
            remedy = "set lora_rank, use_dora, or lora_type and lycoris_config"
            raise ValueError(f"init_lora: {name} is {theirs}, this run's is {ours}; {remedy}") from error
        (own.B if isinstance(own, LoRA) else own.w2[0]).data.mul_(update.scale / own.scale)


def updates(flux: Flux) -> Iterator[Update]:
    return (module for module in flux.modules() if isinstance(module, Update))


@contextmanager
def muted(flux: Flux, pattern: str = "*"):
    """Within the context the updates at and below these modules (`single_blocks.1`, `*` for anything) are off.
    With all of them off the outputs are the base model's to the last bit.
    """
    with ExitStack() as stack:
        for name, module in list(flux.named_modules()):
            if isinstance(module, Adapted) and fnmatchcase(f"{name}.", f"{pattern}.*"):
                stack.callback(flux.set_submodule, name, module)
                flux.set_submodule(name, module.base)
        yield
