"""Adapter files <-> updates of named modules. Read: PEFT and diffusers naming. Written: diffusers, alpha baked in.

Everything a file holds is used or refused by name: an unknown key, a missing half, a NaN, no match at all is an error.
"""

import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kontext_min.adapters.layers import LoRA, Update
from kontext_min.checkpoints.tensors import open_safetensors

PREFIXES = ("transformer.", "base_model.model.", "")  # diffusers, a raw PEFT save, none
HALVES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_A.default.weight": "A", ".lora_B.default.weight": "B"}
CONFIG_KEY = "lora_adapter_metadata"  # in the file's header: PEFT's LoraConfig as JSON, keys prefixed `transformer.`
RECIPE_KEY = "kontext_min"  # in the file's header: what infer.py needs to show this LoRA
SWAPPED_THEIRS = "norm_out.linear"


@dataclass(frozen=True)
class AdapterFile:
    """A trained adapter: its updates in fp32, their rows in our order, and what its header says of showing it."""

    path: Path
    updates: list[Update]
    recipe: dict  # {} for files of other programs


def read_adapter(path: Path) -> AdapterFile:
    """A LoRA file in diffusers or PEFT naming. ValueError names what cannot be used."""
    if path.is_dir():
        path = next((path / n for n in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
                     if (path / n).exists()), path / "pytorch_lora_weights.safetensors")  # fmt: skip
    handle = open_safetensors(path)
    header = handle.metadata() or {}
    names = sorted(handle.keys())
    prefix = next(p for p in PREFIXES if all(name.startswith(p) for name in names))
    halves: dict[str, dict[str, Tensor]] = {}
    left_over = []
    for name in names:
        ending = next((ending for ending in (*HALVES, ".alpha") if name.endswith(ending)), None)
        if ending is None:
            left_over.append(name)
            continue
        module = name.removeprefix(prefix).removesuffix(ending)
        halves.setdefault(module, {})[HALVES.get(ending, "alpha")] = handle.get_tensor(name)
    if left_over or not halves:
        shown = ", ".join(left_over[:5]) or "it has no tensors"
        raise ValueError(f"{path}: {len(left_over)} tensors are not LoRA weights in diffusers or PEFT naming: {shown}")
    settings = lora_settings(header, path)
    updates = [joined(path, module, parts, settings) for module, parts in halves.items()]
    return AdapterFile(path, updates, json.loads(header.get(RECIPE_KEY, "{}")))


def lora_settings(header: dict[str, str], path: Path) -> dict:
    """PEFT's LoraConfig, from the header or from adapter_config.json beside the file; {} where neither is there."""
    if CONFIG_KEY in header:
        values = json.loads(header[CONFIG_KEY])
        values = {key.removeprefix("transformer."): value for key, value in values.items()}
    elif path.name == "adapter_model.safetensors" and (path.parent / "adapter_config.json").exists():
        values = json.loads((path.parent / "adapter_config.json").read_text(encoding="utf-8"))
    else:
        return {}
    odd = [key for key in ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens") if values.get(key)]
    if odd:
        raise ValueError(f"{path} was made with {', '.join(odd)}, which cannot be applied here")
    return values


def joined(path: Path, module: str, parts: dict[str, Tensor], settings: dict) -> LoRA:
    """The update of one module, checked."""
    if "A" not in parts or "B" not in parts:
        raise ValueError(f"{path}: {module} has lora_{'A' if 'A' in parts else 'B'} but not its other half")
    a, b = parts["A"].float(), parts["B"].float()
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{path}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, which do not share a rank"
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError(f"{path}: {module} holds NaN or infinity; the training that wrote it had failed")
    alpha = float(parts["alpha"]) if "alpha" in parts else configured_alpha(module, settings)
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"{path}: the alpha of {module} is {alpha}")
    b = torch.cat(b.chunk(2)[::-1]) if module == SWAPPED_THEIRS else b
    rank = a.shape[0]
    scale = 1.0 if alpha is None else alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return LoRA(module, a, b, scale).requires_grad_(False)


def configured_alpha(module: str, settings: dict) -> float | None:
    """alpha of a module by LoraConfig: alpha_pattern (a name, or a regular expression of its end), else lora_alpha."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    alpha = settings.get("lora_alpha")
    return None if alpha is None else float(alpha)


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
