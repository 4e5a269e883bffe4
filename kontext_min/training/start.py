"""What the screen says before the first step: model, adapter, data, and the memory that this will take."""

import math
from collections import Counter

from kontext_min import memory, parallel
from kontext_min.adapters.inject import updates
from kontext_min.config import Config
from kontext_min.data.check import histogram
from kontext_min.data.examples import Examples
from kontext_min.edit import Editor
from kontext_min.quantize import QuantisedLinear
from kontext_min.training.plan import Forecast, bytes_of_one, on_meta


def screen(config: Config, editor: Editor, examples: Examples, forecast: Forecast) -> list[str]:
    """One screen, line by line."""
    flux, ranks = editor.flux, parallel.world()
    frozen = sum(p.numel() for p in flux.parameters() if not p.requires_grad)
    frozen += sum(m.in_features * m.out_features for m in flux.modules() if isinstance(m, QuantisedLinear))
    trained = sum(p.numel() for p in flux.parameters() if p.requires_grad)
    kinds = Counter(update.kind for update in updates(flux)).items()
    batches = examples.epoch(0, config.train_batch_size)
    share = config.gradient_accumulation_steps * ranks
    steps, uses = math.ceil(len(batches) / share), sum(map(len, batches))
    pairs, epochs = sum(bool(e.references) for e in examples.examples), config.max_train_steps / steps
    adapter = ", ".join(f"{kind} on {n} modules" for kind, n in kinds) or "none"
    return [
        f"model    {config.pretrained_model_name_or_path}: {frozen:,} frozen parameters, on {editor.device}",
        *[f"ranks    {ranks}, each with batches of its own"] * (ranks > 1),
        f"adapter  {adapter}: {trained:,} trainable parameters",
        f"data     {pairs} pairs and {len(examples) - pairs} pictures without a reference",
        f"epoch    {uses} uses in {len(batches)} batches: {steps} steps; max_train_steps {config.max_train_steps} is "
        f"{epochs:.1f} epochs",
        *histogram(examples.examples),
        "memory:" if ranks == 1 else "memory of each rank:",
        *forecast.lines(),
    ]


def per_rank(forecast: Forecast) -> list[str]:
    """What one GPU of several would hold, in GB: a table of ways to train."""
    config, peak = forecast.config, forecast.work("block").peak
    kept = "" if config.base_model_precision == "no_change" else f", {config.base_model_precision}"
    plain = config.model_copy(update={"base_model_precision": "no_change"})
    ways = {f"LoRA, the base{kept} on every GPU": config, "LoRA, the base in shards (fsdp_enable)": plain}
    ways["all parameters, in shards (model_type full)"] = plain.model_copy(update={"model_type": "full"})
    lines = [f"GB on each GPU, {forecast.tokens} tokens a step, recompute block; GPUs:{'':13}1      2      4      8"]
    for way, asked in ways.items():
        flux, each = on_meta(asked, forecast.dtype), bytes_of_one(config)
        found = [memory.held(flux, each, forecast.dtype, ranks, asked is not config) for ranks in (1, 2, 4, 8)]
        lines.append(f"  {way:74}" + "".join(f"{(sum(parts.values()) + peak) / memory.GB:7.1f}" for parts in found))
    return lines
