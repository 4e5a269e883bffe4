"""Updates of named modules -> adapter files, in the formats that other programs read; every file is read back.

Strength is baked in (alpha is the rank), so that a reader that is blind to alpha sees the same. Where a format fuses
what we have apart, A are stacked and B lie block by block, and rows that nothing touches are zero; where it has apart
what we have fused, A is shared and B cut. Both are exact.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kontext_min.adapters.formats import CONFIG_KEY, FORMATS, KOHYA, RECIPE_KEY, SWAPPED_THEIRS
from kontext_min.adapters.layers import LoKr, LoRA, Update
from kontext_min.adapters.read import read_adapter
from kontext_min.checkpoints.keys import Part, flux_linears, flux_places
from kontext_min.models.flux import FluxConfig

WRITTEN = {  # what can be written -> how its tensors are called
    "diffusers": "diffusers",  # with PEFT's settings; ComfyUI and most others read it too
    "kohya": "kohya",  # sd-scripts, musubi, Forge, ComfyUI
    "comfy": "comfy",
    "bfl": "fal",  # BFL's names under fal's prefix: bare ones are read by no program that we know
    "lycoris": "lycoris",  # LyCORIS, SimpleTuner, ComfyUI
    "ai-toolkit": "diffusers",  # without PEFT's settings; also LoKr; ComfyUI
}
WITH_LOKR = ("kohya", "comfy", "lycoris", "ai-toolkit")
MAGNITUDES = {"diffusers": "lora_magnitude_vector"} | dict.fromkeys(("kohya", "comfy", "lycoris"), "dora_scale")
PER_ROW = ("B", "lokr_w1", "lokr_w1_a", "magnitude")  # what changes places where the weight's halves do
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of a delta-W, for rounding A and B
ERROR_KEY, UNKNOWN = "kontext_min_error", "unknown "  # the largest error of a delta-W as read back, in 8 characters
Placed = list[tuple[Update, int]]  # updates, each with its first row in our linear


def write_adapter(
    path: Path, updates: Sequence[Update], recipe: dict, dtype: torch.dtype, form: str = "diffusers"
) -> float:
    """Write updates in one of the formats WRITTEN, read them back and compare every linear's delta-W.

    recipe: what infer.py needs to show the adapter, kept in the header. -> the largest relative error of a delta-W.
    The file appears whole and verified or not at all: ValueError says what the format cannot hold, or what differs.
    """
    arranged = arrange(updates, form)
    tensors = {name: tensor for update in arranged for name, tensor in tensors_of(update, form, dtype).items()}
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata=header(arranged, recipe, form) | {ERROR_KEY: UNKNOWN})
        error, where = largest_error(updates, read_adapter(temporary).updates)
        if not error <= TOLERANCE[dtype]:
            raise ValueError(
                f"{path} is not written: read back, the change of {where} is {error:.1e} of its size away; "
                f"fp32 may hold it"
            )
        with open(temporary, "r+b") as file:
            text = file.read(8 + int.from_bytes(file.read(8), "little"))
            file.seek(8 + text.index(UNKNOWN.encode()))
            file.write(f"{error:8.1e}".encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return error


def caveat(updates: Sequence[Update], form: str) -> str:
    """What diffusers (0.42) leaves out of such a file, in one sentence; "" where it reads all of it."""
    outside = [update.name for update in updates if "blocks" not in update.name]
    if form == "lycoris" or any(isinstance(update, LoKr) for update in updates):
        return "diffusers does not read this; ComfyUI does"
    if form == "bfl":
        return "diffusers reads these names if every linear of all blocks is there; ComfyUI does not"
    if form in ("kohya", "comfy") and outside:
        return f"diffusers leaves out what is not in a block, silently: {', '.join(outside)}; ComfyUI does not"
    if form in ("kohya", "comfy") and any(update.magnitude is not None for update in updates):
        return "diffusers leaves out dora_scale; ComfyUI does not"
    return ""


# ------------------------------------------------------------------------------------------------ arranging


def placed(updates: Sequence[Update]) -> dict[str, tuple[list[Part], Placed]]:
    """Our linears that are touched -> their parts and their updates.

    No model need be at hand: the width is what a fused linear takes, and in a FLUX all else follows from it.
    """
    fused = {ours for ours, parts in flux_linears(FluxConfig()).items() if len(parts) > 1}
    places = flux_places(FluxConfig())
    width = next((update.shape[1] for update in updates if places[update.name][0] in fused), 64)
    config = replace(FluxConfig(), hidden_size=width, num_heads=1, axes_dim=(width,))
    places, found = flux_places(config), {ours: (parts, []) for ours, parts in flux_linears(config).items()}
    for update in updates:
        ours, part = places[update.name]
        if ours in fused and update.shape != (part.rows, width):
            raise ValueError(f"{update.name} is {list(update.shape)}, beside others of {width} channels: no FLUX is so")
        if ours not in fused:
            found[ours][0][0] = found[ours][0][0]._replace(rows=update.shape[0])
        found[ours][1].append((update, part.start))
    return {ours: (parts, here) for ours, (parts, here) in found.items() if here}


def arrange(updates: Sequence[Update], form: str) -> list[Update]:
    """The same change as one update of strength 1 for each of the format's modules."""
    arranged = []
    for ours, (parts, here) in placed(updates).items():
        whole = Part(ours, 0, sum(part.rows for part in parts))
        for part in [whole] if FORMATS[WRITTEN[form]].names == "bfl" else parts:
            end = part.start + part.rows
            touching = [(u, start) for u, start in here if start < end and part.start < start + u.shape[0]]
            if any(isinstance(update, LoKr) for update, _ in touching):
                arranged.append(cut_lokr(touching, part, form))
            elif touching:
                arranged.append(join_loras(touching, part))
            else:
                continue
            arranged[-1].magnitude = magnitude(touching, part, form)
    return [update for update in arranged if rank(update)]  # 0: a part that a fused update leaves as it is


