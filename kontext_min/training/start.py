"""What the screen says before the first step: model, adapter, data, and the memory that this will take."""

import math
from collections import Counter

import torch
from torch import nn

from kontext_min import memory, parallel, presets
from kontext_min.adapters.inject import updates
from kontext_min.checkpoints import load
from kontext_min.config import Config
from kontext_min.data.check import histogram
from kontext_min.data.examples import Example, Examples
from kontext_min.edit import Editor
from kontext_min.encoders import pixels_per_token
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.quantize import QuantisedLinear, form_of, is_quantised, parts_of
from kontext_min.training.adapter import add_adapter
from kontext_min.training.items import TOKEN
from kontext_min.training.optim import make_optimizer


def screen(config: Config, editor: Editor, examples: Examples) -> list[str]:
    """One screen, line by line."""
    flux, (text, *_) = editor.flux, presets.preset_of(examples.checkpoint.folder).text_shape
    frozen = sum(p.numel() for p in flux.parameters() if not p.requires_grad)
    frozen += sum(m.in_features * m.out_features for m in flux.modules() if isinstance(m, QuantisedLinear))
    trained = sum(p.numel() for p in flux.parameters() if p.requires_grad)
    kinds = Counter(update.kind for update in updates(flux)).items()
    batches = examples.epoch(0, config.train_batch_size)
    share = config.gradient_accumulation_steps * parallel.world()
    steps, uses = math.ceil(len(batches) / share), sum(map(len, batches))
    pixels = max(len(batch) * sum(math.prod(view.size) for view in batch[0].views()) for batch in batches)
    tokens = text * max(map(len, batches)) + pixels // pixels_per_token(editor.vae) ** 2
    pairs, epochs = sum(bool(e.references) for e in examples.examples), config.max_train_steps / steps
    adapter = ", ".join(f"{kind} on {n} modules" for kind, n in kinds) or "none"
    ranks, dtype = parallel.world(), examples.dtype
    parts = memory.held(flux, bytes_of_one(config), dtype, ranks, config.sharded)
    parts |= memory.inputs(flux, tokens, dtype) if config.gradient_checkpointing else {}
    least = config.gradient_checkpointing and (config.recompute, config.gradient_checkpointing_interval or 1)
    return [
        f"model    {config.pretrained_model_name_or_path}: {frozen:,} frozen parameters, on {editor.device}",
        *[f"ranks    {ranks}, each with batches of its own"] * (ranks > 1),
        f"adapter  {adapter}: {trained:,} trainable parameters",
        f"data     {pairs} pairs and {len(examples) - pairs} pictures without a reference",
        f"epoch    {uses} uses in {len(batches)} batches: {steps} steps; max_train_steps {config.max_train_steps} is "
        f"{epochs:.1f} epochs",
        *histogram(examples.examples),
        "memory:" if ranks == 1 else "memory of each rank:",
        *memory.predicted(parts, editor.vae, least == ("block", 1)),
    ]


def per_rank(config: Config, examples: list[Example], text: int) -> list[str]:
    """What one GPU of several would hold, in GB: a table of ways to train. text: tokens of an instruction."""
    pixels = max(sum(math.prod(view.size) for view in example.views()) for example in examples)
    tokens = config.train_batch_size * (text + pixels // TOKEN**2)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    precision = "" if config.base_model_precision == "no_change" else f", {config.base_model_precision}"
    ways = {f"LoRA, the base{precision} on every GPU": False, "LoRA, the base in shards (fsdp_enable)": True}
    ways["all parameters, in shards (model_type full)"] = True
    lines = [
        f"GB on each GPU beside what one block computes, {tokens} tokens a step; GPUs:{'':10}1      2      4      8"
    ]
    for way, sharded in ways.items():
        flux = on_meta(config, dtype, full="full" in way, quantised=not sharded)
        found = [memory.held(flux, bytes_of_one(config), dtype, ranks, sharded) for ranks in (1, 2, 4, 8)]
        kept = sum(memory.inputs(flux, tokens, dtype).values())
        lines.append(f"  {way:74}" + "".join(f"{(sum(parts.values()) + kept) / memory.GB:7.1f}" for parts in found))
    return lines


def on_meta(config: Config, dtype: torch.dtype, full: bool, quantised: bool) -> Flux:
    """The config's transformer without weights, as it would be trained; of the published sizes if it is not here."""
    try:
        flux, *_ = load.empty_flux(load.find(presets.locate(config.pretrained_model_name_or_path), download=False))
    except FileNotFoundError:
        with torch.device("meta"):
            flux = Flux(FluxConfig())
    if full:
        return flux
    flux.to(dtype).requires_grad_(False)
    form = form_of(config.base_model_precision) if quantised else None
    for stem in [name.removesuffix(".weight") for name, _ in flux.named_parameters() if form and is_quantised(name)]:
        linear = flux.get_submodule(stem)
        flux.set_submodule(stem, QuantisedLinear(linear, parts_of(linear.weight, form)))
    with torch.device("meta"):
        add_adapter(config, flux)
    return flux


def bytes_of_one(config: Config) -> float:
    """What a trained parameter takes with its gradient, the optimizer's state and the average: asked of a step."""
    probe = nn.Parameter(torch.zeros(64, 64))  # where 8-bit moments begin
    optimizer = make_optimizer(config.optimizer, [probe], 0.0, **config.optimizer_options())
    probe.grad = torch.zeros_like(probe)
    optimizer.step()
    state = [value for value in optimizer.state[probe].values() if isinstance(value, torch.Tensor)]
    return sum(map(memory.size_of, (probe, probe.grad, *state))) / probe.numel() + 4 * config.use_ema
