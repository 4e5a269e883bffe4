"""Updates of named modules -> adapter files, in the formats that other programs read; every file is read back.

Strength is baked in (alpha is the rank), so that a reader that is blind to alpha sees the same. Where a format fuses
what we have apart, A are stacked and B lie block by block, and rows that nothing touches are zero; where it has apart
what we have fused, A is shared and B cut. Both are exact.
"""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kontext_min.adapters.formats import CONFIG_KEY, FORMATS, KOHYA, RECIPE_KEY, SWAPPED_THEIRS
from kontext_min.adapters.layers import LoKr, LoRA, Update, take_rows
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
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of a delta-W, for rounding A and B
ERROR_KEY = "kontext_min_error"  # in the file's header: the largest relative error of a delta-W when it was read back
Placed = list[tuple[Update, int]]  # updates, each with its first row in our linear


@torch.no_grad()
def write_adapter(
    path: Path, updates: Sequence[Update], recipe: dict, dtype: torch.dtype, form: str = "diffusers"
) -> float:
    """Write updates in one of the formats WRITTEN, read them back and compare every linear's delta-W.

    recipe: what infer.py needs to show the adapter, kept in the header. -> the largest relative error, kept there too.
    The file appears whole and verified or not at all: ValueError says what the format cannot hold, or what differs.
    """
    arranged, temporary = arrange(updates, form), path.with_suffix(".tmp")
    tensors = {name: tensor for update in arranged for name, tensor in tensors_of(update, form, dtype).items()}
    metadata = header(arranged, recipe, form)
    try:
        save_file(tensors, temporary, metadata)
        error, where = largest_error(updates, read_adapter(temporary).updates)
        if not error <= TOLERANCE[dtype]:
            raise ValueError(
                f"{path} is not written: read back, the change of {where} is off by {error:.1e} of its size"
            )
        save_file(tensors, temporary, metadata | {ERROR_KEY: f"{error:.1e}"})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return error


def caveat(updates: Sequence[Update], form: str) -> str:
    """What diffusers (0.42) does not take from such a file, in one sentence; "" where it takes all of it."""
    if form in ("lycoris", "bfl") or any(isinstance(update, LoKr) for update in updates):
        return "diffusers does not read this" + " unless all linears of all blocks are there" * (form == "bfl")
    if form in ("kohya", "comfy"):
        left_out = [update.name for update in updates if "blocks" not in update.name]
        left_out += ["DoRA's magnitudes"] * any(update.magnitude is not None for update in updates)
        return f"diffusers silently leaves out {', '.join(left_out)}" if left_out else ""
    return ""


# ------------------------------------------------------------------------------------------------ arranging


def by_linear(updates: Sequence[Update]) -> dict[str, tuple[list[Part], Placed]]:
    """Our linears that are touched -> their parts and their updates.

    No model need be at hand: the width is what a fused linear takes, and in a FLUX all else follows from it.
    """
    fused = {ours for ours, parts in flux_linears(FluxConfig()).items() if len(parts) > 1}
    places = flux_places(FluxConfig())
    width = next((update.shape[1] for update in updates if places[update.name][0] in fused), 64)
    config = FluxConfig(hidden_size=width, num_heads=1, axes_dim=(width,))
    places, found = flux_places(config), {ours: (parts, []) for ours, parts in flux_linears(config).items()}
    for update in updates:
        ours, part = places[update.name]
        if ours not in fused:
            found[ours][0][0] = found[ours][0][0]._replace(rows=update.shape[0])
        elif update.shape != (part.rows, width):
            raise ValueError(f"{update.name} is {list(update.shape)}, beside others of {width} channels: no FLUX is so")
        found[ours][1].append((update, part.start))
    return {ours: (parts, here) for ours, (parts, here) in found.items() if here}


