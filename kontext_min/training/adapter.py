"""The adapter that a config asks for: which modules, what on each, and of what size."""

from torch import nn

from kontext_min.adapters.inject import CLASSES, TARGETS, adapt, matches, matching_modules
from kontext_min.adapters.layers import Kronecker
from kontext_min.config import Config, LyCORIS
from kontext_min.models.flux import Flux, FluxConfig


def add_adapter(config: Config, flux: Flux) -> list[nn.Parameter]:
    """Put fresh updates on the model. -> their parameters."""
    return adapt(flux, sizes(config, flux.config), config.lora_dropout, config.use_dora)


def sizes(config: Config, model: FluxConfig) -> dict[str, tuple[int, float] | Kronecker]:
    """Module's name -> (rank, alpha) of its LoRA, or the size of its LoKr. ValueError names what matches nothing."""
    names, lokr, ranks = matching_modules(model, patterns(config)), config.lycoris_config, config.lora_rank_pattern
    if not names:
        raise ValueError(f"flux_lora_target {config.flux_lora_target} matches no module of this model")
    said = {f"lora_rank_pattern {pattern}": [pattern] for pattern in ranks}
    said |= {f"module_algo_map {kind}": CLASSES[kind] for kind in (lokr.apply_preset.module_algo_map if lokr else ())}
    for what, endings in said.items():
        if not any(matches(name, pattern) for name in names for pattern in endings):
            raise ValueError(f"{what} fits none of the adapted modules; those are said by flux_lora_target")
    if lokr:
        return {name: kronecker(lokr, name) for name in names}
    fitting = {name: [rank for pattern, rank in ranks.items() if matches(name, pattern)] for name in names}
    chosen = {name: (*fits, config.lora_rank)[0] for name, fits in fitting.items()}
    return {name: (rank, config.lora_alpha or rank) for name, rank in chosen.items()}


def patterns(config: Config) -> tuple[str, ...] | list[str]:
    preset, target = config.lycoris_config and config.lycoris_config.apply_preset, config.flux_lora_target
    if preset and preset.target_module:
        return [pattern for kind in (*preset.target_module, *preset.module_algo_map) for pattern in CLASSES[kind]]
    if isinstance(target, str) and target not in TARGETS:
        raise ValueError(f"flux_lora_target {target!r} is none of {', '.join(TARGETS)}")
    return TARGETS[target] if isinstance(target, str) else target


def kronecker(config: LyCORIS, name: str) -> Kronecker:
    values = config.model_dump(include=set(Kronecker._fields))
    for kind, said in config.apply_preset.module_algo_map.items():
        if any(matches(name, pattern) for pattern in CLASSES[kind]):
            values |= said.model_dump(exclude={"algo"}, exclude_unset=True)
    if values["dim"] is None and not values["full_matrix"]:
        raise ValueError("lycoris_config needs linear_dim, or full_matrix: true")
    return Kronecker(**values)
