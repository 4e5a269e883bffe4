"""Updates by our linears and their rows: found, cut, joined and turned over, as the layouts of files have them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from kontext_min.adapters.layers import LoKr, LoRA, Update
from kontext_min.checkpoints.keys import Part, flux_linears
from kontext_min.models.flux import Flux, FluxConfig

SWAPPED_THEIRS = "norm_out.linear"  # diffusers' name of keys.SWAPPED
Placed = dict[Part, tuple[list[Part], list[Update]]]  # our linear, whole -> its parts, and the updates on its rows


def by_linear(updates: Sequence[Update], flux: Flux | None = None) -> Placed:
    """Our linears that are touched, in the model's order; every update learns its `start` there.
    ValueError if they are for another model. No model need be at hand: in a FLUX all else follows from the width.
    """
    linears, found = flux_linears(flux.config if flux else FluxConfig()), {}
    homes = {name: ours for ours, parts in linears.items() for name in (ours, *(part.name for part in parts))}
    if unknown := sorted({update.name for update in updates} - homes.keys()):
        raise ValueError(f"the LoRA has {len(unknown)} modules that this model does not: {', '.join(unknown[:5])}")
    if not flux:  # a fused linear takes the width
        width = next((update.shape[1] for update in updates if len(linears[homes[update.name]]) > 1), 64)
        linears = flux_linears(FluxConfig(hidden_size=width, num_heads=1, axes_dim=(width,)))
    for ours, parts in linears.items():
        here = [update for update in updates if homes[update.name] == ours]
        if not here:
            continue
        inputs = flux.get_submodule(ours).in_features if flux else width
        if not flux and len(parts) == 1:  # of any size
            rows, inputs = here[0].shape
            parts = [parts[0]._replace(rows=rows)]
        whole = Part(ours, 0, sum(part.rows for part in parts))
        named = {part.name: part for part in (whole, *parts)}
        for update in here:
            (rows, columns), part = update.shape, named[update.name]
            if (rows, columns) != (part.rows, inputs):
                said = f"the LoRA's {update.name} maps {columns} to {rows} channels, the model's {inputs} to "
                raise ValueError(f"{said}{part.rows}; it was made for another model")
            update.start = part.start
        found[whole] = parts, here
    return found


def arrange(updates: Sequence[Update], fused: bool) -> list[Update]:
    """The same change, exactly, as one update for each of our linears (fused) or for each of their parts.
    Where several meet, A are stacked and B lie block by block, zero elsewhere; where one is cut, A is shared.
    ValueError where a Kronecker product or DoRA does not allow it.
    """
    arranged = []
    for whole, (parts, here) in by_linear(updates).items():
        for part in [whole] if fused else parts:
            if pieces := pieces_of(part, here):
                alone = len(pieces) == 1 and pieces[0].shape[0] == part.rows
                arranged.append(pieces[0] if alone else joined(part, pieces))
    return arranged


def overlap(part: Part, update: Update) -> tuple[slice, slice]:
    """The rows of a linear that a part of it and an update share: which they are of the part, and of the update."""
    first = max(part.start, update.start)
    end = max(first, min(part.start + part.rows, update.rows.stop))
    return slice(first - part.start, end - part.start), slice(first - update.start, end - update.start)


def pieces_of(part: Part, here: list[Update]) -> list[Update]:
    """What a part of a linear gets of each update there, in the order of their rows; `start` is within the part."""
    pieces = []
    for update, (place, rows) in ((update, overlap(part, update)) for update in here):
        if place.start < place.stop:
            piece = take_rows(update, part.name, rows)
            if isinstance(piece, LoRA) and piece.shape[0] < update.shape[0] and piece.magnitude is None:
                used = piece.B.any(dim=0)  # of a block-diagonal B, the other blocks are zero here
                piece = LoRA(piece.name, piece.A[used], piece.B[:, used], piece.scale)
            piece.start = place.start
            pieces.append(piece)
    return sorted((piece for piece in pieces if piece.rank), key=lambda piece: piece.start)


def joined(part: Part, pieces: list[Update]) -> LoRA:
    """LoRAs on some rows of a module as one: each A once, B where its rows are, strength in B, magnitudes in a row."""
    if any(isinstance(piece, LoKr) for piece in pieces):
        raise ValueError(f"a Kronecker product (LoKr) is only a part of {part.name}; --rank makes LoRAs to be joined")
    a, b, magnitudes = [], [], [piece.magnitude for piece in pieces if piece.magnitude is not None]
    for piece in pieces:
        rows = F.pad(piece.B.float() * piece.scale, (0, 0, piece.start, part.rows - piece.start - len(piece.B)))
        same = next((i for i, other in enumerate(a) if torch.equal(other, piece.A)), None)
        if same is None:
            a, b = [*a, piece.A], [*b, rows]
        else:
            b[same] += rows
    made = LoRA(part.name, torch.cat(a), torch.cat(b, dim=1), 1.0).requires_grad_(False)
    if magnitudes:
        made.magnitude = nn.Parameter(torch.cat(magnitudes), requires_grad=False)
        if len(magnitudes) < len(pieces) or len(made.magnitude) != part.rows:
            raise ValueError(f"{part.name} has DoRA on some of its rows only; a lycoris file keeps its parts apart")
    return made


def take_rows(update: Update, name: str, *ranges: slice) -> Update:
    """These rows of an update, frozen, one range after the other, by another name. ValueError within a LoKr's w2."""
    unit = 1 if isinstance(update, LoRA) else len(update.w2[0])  # rows of the product for one of its first factor
    if any(edge % unit for rows in ranges for edge in (rows.start, rows.stop)):
        said = f"{update.name} is a Kronecker product of blocks of {unit} rows, which cannot be cut for {name}"
        raise ValueError(f"{said}; make it a LoRA first (python -m kontext_min.adapters convert --rank)")
    if isinstance(update, LoRA):
        made: Update = LoRA(name, update.A, torch.cat([update.B[rows] for rows in ranges]), update.scale)
    else:
        first = torch.cat([update.w1[0][rows.start // unit : rows.stop // unit] for rows in ranges])
        made = LoKr(name, (first, *update.w1[1:]), tuple(update.w2), update.scale)
    if update.magnitude is not None:
        made.magnitude = nn.Parameter(torch.cat([update.magnitude[rows] for rows in ranges]))
    return made.requires_grad_(False)


def swapped(update: Update) -> Update:
    """The update as diffusers has it, or as we do: of its last modulation, the halves of the rows change places."""
    half, name = update.shape[0] // 2, update.name
    return take_rows(update, name, slice(half, 2 * half), slice(0, half)) if name == SWAPPED_THEIRS else update
