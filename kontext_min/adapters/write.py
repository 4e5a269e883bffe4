"""Updates of named modules -> adapter files. Written: diffusers, alpha baked in."""

import json
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file

from kontext_min.adapters.formats import CONFIG_KEY, RECIPE_KEY, SWAPPED_THEIRS
from kontext_min.adapters.layers import LoRA


def write_lora(path: Path, updates: list[LoRA], recipe: dict, dtype: torch.dtype):
    """Write updates in diffusers naming with the scale baked into B, so that every reader sees the same strength.

    recipe: what infer.py needs to show the LoRA, kept in the header. The file appears whole or not at all.
    """
    tensors, ranks = {}, {}
    for update in updates:
        b = update.B.detach().float() * update.scale
        b = torch.cat(b.chunk(2)[::-1]) if update.name == SWAPPED_THEIRS else b
        tensors[f"transformer.{update.name}.lora_A.weight"] = update.A.detach().to("cpu", dtype).contiguous()
        tensors[f"transformer.{update.name}.lora_B.weight"] = b.to("cpu", dtype).contiguous()
        ranks[update.name] = update.A.shape[0]
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=header(ranks, recipe))
    temporary.replace(path)


def header(ranks: dict[str, int], recipe: dict) -> dict[str, str]:
    """The file's metadata: PEFT's LoraConfig (alpha equals rank), modelspec, and our recipe."""
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {f"^{name}": r for name, r in ranks.items() if r != rank}  # ^: not every name that ends so
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    return {
        "format": "pt",
        CONFIG_KEY: json.dumps(
            {f"transformer.{key}": value for key, value in config.items()}, indent=2, sort_keys=True
        ),
        RECIPE_KEY: json.dumps(recipe),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "flux-kontext/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": str(recipe.get("title", "kontext_min LoRA")),
        "modelspec.resolution": recipe.get("size", "1024x1024"),
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.description": f"LoRA of {recipe.get('model', 'FLUX.1 Kontext')}, rank {rank}, alpha baked in",
    }
