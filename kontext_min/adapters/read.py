"""Adapter files -> updates of named modules; the table of their formats, which adapters/write.py uses backwards.

A tensor's name is a prefix, a module's name and an ending. Where a format spells module names with underscores they
are looked up in `modules`, never parsed: `img_mlp_0` could be several things. Everything a file holds is used or
refused by name: an unknown key, a missing half, a NaN, no match at all is an error.
"""

import math
import re
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import json5
import torch
from torch import Tensor, nn

from kontext_min.adapters.layers import LoKr, LoRA, Update
from kontext_min.adapters.rows import swapped
from kontext_min.checkpoints.keys import flux_linears
from kontext_min.checkpoints.tensors import FP8, json_object, open_safetensors, refuse
from kontext_min.models.flux import FluxConfig


class Format(NamedTuple):
    """How a format makes a tensor's name of a module's."""

    prefix: str
    separator: str  # of the words of a module's name
    names: str  # whose: "bfl", with fused linears, or "diffusers", with their parts
    a: str  # ending of a LoRA's A (rank, in)
    b: str  # ending of its B (rows, rank)

    def stem(self, module: str) -> str:  # a module's name -> what its tensors' names begin with
        return self.prefix + module.replace(".", self.separator)


PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
FORMATS = {
    "diffusers":       Format("transformer.",       ".", "diffusers", *PEFT),  # also ai-toolkit, its LoKr too
    "kohya":           Format("lora_unet_",         "_", "bfl",       *KOHYA),  # also musubi, LyCORIS with kohya
    "comfy":           Format("diffusion_model.",   ".", "bfl",       *KOHYA),  # lora_A there is nothing to diffusers
    "bfl":             Format("",                   ".", "bfl",       *PEFT),
    "lycoris":         Format("lycoris_",           "_", "diffusers", *KOHYA),  # SimpleTuner, LyCORIS by itself
    "onetrainer":      Format("lora_transformer_",  "_", "diffusers", *KOHYA),
    "fal":             Format("base_model.model.",  ".", "bfl",       *PEFT),
    "peft":            Format("base_model.model.",  ".", "diffusers", *PEFT),
    "diffusers-peft":  Format("transformer.base_model.model.", ".", "diffusers", *PEFT),
    "diffsynth":       Format("",                   ".", "diffusers", "lora_A.default.weight", "lora_B.default.weight"),
    "comfy-diffusers": Format("diffusion_model.",   ".", "diffusers", *PEFT),
    "kohya-diffusers": Format("lora_unet_",         "_", "diffusers", *KOHYA),
}  # fmt: skip
W1, W2 = ([(f"lokr_{side}",), (f"lokr_{side}_a", f"lokr_{side}_b")] for side in ("w1", "w2"))
SIDES = [[("lora_B", "lora_A")], *([w1, w2] for w1 in W1 for w2 in W2)]  # what a module may have: a LoRA's or a LoKr's
ENDINGS = {end: half for form in FORMATS.values() for end, half in ((form.a, "lora_A"), (form.b, "lora_B"))}
ENDINGS |= {name: name for names in (*W1, *W2, ("alpha", "dora_scale")) for name in names}  # it is (rows, 1)
ENDINGS |= {"lora_magnitude_vector": "dora_scale"}  # PEFT's, (rows,)
ENDINGS |= {"lora.down.weight": "lora_A", "lora.up.weight": "lora_B"}  # diffusers' before there was PEFT
CONFIG_KEY = "lora_adapter_metadata"  # in the file's header: PEFT's LoraConfig as JSON, keys prefixed `transformer.`
RECIPE_KEY = "kontext_min"  # in the file's header: what infer.py needs to show this LoRA
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of PEFT's first values, those for which the base changes
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *FP8)
# a regular expression of tensors' names -> what such tensors are, and what to do; the first is of text encoders
TEXT_ENCODER, *_ = REFUSED = json5.loads(Path(__file__).with_suffix(".json5").read_text(encoding="utf-8"))


class AdapterFile(NamedTuple):
    """A trained adapter: its updates in fp32, their rows in our order, and what its header says of showing it."""

    path: Path
    updates: list[Update]
    recipe: dict  # {} for files of other programs
    format: str  # of FORMATS
    header: dict[str, str]

    @property
    def title(self) -> str:  # 'kohya LoRA, 76 modules'
        kinds = {type(u).__name__ + (" with DoRA" if u.magnitude is not None else "") for u in self.updates}
        return f"{self.format} {' and '.join(sorted(kinds))}, {len(self.updates)} modules"


