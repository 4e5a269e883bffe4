"""Adapters made smaller, added to each other, or into the base model's own weights, one tensor at a time."""

import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kontext_min.adapters.formats import SWAPPED_THEIRS
from kontext_min.adapters.inject import apply_updates
from kontext_min.adapters.layers import LoRA, Update
from kontext_min.adapters.write import Placed, placed
from kontext_min.checkpoints.keys import Part
from kontext_min.checkpoints.load import Component, find_component, flux_config
from kontext_min.checkpoints.save import stream
from kontext_min.checkpoints.tensors import FP8, Tensors
from kontext_min.models.flux import Flux

QUANTISED = (*FP8, torch.int8, torch.uint8)  # uint8: two 4-bit numbers, as bitsandbytes packs nf4
MEASURED = 8  # of a quantised base, the weights on which the loss is measured


# ------------------------------------------------------------------------------------------------ rank


def reduced(updates: Sequence[Update], rank: int) -> tuple[list[LoRA], float]:
    """The closest LoRAs of at most this rank, by SVD, and the share of the whole change (its norm) that is lost."""
    made, lost, whole = [], 0.0, 0.0
    for update in updates:
        u, s, v = svd(update)
        root = s[:rank].sqrt()
        made.append(LoRA(update.name, root[:, None] * v[:rank], u[:, :rank] * root, 1.0, update.start))
        made[-1].magnitude = update.magnitude
        lost, whole = lost + float(s[rank:].square().sum()), whole + float(s.square().sum())
    return made, (lost / (whole or 1.0)) ** 0.5


def svd(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """delta-W = U diag(S) V without making it: U (rows, k), S (k,) falling, V (k, in). LoRA by QR of A and B.

    The singular values of a Kronecker product are the products of its sides', the vectors too.
    """
    if isinstance(update, LoRA):
        (qb, rb), (qa, ra) = torch.linalg.qr(update.B.float() * update.scale), torch.linalg.qr(update.A.float().T)
        u, s, v = torch.linalg.svd(rb @ ra.T)
        return qb @ u, s, v @ qa.T
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(side, full_matrices=False) for side in update.sides(torch.float32))
    s, order = (s1[:, None] * s2).flatten().sort(descending=True)
    i, j = order // len(s2), order % len(s2)
    u = torch.einsum("ak,bk->abk", u1[:, i], u2[:, j]).flatten(0, 1)
    return u, s * update.scale, torch.einsum("kc,kd->kcd", v1[i], v2[j]).flatten(1)


# ------------------------------------------------------------------------------------------------ into the base


def at_strength(updates: Sequence[Update], strength: float) -> list[Update]:
    """Copies whose change is so many times as large."""
    copies = deepcopy(list(updates))
    for update in copies:
        if update.magnitude is None:
            update.scale *= strength
        else:
            update.strength = strength
    return copies


def merge_into(base: Path, updates: Sequence[Update], out: Path, dtype: torch.dtype) -> float:
    """Write the base's transformer with the updates in its weights; files, names and layout are the base's.

    base: a single file, or a model's folder; out: a .safetensors file or a folder. Streamed: the memory of one tensor.
    -> the share of the change (its norm) that rounding to dtype loses. ValueError where base and updates do not fit,
    or where the base is quantised. Nothing appears before all is whole.
    """
    if base.is_file():
        component = Component((base,), {})
    else:
        component = find_component(*((base.parent, base.name) if base.name == "transformer" else (base, "transformer")))
    files = [Tensors([file]).rename(lambda name: name.removeprefix("model.diffusion_model.")) for file in component.files]
    weights = weights_of(updates)
    refuse_quantised(files, weights)
    shapes = {name: tensors.shape(name) for tensors in files for name in tensors.names()}
    with torch.device("meta"):
        flux = Flux(flux_config(component.config, shapes))
    apply_updates(flux, updates, 1.0, dtype)  # says what does not fit
    if out.suffix == ".safetensors" and len(files) > 1:
        raise ValueError(f"{base} has {len(files)} files; {out} should be a folder")
    folder = out.parent if out.suffix == ".safetensors" else out
    folder.mkdir(parents=True, exist_ok=True)
    parts, sums = {}, torch.zeros(2, dtype=torch.float64)
    try:
        for file, tensors in zip(component.files, files, strict=True):
            whole = out if out.suffix == ".safetensors" else folder / file.name
            parts[whole.with_suffix(".tmp")] = whole

            def read(name: str, tensors: Tensors = tensors) -> torch.Tensor:
                weight = tensors.read(name)
                if name not in weights:
                    return weight
                merged = with_updates(weight.float(), *weights[name])
                sums.add_(squares(merged, merged.to(dtype), weight))
                return merged

            stream(whole.with_suffix(".tmp"), {name: tensors.shape(name) for name in sorted(tensors.names())}, dtype, read)
        for part, whole in parts.items():
            part.replace(whole)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    if folder == out:
        for file in component.files[0].parent.glob("*.json"):
            shutil.copy(file, out)
    lost, changed = sums.tolist()
    return (lost / (changed or 1.0)) ** 0.5


