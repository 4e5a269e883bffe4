"""What the screen says before the first step: model, adapter, data, and the memory that this will take."""

import math
from collections import Counter

import torch
from torch import nn

from kontext_min import memory, parallel, presets
from kontext_min.adapters.inject import updates
from kontext_min.config import Config
from kontext_min.data.check import histogram
from kontext_min.data.examples import Examples
from kontext_min.edit import Editor
from kontext_min.encoders import pixels_per_token
from kontext_min.training.optim import make_optimizer


def screen(config: Config, editor: Editor, examples: Examples) -> list[str]:
    """One screen, line by line."""
    flux, (text, *_) = editor.flux, presets.preset_of(examples.checkpoint.folder).text_shape
    kept = [p for name, p in flux.named_buffers() if name.endswith(".weight")]  # of a quantised base
    frozen = sum(p.numel() for p in (*flux.parameters(), *kept) if not p.requires_grad)
    trained = [p for p in flux.parameters() if p.requires_grad]
    here = sum(memory.size_of(p) / p.element_size() for p in trained)  # of shards, this rank's
    kinds = Counter(update.kind for update in updates(flux)).items()
    batches = examples.epoch(0, config.train_batch_size)
    share = config.gradient_accumulation_steps * parallel.world()
    steps, uses = math.ceil(len(batches) / share), sum(map(len, batches))
    pixels = max(len(batch) * sum(math.prod(view.size) for view in batch[0].views()) for batch in batches)
    tokens = text * max(map(len, batches)) + pixels // pixels_per_token(editor.vae) ** 2
    pairs, epochs = sum(bool(e.references) for e in examples.examples), config.max_train_steps / steps
    adapter = ", ".join(f"{kind} on {n} modules" for kind, n in kinds) or "none"
    ranks, checkpointed = parallel.world(), config.gradient_checkpointing
    return [
        f"model    {config.pretrained_model_name_or_path}: {frozen:,} parameters, frozen, on {editor.device}",
        *[f"ranks    {ranks}, each with batches of its own"] * (ranks > 1),
        f"adapter  {adapter}: {sum(p.numel() for p in trained):,} trainable parameters",
        f"data     {pairs} pairs and {len(examples) - pairs} pictures without a reference",
        f"epoch    {uses} uses in {len(batches)} batches: {steps} steps; max_train_steps {config.max_train_steps} is "
        f"{epochs:.1f} epochs",
        *histogram(examples.examples),
        "memory:",
        *memory.predicted(flux, editor.vae, tokens, examples.dtype, checkpointed, here * bytes_of_one(config)),
    ]


def bytes_of_one(config: Config) -> float:
    """What a trained parameter takes with its gradient, the optimizer's state and the average: asked of a step."""
    probe = nn.Parameter(torch.zeros(64, 64))  # where 8-bit moments begin
    optimizer = make_optimizer(config.optimizer, [probe], 0.0, **config.optimizer_options())
    probe.grad = torch.zeros_like(probe)
    optimizer.step()
    state = [value for value in optimizer.state[probe].values() if isinstance(value, torch.Tensor)]
    return sum(map(memory.size_of, (probe, probe.grad, *state))) / probe.numel() + 4 * config.use_ema
