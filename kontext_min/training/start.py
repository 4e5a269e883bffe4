"""What the screen says before the first step: model, adapter, data, and the memory that this will take."""

import math

from kontext_min import memory, presets
from kontext_min.adapters.inject import updates
from kontext_min.config import Config
from kontext_min.data.check import histogram
from kontext_min.data.examples import Examples
from kontext_min.edit import Editor
from kontext_min.encoders import pixels_per_token


def screen(config: Config, editor: Editor, examples: Examples) -> list[str]:
    """One screen, line by line."""
    flux, preset = editor.flux, presets.preset_of(examples.checkpoint.folder)
    kept = [p for name, p in flux.named_buffers() if name.endswith(".weight")]  # of a quantised base
    frozen = sum(p.numel() for p in (*flux.parameters(), *kept) if not p.requires_grad)
    trained = sum(p.numel() for p in flux.parameters() if p.requires_grad)
    adapters = list(updates(flux))
    batches = examples.epoch(0, config.train_batch_size)
    steps = math.ceil(len(batches) / config.gradient_accumulation_steps)
    pixels = max(len(batch) * sum(math.prod(view.size) for view in batch[0].views()) for batch in batches)
    text = preset.text_shape[0] * max(map(len, batches))
    tokens = text + pixels // pixels_per_token(editor.vae) ** 2
    pairs = sum(bool(example.references) for example in examples.examples)
    return [
        f"model    {config.pretrained_model_name_or_path}: {frozen:,} parameters, frozen, on {editor.device}",
        f"adapter  LoRA of rank {config.lora_rank} on {len(adapters)} modules: {trained:,} trainable parameters",
        f"data     {pairs} pairs and {len(examples) - pairs} pictures without a reference",
        f"epoch    {sum(map(len, batches))} uses in {len(batches)} batches: {steps} steps; "
        f"max_train_steps {config.max_train_steps} is {config.max_train_steps / steps:.1f} epochs",
        *histogram(examples.examples),
        "memory:",
        *memory.predicted(flux, editor.vae, tokens, config.gradient_checkpointing),
    ]