def weights_of(updates: Sequence[Update]) -> dict[str, tuple[Part, Placed]]:
    """Names of weights that the updates change, in either layout -> their rows of our linear, and its updates."""
    found = {}
    for ours, (parts, here) in placed(updates).items():
        for part in (Part(ours, 0, sum(part.rows for part in parts)), *parts):
            if any(start < part.start + part.rows and part.start < start + u.shape[0] for u, start in here):
                found[f"{part.name}.weight"] = part, here
    return found


def with_updates(weight: Tensor, part: Part, here: Placed) -> Tensor:
    """A weight (rows, in) in fp32, named as a part is, -> the same with its updates, each beside the base's."""
    swapped = part.name == SWAPPED_THEIRS
    weight = torch.cat(weight.chunk(2)[::-1]) if swapped else weight
    merged = weight.clone()
    for update, start in here:
        low, high = max(start, part.start), min(start + update.shape[0], part.start + part.rows)
        if low < high:
            rows, own = slice(low - part.start, high - part.start), slice(low - start, high - start)
            delta = update.delta()[own]
            if update.magnitude is not None:  # DoRA: the rows of the sum get the lengths that were trained
                longer = F.normalize(weight[rows] + delta, dim=1) * update.magnitude[own, None].float()
                delta = update.strength * (longer - weight[rows])
            merged[rows] += delta
    return torch.cat(merged.chunk(2)[::-1]) if swapped else merged


def squares(merged: Tensor, rounded: Tensor, weight: Tensor) -> Tensor:
    """(what rounding loses, what was to change), both squared norms."""
    return torch.stack([(rounded.float() - merged).square().sum(), (merged - weight.float()).square().sum()]).double()


# ------------------------------------------------------------------------------------------------ quantised


def refuse_quantised(files: list[Tensors], weights: dict[str, tuple[Part, Placed]]):
    """Raise ValueError if a weight to be changed is quantised, with the measured share of the change it would lose."""
    sums, form = torch.zeros(2, dtype=torch.float64), None
    found = [(tensors, name) for tensors in files for name in sorted(weights.keys() & tensors.names())]
    found = [(tensors, name) for tensors, name in found if stored(tensors, name).dtype in QUANTISED]
    for tensors, name in found[:MEASURED]:
        weight, onto_grid = grid(tensors, name, weights[name][1][0][0].shape[1])
        merged = with_updates(weight, *weights[name])
        sums += squares(merged, onto_grid(merged), weight)
    if found:
        lost, changed = sums.tolist()
        form = str(stored(*found[0]).dtype).removeprefix("torch.").replace("uint8", "nf4")
        raise ValueError(
            f"{found[0][0].title}: {len(found)} of the weights to change are {form}, whose rounding would lose "
            f"{(lost / (changed or 1.0)) ** 0.5:.0%} of the change; merge into the bf16 model, or use the LoRA unmerged"
        )


def stored(tensors: Tensors, name: str) -> Tensor:
    """A tensor as the file has it."""
    handle, key = tensors.where[name]
    return handle.get_tensor(key)


def grid(tensors: Tensors, name: str, inputs: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A quantised weight (rows, inputs) in fp32, and what rounds a weight to the same numbers and scales."""
    kept = stored(tensors, name)
    if kept.dtype == torch.uint8:
        levels, scale = stored(tensors, f"{name}.quant_map").float(), stored(tensors, f"{name}.absmax").float()
        numbers = torch.stack([kept >> 4, kept & 15], dim=-1).flatten().long()
        between = (levels[1:] + levels[:-1]) / 2

        def nearest(weight: Tensor) -> Tensor:
            blocks = weight.reshape(len(scale), -1) / scale[:, None]
            return (levels[torch.bucketize(blocks, between)] * scale[:, None]).reshape(weight.shape)

        return (levels[numbers].view(len(scale), -1) * scale[:, None]).view(-1, inputs), nearest
    scale = torch.ones(())
    if name in tensors.scales:
        handle, key = tensors.scales[name]
        scale = handle.get_tensor(key).float()
    scale = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
    largest = 127 if kept.dtype == torch.int8 else torch.finfo(kept.dtype).max

    def rounded(weight: Tensor) -> Tensor:
        numbers = (weight / scale).clamp(-largest, largest)
        return (numbers.round() if kept.dtype == torch.int8 else numbers).to(kept.dtype).float() * scale

    return kept.float() * scale, rounded