def arrange(updates: Sequence[Update], form: str) -> list[Update]:
    """The same change as one update for each of the format's modules. ValueError where the format cannot hold it."""
    arranged = []
    for ours, (parts, here) in by_linear(updates).items():
        whole = Part(ours, 0, sum(part.rows for part in parts))
        for part in [whole] if FORMATS[WRITTEN[form]].names == "bfl" else parts:
            pieces = pieces_of(part, here)
            if len(pieces) == 1 and pieces[0][0].shape[0] == part.rows:
                arranged.append(pieces[0][0])
            elif pieces:
                arranged.append(joined(part, pieces))
    if any(isinstance(update, LoKr) for update in arranged) and form not in WITH_LOKR:
        raise ValueError(f"{form} files cannot hold a LoKr; --rank makes a LoRA of it, {', '.join(WITH_LOKR)} hold it")
    if any(update.magnitude is not None for update in arranged) and form not in MAGNITUDES:
        raise ValueError(f"{form} files cannot hold DoRA's magnitudes; {', '.join(MAGNITUDES)} do")
    if not arranged:
        raise ValueError("there is nothing to write: no update changes anything")
    return arranged


def pieces_of(part: Part, here: Placed) -> Placed:
    """What some rows of a linear get of each of its updates, and the first of these rows that it changes."""
    pieces = []
    for update, start in here:
        low, high = max(start, part.start), min(start + update.shape[0], part.start + part.rows)
        if low < high:
            piece = take_rows(update, part.name, (low - start, high - start))
            if isinstance(piece, LoRA) and piece.shape[0] < update.shape[0] and piece.magnitude is None:
                used = piece.B.any(dim=0)  # of a block-diagonal B, the other blocks are zero here
                piece = LoRA(piece.name, piece.A[used], piece.B[:, used], piece.scale)
            if rank(piece):
                pieces.append((piece, low - part.start))
    return sorted(pieces, key=lambda item: item[1])


def joined(part: Part, pieces: Placed) -> LoRA:
    """LoRAs on some rows of a module as one: each A once, B where its rows are, strength in B, magnitudes in a row."""
    if any(isinstance(piece, LoKr) for piece, _ in pieces):
        raise ValueError(f"a Kronecker product (LoKr) is only a part of {part.name}; --rank makes LoRAs to be joined")
    a, b, magnitudes = [], [], [piece.magnitude for piece, _ in pieces if piece.magnitude is not None]
    for piece, start in pieces:
        rows = torch.zeros(part.rows, rank(piece), device=piece.B.device)
        rows[start : start + len(piece.B)] = piece.B.float() * piece.scale
        same = next((i for i, other in enumerate(a) if torch.equal(other, piece.A)), None)
        if same is None:
            a, b = [*a, piece.A], [*b, rows]
        else:
            b[same] += rows
    made = LoRA(part.name, torch.cat(a), torch.cat(b, dim=1), 1.0).requires_grad_(False)
    if magnitudes:
        made.magnitude = nn.Parameter(torch.cat(magnitudes), requires_grad=False)
        if len(magnitudes) < len(pieces) or len(made.magnitude) != part.rows:
            raise ValueError(f"{part.name} has DoRA on some of its rows only; a diffusers file keeps its parts apart")
    return made


# ------------------------------------------------------------------------------------------------ the file


