"""Adapter files -> updates of named modules, in every format of adapters/formats.py.

Everything a file holds is used or refused by name: an unknown key, a missing half, a NaN, no match at all is an error.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kontext_min.adapters.formats import CONFIG_KEY, RECIPE_KEY, SWAPPED_THEIRS
from kontext_min.adapters.layers import LoRA, Update
from kontext_min.checkpoints.tensors import open_safetensors

PREFIXES = ("transformer.", "base_model.model.", "")  # diffusers, a raw PEFT save, none
HALVES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_A.default.weight": "A", ".lora_B.default.weight": "B"}


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
