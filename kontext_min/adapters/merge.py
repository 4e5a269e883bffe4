"""Adapters made smaller, added to each other, or into the base model's own weights, one tensor at a time."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kontext_min.adapters.layers import LoKr, LoRA, Update
from kontext_min.adapters.rows import SWAPPED_THEIRS, arrange, by_linear, overlap
from kontext_min.checkpoints.keys import Part
from kontext_min.checkpoints.load import Component, bare, find_component, flux_config, on_meta
from kontext_min.checkpoints.save import stream
from kontext_min.checkpoints.tensors import refuse
from kontext_min.models.flux import Flux


def reduced(updates: Sequence[Update], rank: int, fused: bool) -> tuple[list[LoRA], float]:
    """The closest LoRAs of at most this rank, by SVD, of our linears (fused) or their parts; LoKrs become LoRAs first.
    -> also the share of the whole change (its norm) that is lost.
    """
    lost = torch.zeros(2, dtype=torch.float64)  # what is lost, and all, squared

    def lower(update: Update) -> LoRA:
        u, s, v = svd(update, rank)
        root, tail = s[:rank].sqrt(), s[rank:].square().sum()
        made = LoRA(update.name, root[:, None] * v, u * root, 1.0, update.start).requires_grad_(False)
        made.magnitude = update.magnitude
        lost.add_(torch.stack([tail, tail if isinstance(update, LoKr) else s.square().sum()]))
        return made

    loras = [lower(update) if isinstance(update, LoKr) else update for update in updates]
    return [lower(update) for update in arrange(loras, fused)], float((lost[0] / (lost[1] or 1.0)).sqrt())


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
    base and out: both a file, or both a folder, to which all else is linked unless it is called transformer. Nothing
    appears before all is whole. -> the share of the change (its norm) that rounding to dtype loses. ValueError where
    the updates do not fit, or where the base is quantised.
    """
    single, model = base.is_file(), base.parent if base.is_file() or base.name == "transformer" else base
    component = Component((base,), {}) if single else find_component(model, "transformer")
    own = out if out.name == "transformer" else out / "transformer"
    target = out if single else own / "diffusion_pytorch_model.safetensors"
    if single != (out.suffix == ".safetensors") or (out.exists() and single != out.is_file()):
        raise ValueError(f"{out} must be a {'.safetensors file' if single else 'folder'}, as {base} is")
    if (others := sorted({*own.glob("*.safetensors*")} - {target})) and not single:
        raise ValueError(f"{own} holds {others[0].name}, too, which would be read with it; give a new folder")
    flux, tensors = on_meta(Flux, flux_config, component, bare)
    touched = by_linear(updates).items()
    changes = {f"{part.name}.weight": (part, here) for whole, (parts, here) in touched for part in (whole, *parts)}
    kinds = {name: handle.get_slice(key).get_dtype() for name, (handle, key) in tensors.where.items()}
    quantised = [name for name in changes if kinds.get(name, "F32") not in ("F32", "F16", "BF16")]
    refuse(tensors.title, "weights are quantised; merge into the bf16 model, or use the LoRA unmerged", quantised)
    by_linear(updates, flux)  # says what does not fit
    lost = torch.zeros(2, dtype=torch.float64)  # as above

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name, (_, in_file) in tensors.where.items():
            weight = tensors.read(name)
            if change := changes.get(name):
                before, weight = weight, with_updates(weight.float(), *change)
                lost.add_(torch.stack([(weight.to(dtype) - weight).norm(), (weight - before).norm()]).double().square())
            yield in_file, weight.to(dtype)

    stream(target, merged())
    for file in () if single else (model / "transformer").glob("config.json"):
        shutil.copy(file, own)
    for file in () if single or own == out else model.iterdir():
        if file not in component.files and file.name != "transformer" and not (out / file.name).exists():
            (out / file.name).symlink_to(file.resolve())
    return float((lost[0] / (lost[1] or 1.0)).sqrt())


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