def tensors_of(update: Update, form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """An arranged update's tensors by their names in the file; its strength is in B or w1."""
    table = FORMATS[WRITTEN[form]]
    if update.name == SWAPPED_THEIRS:
        half = update.shape[0] // 2
        update = take_rows(update, update.name, (half, 2 * half), (0, half))
    if isinstance(update, LoRA):
        found = {table.a: update.A, table.b: update.B.float() * update.scale}
    else:
        first = {"lokr_w1": [update.w1[0].float() * update.scale, *update.w1[1:]], "lokr_w2": update.w2}
        found = {n if len(side) == 1 else f"{n}_{'ab'[i]}": t for n, side in first.items() for i, t in enumerate(side)}
    found = {ending: tensor.detach().to("cpu", dtype, copy=True).contiguous() for ending, tensor in found.items()}
    if update.magnitude is not None:  # of the size of the weight itself, not of its change, so never rounded
        magnitude = update.magnitude.detach().float().cpu()
        found[MAGNITUDES[form]] = magnitude if form == "diffusers" else magnitude[:, None]
    if (table.a, table.b) == KOHYA or isinstance(update, LoKr):
        found["alpha"] = torch.tensor(float(rank(update)))
    return {f"{table.stem(update.name)}.{ending}": tensor for ending, tensor in found.items()}


def rank(update: Update) -> int:
    """Of a LoRA, or of the factored side of a LoKr (w2's before w1's); 1 for a LoKr of two full sides."""
    sides = [(update.B, update.A)] if isinstance(update, LoRA) else [update.w2, update.w1]
    return next((len(side[1]) for side in sides if len(side) == 2), 1)


def header(updates: list[Update], recipe: dict, form: str) -> dict[str, str]:
    """The file's metadata: our recipe, modelspec, and what the format's own programs look for."""
    ranks = {update.name: rank(update) for update in updates}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    kind = "LoKr" if any(isinstance(update, LoKr) for update in updates) else "LoRA"
    own, bfl = {}, FORMATS[WRITTEN[form]].names == "bfl"
    if form == "diffusers":
        own = {CONFIG_KEY: peft_settings(updates, ranks, usual)}
    elif form == "kohya":
        network = "networks.lora_flux" if kind == "LoRA" else "lycoris.kohya"
        own = {"ss_network_module": network, "ss_network_dim": str(usual), "ss_network_alpha": str(usual)}
        own["ss_base_model_version"] = "flux_kontext"
    elif form == "lycoris":
        config = {"algo": kind.lower(), "multiplier": 1.0, "linear_dim": usual, "linear_alpha": usual}
        own = {"lycoris_config": json.dumps(config)}
    return own | {
        "format": "pt",
        RECIPE_KEY: json.dumps(recipe),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "flux-kontext/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux" if bfl else "diffusers",
        "modelspec.title": str(recipe.get("title", f"kontext_min {kind}")),
        "modelspec.resolution": recipe.get("size", "1024x1024"),
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.description": f"{kind} of {recipe.get('model', 'FLUX.1 Kontext')}, rank {usual}, alpha baked in",
    }


def peft_settings(updates: list[Update], ranks: dict[str, int], usual: int) -> str:
    """PEFT's LoraConfig as JSON; alpha equals rank. ValueError where it cannot say which modules have DoRA."""
    dora = {update.magnitude is not None for update in updates}
    if len(dora) > 1:
        raise ValueError("some modules have DoRA and some do not, which a diffusers file cannot say; kohya's can")
    pattern = {f"^{name}": r for name, r in ranks.items() if r != usual}  # ^: not every name that ends so
    config = {
        "peft_type": "LORA", "r": usual, "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": pattern,
        "target_modules": sorted(ranks), "lora_dropout": 0.0, "bias": "none", "use_dora": dora == {True},
        "use_rslora": False, "init_lora_weights": True,
    }  # fmt: skip
    return json.dumps({f"transformer.{key}": value for key, value in config.items()}, indent=2, sort_keys=True)


# ------------------------------------------------------------------------------------------------ comparing


def largest_error(given: Sequence[Update], read: Sequence[Update]) -> tuple[float, str]:
    """Both changes on our linears, one at a time: the largest relative error of delta-W or magnitude, and where."""
    device = next(given[0].parameters()).device
    ours, theirs, errors = by_linear(given), by_linear([update.to(device) for update in read]), []
    for name in ours | theirs:
        for value in (lambda update: update.delta(), lambda update: update.magnitude):
            a, b = (dense(side.get(name, ([], [])), value, device) for side in (ours, theirs))
            error = (a - b).norm() / (a.norm() or 1.0)
            errors.append((float(error.nan_to_num(nan=float("inf"))), name))
    return max(errors)


def dense(side: tuple[list[Part], Placed], value: Callable, device: torch.device) -> Tensor:
    """What the updates of a linear are together, rows first, in fp32; 0 for none."""
    total = torch.zeros((), device=device)
    for update, start in side[1]:
        if (values := value(update)) is not None:
            if not total.ndim:
                total = values.new_zeros(sum(part.rows for part in side[0]), *values.shape[1:], dtype=torch.float32)
            total[start : start + len(values)] += values
    return total