def split_lora(text: str) -> tuple[Path, float]:  # 'FILE:0.5' -> (FILE, 0.5); without a number the strength is 1
    file, _, scale = text.rpartition(":")
    try:
        return (Path(file), float(scale)) if file else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0  # the colon belongs to the path


def read_adapter(path: Path, transformer_only: bool = False) -> AdapterFile:
    """An adapter file, or a folder with one. ValueError names what cannot be used, such as changes of a text encoder,
    unless it is `transformer_only` that is wanted or they are zero: then they are left out, which is said.
    """
    if path.is_dir():
        own, raw = path / "pytorch_lora_weights.safetensors", path / "adapter_model.safetensors"  # PEFT's by itself
        path = raw if raw.exists() and not own.exists() else own
    handle = open_safetensors(path)
    header = handle.metadata() or {}
    names = sorted(handle.keys())
    text = [name for name in names if re.match(TEXT_ENCODER, name)]
    told = (handle.get_tensor(name) for name in text if not name.endswith((".alpha", "down.weight", "lora_A.weight")))
    if text and (transformer_only or not any(tensor.float().any() for tensor in told)):
        print(f"{path}: {len(text)} tensors of a text encoder are left out{'' if transformer_only else ', all zero'}")
        names = [name for name in names if name not in text]
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
    ended = ((name, end) for name in names for end in ENDINGS if name.endswith(f".{end}"))
    split = {name: (name.removesuffix(f".{end}"), ENDINGS[end]) for name, end in ended}
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


def lora_settings(header: dict[str, str], path: Path) -> dict:
    """PEFT's LoraConfig, from the header or from adapter_config.json beside the file; {} where neither is there."""
    beside = path.parent / "adapter_config.json"
    raw = path.name == "adapter_model.safetensors" and beside.exists()
    text = header.get(CONFIG_KEY, beside.read_text(encoding="utf-8") if raw else "{}")
    values = {key.removeprefix("transformer."): value for key, value in json_object(text, path).items()}
    odd = [key for key in ("lora_bias", "use_qalora", "alora_invocation_tokens") if values.get(key)]
    method, start = values.get("peft_type"), str(values.get("init_lora_weights"))
    odd += [f"peft_type {method}"] if method not in (None, "LORA") else []
    odd += [f"init_lora_weights {start}"] if start.startswith(CHANGING) else []
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
    ranks = [len(side[1]) for side in sides if len(side) == 2]
    scale = scale_of(module, ranks[-1], tensors, settings) if ranks else 1.0  # without a rank alpha is not used
    update = LoKr(module, *sides, scale) if len(sides) == 2 else LoRA(module, *reversed(sides[0]), scale)
    if magnitude is not None:
        if magnitude.shape not in ((update.shape[0],), (update.shape[0], 1)):
            said = f"has a DoRA scale of shape {list(magnitude.shape)}"
            raise ValueError(f"{said}; only one for each output row is used (OneTrainer: lora_decompose_output_axis)")
        update.magnitude = nn.Parameter(magnitude.flatten())
    elif settings.get("use_dora"):
        raise ValueError("has no lora_magnitude_vector, though the file says use_dora")
    return swapped(update).requires_grad_(False)


def checked(what: str, tensor: Tensor) -> Tensor:
    """The tensor in fp32, unless it is no weight: integers, without values, NaN."""
    if tensor.dtype not in DTYPES or not tensor.numel():
        raise ValueError(f"has {what} of shape {list(tensor.shape)} in {tensor.dtype}, which is no LoRA's weight")
    if not torch.isfinite(tensor.float()).all():
        raise ValueError(f"holds NaN or infinity in {what}; the training that wrote it had failed")
    return tensor.float()


def scale_of(module: str, rank: int, tensors: dict[str, Tensor], settings: dict) -> float:
    """A module's alpha / rank; alpha is its tensor's only value, else LoraConfig's alpha_pattern's or lora_alpha."""
    alpha = settings.get("lora_alpha")
    try:  # patterns are module names, or regular expressions of how they end
        patterns = dict(settings.get("alpha_pattern") or {}).items()
        alpha = next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module)), alpha)
        alpha = tensors["alpha"].item() if "alpha" in tensors else alpha
        scale = 1.0 if alpha is None else float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (TypeError, ValueError, RuntimeError, re.error) as error:
        raise ValueError(f"has an alpha that cannot be understood: {error}") from error
    if not math.isfinite(scale):
        raise ValueError(f"has an alpha of {float(alpha)}")
    return scale


def modules(form: Format) -> dict[str, str]:
    """Stem of tensors' names -> module's name, for every linear of the largest model, in the model's order."""
    table = flux_linears(FluxConfig())
    names = table if form.names == "bfl" else [part.name for parts in table.values() for part in parts]
    return {form.stem(name): name for name in names}
