"""Adapters made smaller, added to each other, or into the base model's own weights, one tensor at a time."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kontext_min.adapters.formats import SWAPPED_THEIRS
from kontext_min.adapters.inject import placed
from kontext_min.adapters.layers import LoRA, Update
from kontext_min.adapters.write import Placed, by_linear
from kontext_min.checkpoints.keys import Part
from kontext_min.checkpoints.load import Component, find_component, flux_config, on_meta
from kontext_min.checkpoints.save import stream
from kontext_min.checkpoints.tensors import Tensors
from kontext_min.models.flux import Flux

QUANTISED = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "int8", "U8": "4 bit"}
MEASURED = 8  # of a quantised base, the weights on which the loss is measured


# ------------------------------------------------------------------------------------------------ rank


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
    """delta-W = U diag(S) V without making it: all of S, falling, and the first of U (rows, rank) and V (rank, in).

    A LoRA's comes by QR of its halves. A Kronecker product's singular values and vectors are products of its sides'.
    """
    if isinstance(update, LoRA):
        (qb, rb), (qa, ra) = torch.linalg.qr(update.B.float() * update.scale), torch.linalg.qr(update.A.float().T)
        u, s, v = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        return qb @ u[:, :rank], s, v[:rank] @ qa.T
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(side, full_matrices=False) for side in update.sides(torch.float32))
    s, order = (abs(update.scale) * s1[:, None] * s2).flatten().sort(descending=True)
    i, j = order[:rank] // len(s2), order[:rank] % len(s2)
    u = torch.einsum("ak,bk->abk", u1[:, i], u2[:, j]).flatten(0, 1) * math.copysign(1, update.scale)
    return u, s, torch.einsum("kc,kd->kcd", v1[i], v2[j]).flatten(1)


# ------------------------------------------------------------------------------------------------ into the base


def merge_into(base: Path, updates: Sequence[Update], out: Path, dtype: torch.dtype) -> float:
    """Write the base's transformer with the updates in its weights; files, names and layout are the base's.

    base and out: both a single file, or both a folder. Streamed: the memory of one tensor. -> the share of the change
    (its norm) that rounding to dtype loses. ValueError where base and updates do not fit, or where the base is
    quantised. Nothing appears before all is whole.
    """
    if base.is_file():
        component, targets = Component((base,), {}), [out]
    else:
        component = find_component(*((base.parent, base.name) if base.name == "transformer" else (base, "transformer")))
        targets = [out / file.name for file in component.files]
    tensors = Tensors(component.files).rename(lambda name: name.removeprefix("model.diffusion_model."))
    weights = weights_of(updates)
    refuse_quantised(tensors, weights)
    placed(on_meta(Flux, flux_config, component, tensors), updates)  # says what does not fit
    lost = torch.zeros(2, dtype=torch.float64)

    def merged(name: str) -> Tensor:
        weight = tensors.read(name)
        if name in weights:
            before, weight = weight, with_updates(weight.float(), *weights[name])
            lost.add_(loss(before, weight, weight.to(dtype)))
        return weight

    targets[0].parent.mkdir(parents=True, exist_ok=True)
    try:
        for target, opened in zip(targets, dict.fromkeys(handle for handle, _ in tensors.where.values()), strict=True):
            names = {key: name for name, (handle, key) in tensors.where.items() if handle is opened}
            shapes = {key: tensors.shape(name) for key, name in names.items()}
            stream(target.with_suffix(".tmp"), shapes, dtype, lambda key, names=names: merged(names[key]))
        for target in targets:
            target.with_suffix(".tmp").replace(target)
    finally:
        for target in targets:
            target.with_suffix(".tmp").unlink(missing_ok=True)
    for file in () if base.is_file() else component.files[0].parent.glob("*.json"):
        shutil.copy(file, out)
    return share(lost)


def weights_of(updates: Sequence[Update]) -> dict[str, tuple[Part, Placed]]:
    """Names of weights that the updates may change, in either layout -> their rows of our linear, and its updates."""
    return {
        f"{part.name}.weight": (part, here)
        for ours, (parts, here) in by_linear(updates).items()
        for part in (Part(ours, 0, sum(part.rows for part in parts)), *parts)
    }


def with_updates(weight: Tensor, part: Part, here: Placed) -> Tensor:
    """A weight (rows, in) in fp32, in the order of its file, -> the same with its updates, each beside the base's."""
    swapped = part.name == SWAPPED_THEIRS
    weight = torch.cat(weight.chunk(2)[::-1]) if swapped else weight
    merged = weight.clone()
    for update, start in here:
        low, high = max(start, part.start), min(start + update.shape[0], part.start + part.rows)
        if low < high:
            rows, own = slice(low - part.start, high - part.start), slice(low - start, high - start)
            delta = update.delta()[own]
            if update.magnitude is not None:  # DoRA: rows of the trained direction get the trained lengths
                longer = F.normalize(weight[rows] + delta, dim=1) * update.magnitude[own, None].float()
                delta = update.strength * (longer - weight[rows])
            merged[rows] += delta
    return torch.cat(merged.chunk(2)[::-1]) if swapped else merged


