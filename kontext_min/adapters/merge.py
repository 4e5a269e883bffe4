"""Adapters made smaller, added to each other, or into the base model's own weights, one tensor at a time."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kontext_min.adapters.layers import LoRA, Update
from kontext_min.adapters.rows import SWAPPED_THEIRS, by_linear, overlap
from kontext_min.checkpoints.keys import Part
from kontext_min.checkpoints.load import Component, bare, find_component, flux_config, on_meta
from kontext_min.checkpoints.save import stream
from kontext_min.checkpoints.tensors import Tensors
from kontext_min.models.flux import Flux


def reduced(updates: Sequence[Update], rank: int) -> tuple[list[LoRA], float]:
    """The closest LoRAs of at most this rank, by SVD, and the share of the whole change (its norm) that is lost."""
    made, lost = [], torch.zeros(2, dtype=torch.float64)
    for update in updates:
        u, s, v = svd(update, rank)
        root = s[:rank].sqrt()
        made.append(LoRA(update.name, root[:, None] * v, u * root, 1.0, update.start).requires_grad_(False))
        made[-1].magnitude = update.magnitude
        lost += torch.stack([s[rank:].square().sum(), s.square().sum()])
    return made, share(lost)


def svd(update: Update, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """delta-W = U diag(S) V without making it: all of S, falling, and the first of U (rows, rank) and V (rank, in)."""
    if isinstance(update, LoRA):  # by QR of its halves; a Kronecker product's values and vectors are products
        (qb, rb), (qa, ra) = torch.linalg.qr(update.B.float() * update.scale), torch.linalg.qr(update.A.float().T)
        u, s, v = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        return qb @ u[:, :rank], s, v[:rank] @ qa.T
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(side, full_matrices=False) for side in update.sides())
    s, order = (abs(update.scale) * s1[:, None] * s2).flatten().sort(descending=True)
    i, j = order[:rank] // len(s2), order[:rank] % len(s2)
    u = torch.einsum("ak,bk->abk", u1[:, i], u2[:, j]).flatten(0, 1) * math.copysign(1, update.scale)
    return u, s, torch.einsum("kc,kd->kcd", v1[i], v2[j]).flatten(1)


def merge_into(base: Path, updates: Sequence[Update], out: Path, dtype: torch.dtype) -> float:
    """Write the base's transformer with the updates in its weights, under its names, in one file, tensor by tensor.
    base and out: both a single file, or both a folder; nothing appears before all is whole. -> the share of the change
    (its norm) that rounding to dtype loses. ValueError where the updates do not fit, or where the base is quantised.
    """
    if base.is_file():
        component, target = Component((base,), {}), out
    else:
        component = find_component(*((base.parent, base.name) if base.name == "transformer" else (base, "transformer")))
        target = out / "diffusion_pytorch_model.safetensors"
    if others := sorted({*out.glob("*.safetensors*")} - {target}):
        raise ValueError(f"{out} holds {others[0].name}, too, which would be read with it; give a new folder")
    flux, tensors = on_meta(Flux, flux_config, component, bare)
    touched = by_linear(updates).items()
    changes = {f"{part.name}.weight": (part, here) for whole, (parts, here) in touched for part in (whole, *parts)}
    refuse_quantised(tensors, changes)
    by_linear(updates, flux)  # says what does not fit
    lost = torch.zeros(2, dtype=torch.float64)

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name, (_, in_file) in tensors.where.items():
            weight = tensors.read(name)
            if change := changes.get(name):
                before, weight = weight, with_updates(weight.float(), *change)
                lost.add_(loss(before, weight, weight.to(dtype)))
            yield in_file, weight.to(dtype)

    stream(target, merged())
    for file in () if base.is_file() else component.files[0].parent.glob("config.json"):
        shutil.copy(file, out)
    return share(lost)


def merging(given: Sequence[Update], flux: Flux) -> Callable[[Flux, str], None]:
    """For `then` of `load_flux`: each weight takes up its updates as soon as it is there, and is rounded once.
    flux: the transformer on `meta`. ValueError where an update does not fit.
    """
    changes = {f"{whole.name}.weight": (whole, here) for whole, (_, here) in by_linear(given, flux).items()}

    def then(flux: Flux, name: str):
        if change := changes.get(name):
            weight = flux.get_parameter(name)
            weight.data = with_updates(weight.float(), *change).to(weight.dtype)

    return then


def with_updates(weight: Tensor, part: Part, here: list[Update]) -> Tensor:
    """A weight (rows, in) in fp32, in the order of its file, -> the same with its updates, each beside the base's."""
    turn = part.rows // 2 if part.name == SWAPPED_THEIRS else 0
    weight = weight.roll(turn, 0)
    merged = weight.clone()
    for update in here:
        rows, own = overlap(part, update)
        delta = update.to(weight.device).delta()[own]
        if update.magnitude is not None:  # DoRA: rows of the trained direction get the trained lengths
            longer = F.normalize(weight[rows] + delta, dim=1) * update.magnitude[own, None].float()
            delta = update.strength * (longer - weight[rows])
        merged[rows] += delta
    return merged.roll(turn, 0)


def loss(weight: Tensor, merged: Tensor, rounded: Tensor) -> Tensor:
    return torch.stack([(rounded - merged).norm(), (merged - weight).norm()]).double().square()


def share(squares: Tensor) -> float:  # (lost, whole), squared -> lost / whole
    lost, whole = squares.tolist()
    return (lost / (whole or 1.0)) ** 0.5


def refuse_quantised(tensors: Tensors, changes: dict[str, tuple[Part, list[Update]]]):
    """Raise ValueError if a weight to be changed is quantised, with the measured share of the change it would lose."""
    lost, places = torch.zeros(2, dtype=torch.float64), sorted(tensors.where.items())
    forms = {name: handle.get_slice(key).get_dtype() for name, (handle, key) in places if name in changes}
    quantised = [name for name, form in forms.items() if form not in ("F32", "F16", "BF16")]
    for name in quantised[:8]:  # enough to measure on
        levels, scale, numbers = grid(tensors, name)
        weight = (numbers.reshape(len(scale), -1) * scale).view(-1, changes[name][1][0].shape[1])
        merged = with_updates(weight, *changes[name])
        nearest = torch.bucketize(merged.view(len(scale), -1) / scale, (levels[1:] + levels[:-1]) / 2)
        lost += loss(weight, merged, (levels[nearest] * scale).view(merged.shape))
    if quantised:
        raise ValueError(
            f"{tensors.title}: {len(quantised)} of the weights to change are {forms[quantised[0]]}, whose rounding "
            f"would lose {share(lost):.0%} of the change; merge into the bf16 model, or use the LoRA unmerged"
        )


def grid(tensors: Tensors, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """A quantised weight -> the levels that its numbers can have, the scale of each block (blocks, 1), the numbers."""
    handle, key = tensors.where[name]
    kept = handle.get_tensor(key)
    if kept.dtype == torch.uint8:  # as bitsandbytes has it: two levels of a table in a byte
        levels, scale = (handle.get_tensor(f"{key}.{what}").float() for what in ("quant_map", "absmax"))
        return levels, scale[:, None], levels[torch.stack([kept >> 4, kept & 15], dim=-1).long()]
    levels = torch.arange(256, dtype=torch.uint8).view(kept.dtype).float()
    handle, key = tensors.scales.get(name, (None, None))
    scale = handle.get_tensor(key).float().reshape(-1, 1) if handle else torch.ones(1, 1)
    return levels[levels.isfinite()].unique(), scale, kept.float()
