"""Adapter files -> updates of named modules, in every format of adapters/formats.py.

Everything a file holds is used or refused by name: an unknown key, a missing half, a NaN, no match at all is an error.
"""

import json
import math
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from kontext_min.adapters.formats import CONFIG_KEY, ENDINGS, FORMATS, RECIPE_KEY, SWAPPED_THEIRS, modules
from kontext_min.adapters.layers import LoKr, LoRA, Update
from kontext_min.adapters.rows import swapped
from kontext_min.checkpoints.tensors import FP8, open_safetensors, refuse

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *FP8)
REFUSED = {  # a regular expression of tensors' names -> what such tensors are, and what to do
    r"^(lora_te|text_encoder|clip_l|t5xxl).*\.(lora|lokr|hada)_":
        "tensors change a text encoder, which is not done here (save the LoRA of the transformer alone)",
    r"^(double|single)_blocks\..*\.lora_B\.bias$":
        "tensors are of a Control LoRA of BFL, which makes another model: it also replaces biases, norms and img_in",
    r"\.processor\.(qkv|proj)_lora":
        "tensors are in XLabs' format, which is not read here (load it in diffusers and save it again)",
    r"\.hada_": "tensors are of a LoHa, whose products of two LoRAs cannot be applied here (convert it to LoRA)",
    r"\.(lora_mid\.weight|lokr_t2)$": "tensors are of a convolution's update, of which the transformer has none",
    r"\.(diff|diff_b|set_weight|reshape_weight)$":
        "tensors replace or add whole weights, which cannot be applied here (extract a LoRA from them)",
    r"\.lora_[AB]\.bias$": "tensors are biases of a LoRA (lora_bias), which cannot be applied here",
}  # fmt: skip
W1, W2 = ([(f"lokr_{side}",), (f"lokr_{side}_a", f"lokr_{side}_b")] for side in ("w1", "w2"))
SIDES = [[("lora_B", "lora_A")], *([w1, w2] for w1 in W1 for w2 in W2)]  # what a module may have: a LoRA's or a LoKr's
USABLE = {  # in PEFT's settings; some initialisations change the frozen weights
    "peft_type": lambda value: value in (None, "LORA"),
    "init_lora_weights": lambda value: not str(value).startswith(("pissa", "olora", "corda", "loftq")),
}


@dataclass(frozen=True)
class AdapterFile:
    """A trained adapter: its updates in fp32, their rows in our order, and what its header says of showing it."""

    path: Path
    updates: list[Update]
    recipe: dict  # {} for files of other programs
    format: str  # of FORMATS
    header: dict[str, str]

    @property
    def title(self) -> str:
        """'kohya LoRA, 76 modules'."""
        kinds = {type(u).__name__ + (" with DoRA" if u.magnitude is not None else "") for u in self.updates}
        return f"{self.format} {' and '.join(sorted(kinds))}, {len(self.updates)} modules"


def split_lora(text: str) -> tuple[Path, float]:
    """'FILE:0.5' -> (FILE, 0.5); without a number the strength is 1."""
    file, _, scale = text.rpartition(":")
    try:
        return (Path(file), float(scale)) if file else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0  # the colon belongs to the path


def read_adapter(path: Path) -> AdapterFile:
    """An adapter file, or a folder with one. ValueError names what cannot be used."""
    if path.is_dir():
        own, raw = path / "pytorch_lora_weights.safetensors", path / "adapter_model.safetensors"  # PEFT's by itself
        path = raw if raw.exists() and not own.exists() else own
    handle = open_safetensors(path)
    header = handle.metadata() or {}
    names = sorted(handle.keys())
    for pattern, problem in REFUSED.items():
        refuse(str(path), problem, filter(re.compile(pattern).search, names))
    form, found = recognise(path, names)
    settings = lora_settings(header, path)
    updates = []
    for module, parts in found.items():
        tensors = {what: handle.get_tensor(name) for what, name in parts.items()}
        try:
            updates.append(update_of(module, tensors, settings))
        except ValueError as error:
            raise ValueError(f"{path}: {FORMATS[form].stem(module)} {error}") from error
    return AdapterFile(path, updates, json_object(header.get(RECIPE_KEY, "{}"), path), form, header)