def loss(weight: Tensor, merged: Tensor, rounded: Tensor) -> Tensor:
    """Squared norms of what rounding loses and of what was to change."""
    return torch.stack([(rounded - merged).norm(), (merged - weight).norm()]).double().square()


def share(squares: Tensor) -> float:
    """(lost, whole), squared -> lost / whole."""
    lost, whole = squares.tolist()
    return (lost / (whole or 1.0)) ** 0.5


# ------------------------------------------------------------------------------------------------ quantised


def refuse_quantised(tensors: Tensors, weights: dict[str, tuple[Part, Placed]]):
    """Raise ValueError if a weight to be changed is quantised, with the measured share of the change it would lose."""
    lost, found = torch.zeros(2, dtype=torch.float64), []
    for name in sorted(weights.keys() & tensors.names()):
        handle, key = tensors.where[name]
        form = QUANTISED.get(handle.get_slice(key).get_dtype())
        if form and len(found) < MEASURED:
            weight, rounded = grid(tensors, name)
            part, here = weights[name]
            weight = weight.view(-1, here[0][0].shape[1])
            merged = with_updates(weight, part, here)
            lost += loss(weight, merged, rounded(merged))
        found += [form] if form else []
    if found:
        raise ValueError(
            f"{tensors.title}: {len(found)} of the weights to change are {found[0]}, whose rounding would lose "
            f"{share(lost):.0%} of the change; merge into the bf16 model, or use the LoRA unmerged"
        )


def grid(tensors: Tensors, name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A quantised weight in fp32, and what rounds a weight of its shape to the same levels and scales."""
    handle, key = tensors.where[name]
    kept, scale = handle.get_tensor(key), torch.ones(1)
    if (
        kept.dtype == torch.uint8
    ):  # two levels of a table in a byte, with a scale for each block, as bitsandbytes has it
        levels, scale = (handle.get_tensor(f"{key}.{what}").float() for what in ("quant_map", "absmax"))
        numbers = levels[torch.stack([kept >> 4, kept & 15], dim=-1).long()]
    else:
        levels = torch.arange(256, dtype=torch.uint8).view(kept.dtype).float()
        levels, numbers = levels[levels.isfinite()].unique(), kept.float()
        if name in tensors.scales:
            handle, key = tensors.scales[name]
            scale = handle.get_tensor(key).float().flatten()
    between = (levels[1:] + levels[:-1]) / 2

    def rounded(weight: Tensor) -> Tensor:
        blocks = weight.reshape(len(scale), -1) / scale[:, None]
        return (levels[torch.bucketize(blocks, between)] * scale[:, None]).view(weight.shape)

    return numbers.reshape(len(scale), -1) * scale[:, None], rounded