def join_loras(touching: Placed, part: Part) -> LoRA:
    """LoRAs that touch some rows as one of these rows: each A once, B where its rows are, strength in B."""
    a, b = [], []
    for update, start in touching:
        low, high = max(start, part.start), min(start + update.shape[0], part.start + part.rows)
        A, B = update.A.detach().float(), update.B.detach().float() * update.scale
        rows = B.new_zeros(part.rows, B.shape[1])
        rows[low - part.start : high - part.start] = B[low - start : high - start]
        same = next((i for i, other in enumerate(a) if torch.equal(other, A)), None)
        if same is None:
            a, b = [*a, A], [*b, rows]
        else:
            b[same] += rows
    A, B = torch.cat(a), torch.cat(b, dim=1)
    if touching[0][0].shape[0] > part.rows and touching[0][0].magnitude is None:  # cut: what is not of these rows goes
        used = B.any(dim=0)
        A, B = A[used], B[:, used]
    return LoRA(part.name, A, B, 1.0, part.start).requires_grad_(False)


def cut_lokr(touching: Placed, part: Part, form: str) -> LoKr:
    """A Kronecker product on some of its rows, where it still is one: the rows of w1 that stand for them."""
    update, start = touching[0]
    w1, w2 = ([factor.detach().float() for factor in side] for side in (update.w1, update.w2))
    low, step = part.start - start, w2[0].shape[0]
    cuttable = 0 <= low <= update.shape[0] - part.rows and low % step == part.rows % step == 0
    if form not in WITH_LOKR or len(touching) > 1 or not cuttable:
        raise ValueError(
            f"{update.name} is a Kronecker product (LoKr), which a {form} file cannot hold for {part.name}; "
            f"give --rank, to make a LoRA of it, or another --to: {', '.join(WITH_LOKR)}"
        )
    w1[0] = w1[0][low // step : (low + part.rows) // step] * update.scale
    return LoKr(part.name, tuple(w1), tuple(w2), 1.0, part.start).requires_grad_(False)


def magnitude(touching: Placed, part: Part, form: str) -> Tensor | None:
    """DoRA's magnitude (rows,) of a part; None without DoRA. ValueError unless the format and every row have one."""
    touching = sorted(touching, key=lambda item: item[1])
    given, first = [update.magnitude for update, _ in touching], touching[0][1]
    if all(values is None for values in given):
        return None
    if form not in MAGNITUDES:
        raise ValueError(f"{form} files have no place for DoRA's magnitudes; choose --to {', '.join(MAGNITUDES)}")
    if any(values is None for values in given) or sum(map(len, given)) < part.rows:
        raise ValueError(f"{part.name} has DoRA on some of its rows only; --to diffusers keeps its parts apart")
    return torch.cat([values.detach().float() for values in given])[part.start - first :][: part.rows]


# ------------------------------------------------------------------------------------------------ the file


def tensors_of(update: Update, form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """An arranged update's tensors by their names in the file."""
    table = FORMATS[WRITTEN[form]]
    if isinstance(update, LoRA):
        found = {"A": update.A, "B": update.B}
    else:
        sides = (("lokr_w1", update.w1), ("lokr_w2", update.w2))
        found = {n if len(side) == 1 else f"{n}_{'ab'[i]}": t for n, side in sides for i, t in enumerate(side)}
    if update.magnitude is not None:
        found["magnitude"] = update.magnitude if form == "diffusers" else update.magnitude[:, None]
    if update.name == SWAPPED_THEIRS:
        found = {name: torch.cat(t.chunk(2)[::-1]) if name in PER_ROW else t for name, t in found.items()}
    found = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in found.items()}
    if (table.a, table.b) == KOHYA or isinstance(update, LoKr):
        found["alpha"] = torch.tensor(float(rank(update)))
    endings = {"A": table.a, "B": table.b, "magnitude": MAGNITUDES.get(form)}
    return {f"{table.stem(update.name)}.{endings.get(name, name)}": tensor for name, tensor in found.items()}


def rank(update: Update) -> int:
    """Of a LoRA, or of the factored side of a LoKr (w2's before w1's); 1 for a LoKr of two full sides."""
    sides = [(update.B, update.A)] if isinstance(update, LoRA) else [update.w2, update.w1]
    return next((side[1].shape[0] for side in sides if len(side) == 2), 1)


def header(updates: list[Update], recipe: dict, form: str) -> dict[str, str]:
    """The file's metadata: our recipe, modelspec, and what the format's own programs look for."""
    ranks = {update.name: rank(update) for update in updates}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    kind = "LoKr" if any(isinstance(update, LoKr) for update in updates) else "LoRA"
    own = {}
    if form == "diffusers":
        settings = {f"transformer.{key}": value for key, value in peft_settings(updates, ranks, usual).items()}
        own = {CONFIG_KEY: json.dumps(settings, indent=2, sort_keys=True)}
    elif form == "kohya":
        own = {
            "ss_network_module": "networks.lora_flux" if kind == "LoRA" else "lycoris.kohya",
            "ss_network_dim": str(usual),
            "ss_network_alpha": str(usual),
            "ss_network_args": json.dumps({} if kind == "LoRA" else {"algo": "lokr"}),
            "ss_base_model_version": "flux_kontext",
        }
    elif form == "lycoris":
        config = {"algo": kind.lower(), "multiplier": 1.0, "linear_dim": usual, "linear_alpha": usual}
        own = {"lycoris_config": json.dumps(config)}
    return own | {
        "format": "pt",
        RECIPE_KEY: json.dumps(recipe),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "flux-kontext/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": str(recipe.get("title", "kontext_min LoRA")),
        "modelspec.resolution": recipe.get("size", "1024x1024"),
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.description": f"{kind} of {recipe.get('model', 'FLUX.1 Kontext')}, rank {usual}, alpha baked in",
    }


def peft_settings(updates: list[Update], ranks: dict[str, int], usual: int) -> dict:
    """PEFT's LoraConfig; alpha equals rank. ValueError where DoRA is on some modules only, which it cannot say."""
    dora = {update.magnitude is not None for update in updates}
    if len(dora) > 1:
        raise ValueError("some modules have DoRA and some do not, which diffusers cannot be told; choose --to kohya")
    pattern = {f"^{name}": r for name, r in ranks.items() if r != usual}  # ^: not every name that ends so
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": dora == {True},
        "use_rslora": False,
        "init_lora_weights": True,
    }


# ------------------------------------------------------------------------------------------------ comparing


def largest_error(given: Sequence[Update], read: Sequence[Update]) -> tuple[float, str]:
    """Both changes on our linears, one at a time: the largest relative error of delta-W or magnitude, and where."""
    ours, theirs = placed(given), placed(read)
    errors = [
        (apart(dense(ours.get(name), value), dense(theirs.get(name), value)), name)
        for name in ours | theirs
        for value in (lambda update: update.delta(), lambda update: update.magnitude)
    ]
    return max(errors)


def dense(side: tuple[list[Part], Placed] | None, value: Callable[[Update], Tensor | None]) -> Tensor:
    """What the updates of a linear are together, rows first, in fp32; 0 for none."""
    total = torch.zeros(())
    for update, start in side[1] if side else ():
        values = value(update)
        if values is not None:
            values = values.detach().float().cpu()
            if not total.ndim:
                total = torch.zeros(sum(part.rows for part in side[0]), *values.shape[1:])
            total[start : start + len(values)] += values
    return total


def apart(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |ours|, or |theirs| where ours is zero; infinity for NaN."""
    return float(((ours - theirs).norm() / (ours.norm() or 1.0)).nan_to_num(nan=float("inf")))