def recognise(path: Path, names: list[str]) -> tuple[str, dict[str, dict[str, str]]]:
    """The format by which most tensors are named, and module -> {what a tensor is of it: the tensor's name}."""
    endings = ((name, ending) for name in names for ending in ENDINGS if name.endswith(f".{ending}"))
    split = {name: (name.removesuffix(f".{ending}"), ENDINGS[ending]) for name, ending in endings}
    if not split:
        held = ", ".join(names[:3]) or "no tensors"
        raise ValueError(f"{path} is no LoRA: it has {held} (a whole model is given as the model)")
    stems = {form: modules(FORMATS[form]) for form in FORMATS}
    form = max(stems, key=lambda form: sum(stem in stems[form] for stem, _ in split.values()))
    left_over = [name for name in names if name not in split or split[name][0] not in stems[form]]
    problem = f"tensors do not belong to a {form} LoRA of FLUX as the others do"
    if len(left_over) == len(names):
        problem = "tensors, and none is of a module of FLUX as any known format names it"
    refuse(str(path), problem, left_over)
    found: dict[str, dict[str, str]] = {}
    for name, (stem, what) in split.items():
        other = found.setdefault(stems[form][stem], {}).setdefault(what, name)
        if other != name:
            raise ValueError(f"{path}: {other} and {name} are the same half of one module")
    return form, found


def json_object(text: str, path: Path) -> dict:
    """What a program wrote of its settings."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: the settings that came with it are no JSON object: {text[:60]}") from error


def lora_settings(header: dict[str, str], path: Path) -> dict:
    """PEFT's LoraConfig, from the header or from adapter_config.json beside the file; {} where neither is there."""
    beside = path.parent / "adapter_config.json"
    raw = path.name == "adapter_model.safetensors" and beside.exists()
    text = header.get(CONFIG_KEY, beside.read_text(encoding="utf-8") if raw else "{}")
    values = {key.removeprefix("transformer."): value for key, value in json_object(text, path).items()}
    odd = [key for key in ("lora_bias", "use_qalora", "alora_invocation_tokens") if values.get(key)]
    odd += [f"{key} {values[key]}" for key, usable in USABLE.items() if not usable(values.get(key))]
    if odd:
        raise ValueError(f"{path} was made with {', '.join(odd)}, which cannot be applied here")
    return values


def update_of(module: str, tensors: dict[str, Tensor], settings: dict) -> Update:
    """The update of one module, checked. What is wrong is said as the rest of a sentence that begins with its name."""
    values = {what: checked(what, tensor) for what, tensor in tensors.items() if what != "alpha"}
    magnitude = values.pop("dora_scale", None)
    names = next((names for names in SIDES if set(chain(*names)) == values.keys()), None)
    if names is None:
        has = ", ".join(tensors)
        raise ValueError(f"has {has}; it needs lora_A and lora_B, or lokr_w1 and lokr_w2, each whole or its _a and _b")
    sides = [tuple(values[name] for name in side) for side in names]
    for side in sides:
        if any(factor.ndim != 2 for factor in side) or side[0].shape[1] != len(side[-1]) and len(side) == 2:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in values.items())
            raise ValueError(f"has {shapes}; these are no matrices, or do not share a rank")
    scale, ranks = 1.0, [len(side[1]) for side in sides if len(side) == 2]
    if ranks:  # else alpha is not used
        alpha = alpha_of(module, tensors, settings)
        scale = 1.0 if alpha is None else alpha / (math.sqrt(ranks[-1]) if settings.get("use_rslora") else ranks[-1])
    update = LoKr(module, *sides, scale) if len(sides) == 2 else LoRA(module, *reversed(sides[0]), scale)
    if magnitude is not None:
        if magnitude.shape not in ((update.shape[0],), (update.shape[0], 1)):
            shape = list(magnitude.shape)
            raise ValueError(f"has a DoRA scale of shape {shape}; only one for each output row, not input, is applied")
        update.magnitude = nn.Parameter(magnitude.flatten())
    elif settings.get("use_dora"):
        raise ValueError("has no lora_magnitude_vector, though the file says use_dora")
    return (swapped(update) if module == SWAPPED_THEIRS else update).requires_grad_(False)


def checked(what: str, tensor: Tensor) -> Tensor:
    """The tensor in fp32, unless it is no weight: integers, without values, NaN."""
    if tensor.dtype not in DTYPES or not tensor.numel():
        raise ValueError(f"has {what} of shape {list(tensor.shape)} in {tensor.dtype}, which is no LoRA's weight")
    if not torch.isfinite(tensor.float()).all():
        raise ValueError(f"holds NaN or infinity in {what}; the training that wrote it had failed")
    return tensor.float()


def alpha_of(module: str, tensors: dict[str, Tensor], settings: dict) -> float | None:
    """alpha of a module: its tensor's only value, else LoraConfig's; None where neither is there.

    There alpha_pattern comes before lora_alpha: module names, or regular expressions of how they end.
    """
    alpha = settings.get("lora_alpha")
    try:
        patterns = dict(settings.get("alpha_pattern") or {}).items()
        alpha = next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module)), alpha)
        alpha = tensors["alpha"].item() if "alpha" in tensors else alpha
        alpha = None if alpha is None else float(alpha)
    except (TypeError, ValueError, RuntimeError, re.error) as error:
        raise ValueError(f"has an alpha that cannot be understood: {error}") from error
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"has an alpha of {alpha}")
    return alpha
