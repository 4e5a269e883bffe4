"""The adapter that a config asks for: which modules, what on each, and of what size."""

from torch import nn

from kontext_min.adapters.inject import CLASSES, TARGETS, add_lokr, add_lora, matches, matching_modules
from kontext_min.adapters.layers import Kronecker
from kontext_min.config import Config, LyCORIS
from kontext_min.models.flux import Flux, FluxConfig


def add_adapter(config: Config, flux: Flux) -> list[nn.Parameter]:
    """Put fresh updates on the model. -> their parameters."""
    groups: dict[tuple, list[str]] = {}
    for name, size in sizes(config, flux.config).items():
        groups.setdefault(size, []).append(name)
    parameters = []
    for size, names in groups.items():
        if isinstance(size, Kronecker):
            parameters += add_lokr(flux, names, size, config.lora_dropout)
        else:
            parameters += add_lora(flux, names, *size, config.lora_dropout, config.use_dora)
    return parameters


def sizes(config: Config, model: FluxConfig) -> dict[str, tuple[int, float] | Kronecker]:
    """Module's name -> (rank, alpha) of its LoRA, or the size of its LoKr. ValueError names what matches nothing."""
    names = matching_modules(model, patterns(config))
    if not names:
        raise ValueError(f"flux_lora_target {config.flux_lora_target} matches no module of this model")
    ranks, alphas, lokr = config.lora_rank_pattern, config.lora_alpha_pattern, config.lycoris_config
    said = {f"lora_rank_pattern {p}": [p] for p in ranks} | {f"lora_alpha_pattern {p}": [p] for p in alphas}
    said |= {f"module_algo_map {kind}": CLASSES[kind] for kind in (lokr.apply_preset.module_algo_map if lokr else ())}
    for what, endings in said.items():
        if not any(matches(name, pattern) for name in names for pattern in endings):
            raise ValueError(f"{what} fits none of the adapted modules; those are said by flux_lora_target")
    if lokr:
        return {name: kronecker(lokr, name) for name in names}
    found = {name: first_fit(ranks, name, config.lora_rank) for name in names}
    return {name: (rank, first_fit(alphas, name, config.lora_alpha or rank)) for name, rank in found.items()}


def patterns(config: Config) -> tuple[str, ...] | list[str]:
    """What the names of the adapted modules match."""
    if config.lycoris_config and config.lycoris_config.apply_preset.target_module:
        preset = config.lycoris_config.apply_preset
        return [pattern for kind in (*preset.target_module, *preset.module_algo_map) for pattern in CLASSES[kind]]
    target = config.flux_lora_target
    if isinstance(target, str) and target not in TARGETS:
        raise ValueError(f"flux_lora_target {target!r} is none of {', '.join(TARGETS)}")
    return TARGETS[target] if isinstance(target, str) else target


def first_fit(table: dict[str, float], name: str, default: float) -> float:
    """The value of the first pattern that fits a name."""
    return next((value for pattern, value in table.items() if matches(name, pattern)), default)


def kronecker(config: LyCORIS, name: str) -> Kronecker:
    """The size of a module's LoKr: for all modules, but for what is said of its class."""
    size = Kronecker(**config.model_dump(include=set(Kronecker._fields)))
    for kind, said in config.apply_preset.module_algo_map.items():
        if any(matches(name, pattern) for pattern in CLASSES[kind]):
            size = size._replace(**said.model_dump(exclude={"algo"}, exclude_unset=True))
    if size.dim is None and not size.full_matrix:
        raise ValueError("lycoris_config needs linear_dim, or full_matrix: true")
    return size
