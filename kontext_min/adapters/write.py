"""Updates of named modules -> adapter files, in the formats that other programs read; every file is read back.

Strength is baked in (alpha is the rank), so that a reader that is blind to alpha sees the same.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kontext_min.adapters.layers import LoKr, LoRA, Update
from kontext_min.adapters.merge import with_updates
from kontext_min.adapters.read import CONFIG_KEY, FORMATS, KOHYA, RECIPE_KEY, W1, W2, read_adapter
from kontext_min.adapters.rows import arrange, by_linear, swapped
from kontext_min.checkpoints.tensors import whole_file

_OUTSIDE = "diffusers silently leaves out DoRA's magnitudes and linears that are outside the blocks"
WRITTEN = {  # what can be written -> its table, whether a LoKr fits, the name of DoRA's magnitudes, what to know of it
    "diffusers":  (FORMATS["diffusers"], False, "lora_magnitude_vector", "ComfyUI and others read it, but not DoRA"),
    "kohya":      (FORMATS["kohya"],     True,  "dora_scale", _OUTSIDE),
    "comfy":      (FORMATS["comfy"],     True,  "dora_scale", _OUTSIDE),
    "bfl":        (FORMATS["fal"],       False, "", "diffusers reads it only if all linears of all blocks are there"),
    "lycoris":    (FORMATS["lycoris"],   True,  "dora_scale", "LyCORIS, SimpleTuner, ComfyUI read it, not diffusers"),
    "ai-toolkit": (FORMATS["diffusers"], True,  "", "diffusers does not read a LoKr"),
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of a delta-W, for rounding A and B
ERROR_KEY = "kontext_min_error"  # in the file's header: the largest relative error of a delta-W when it was read back


@torch.no_grad()
def write_adapter(path: Path, updates: Sequence[Update], recipe: dict, dtype: torch.dtype, form="diffusers") -> float:
    """Write updates in one of the formats WRITTEN, read them back and compare every linear's delta-W.
    recipe: what infer.py needs to show the adapter, kept in the header. -> the largest relative error, kept there too.
    The file appears whole and verified or not at all: ValueError says what the format cannot hold, or what differs.
    """
    table, with_lokr, magnitudes, _ = WRITTEN[form]
    arranged = arrange(updates, table.names == "bfl")
    if any(isinstance(update, LoKr) for update in arranged) and not with_lokr:
        raise ValueError(f"{form} files cannot hold a LoKr; --rank makes a LoRA of it, lycoris files hold it")
    if any(update.magnitude is not None for update in arranged) and not magnitudes:
        raise ValueError(f"{form} files cannot hold DoRA's magnitudes; diffusers and lycoris files do")
    if not arranged:
        raise ValueError("there is nothing to write: no update changes anything")
    tensors = {name: tensor for update in arranged for name, tensor in tensors_of(update, form, dtype).items()}
    metadata = header(arranged, recipe, form)
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata)
        error, where = largest_error(updates, read_adapter(temporary).updates)
        if not error <= TOLERANCE[dtype]:
            wider = {torch.float16: "; use --dtype bf16", torch.bfloat16: "; use --dtype fp32"}.get(dtype, "")
            raise ValueError(f"{path} is not written: read back, the change of {where} is off by {error:.1e}{wider}")
        save_file(tensors, temporary, metadata | {ERROR_KEY: f"{error:.1e}"})
    return error


def tensors_of(update: Update, form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """An arranged update's tensors by their names in the file; its strength is in B or w1."""
    (table, _, magnitudes, _), update = WRITTEN[form], swapped(update)
    if isinstance(update, LoRA):
        found = {table.a: update.A, table.b: update.B.float() * update.scale}
    else:
        names = (*W1[len(update.w1) - 1], *W2[len(update.w2) - 1])
        found = dict(zip(names, (update.w1[0].float() * update.scale, *update.w1[1:], *update.w2), strict=True))
    found = {ending: tensor.detach().to("cpu", dtype, copy=True).contiguous() for ending, tensor in found.items()}
    if update.magnitude is not None:  # of the size of the weight itself, not of its change, so never rounded
        magnitude = update.magnitude.detach().float().cpu()
        found[magnitudes] = magnitude if form == "diffusers" else magnitude[:, None]
    if (table.a, table.b) == KOHYA or isinstance(update, LoKr):
        found["alpha"] = torch.tensor(float(update.rank))
    return {f"{table.stem(update.name)}.{ending}": tensor for ending, tensor in found.items()}


def header(updates: list[Update], recipe: dict, form: str) -> dict[str, str]:
    """The file's metadata: our recipe, modelspec, and what the format's own programs look for."""
    ranks = {update.name: update.rank for update in updates}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    kind = "LoKr" if any(isinstance(update, LoKr) for update in updates) else "LoRA"
    own = {CONFIG_KEY: peft_settings(updates, ranks, usual)} if form == "diffusers" else {}
    home = "https://github.com/black-forest-labs/flux" if WRITTEN[form][0].names == "bfl" else "diffusers"
    return own | {
        "format": "pt", RECIPE_KEY: json.dumps(recipe), "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "flux-kontext/lora", "modelspec.implementation": home,
        "modelspec.title": str(recipe.get("title", f"kontext_min {kind}")),
        "modelspec.resolution": recipe.get("size", "1024x1024"),
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.description": f"{kind} of {recipe.get('model', 'FLUX.1 Kontext')}, rank {usual}, alpha baked in",
    }  # fmt: skip


def peft_settings(updates: list[Update], ranks: dict[str, int], usual: int) -> str:
    """PEFT's LoraConfig as JSON; alpha equals rank. ValueError where it cannot say which modules have DoRA."""
    dora = {update.magnitude is not None for update in updates}
    if len(dora) > 1:
        raise ValueError("some modules have DoRA and some do not, which a diffusers file cannot say; lycoris can")
    pattern = {f"^{name}": r for name, r in ranks.items() if r != usual}  # ^: not every name that ends so
    config = {
        "peft_type": "LORA", "r": usual, "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": pattern,
        "target_modules": sorted(ranks), "lora_dropout": 0.0, "bias": "none", "use_dora": dora == {True},
        "use_rslora": False, "init_lora_weights": True,
    }  # fmt: skip
    return json.dumps({f"transformer.{key}": value for key, value in config.items()}, indent=2, sort_keys=True)


def largest_error(given: Sequence[Update], read: Sequence[Update]) -> tuple[float, str]:
    """Both changes of a weight of zeros, one of our linears at a time: the largest relative error, and where."""
    device, errors = next(given[0].parameters()).device, []
    for whole, (_, here) in by_linear([*given, *read]).items():
        nothing = torch.zeros(whole.rows, here[0].shape[1], device=device)
        a, b = (with_updates(nothing, whole, [u for u in here if u in side]) for side in (given, read))
        error = (a - b).norm() / (a.norm() or 1.0)
        errors.append((float(error.nan_to_num(nan=float("inf"))), whole.name))
    return max(errors)
