"""What tensors and settings are called in the files: tables between our names and diffusers', used both ways.

Our names are those of the single files (`flux1-kontext-dev.safetensors`, `ae.safetensors`); T5 and CLIP have one.
Where diffusers splits a fused linear, each part is a range of its rows; adapters use the same table.
"""

from functools import cache, reduce
from pathlib import Path
from typing import NamedTuple

import json5
import torch
from torch import Tensor

from kontext_min.models.flux import FluxConfig
from kontext_min.models.vae import VAEConfig

FLUX, VAE, SETTINGS, INDEX, FIXED, FILES = json5.loads(Path(__file__).with_suffix(".json5").read_text("utf-8")).values()
SWAPPED = "final_layer.adaLN_modulation.1"  # (shift, scale) here, (scale, shift) in diffusers: its halves change places


class Part(NamedTuple):
    """One diffusers module inside one of our linears: its name and the rows of our weight it stands for."""

    name: str
    start: int
    rows: int


def flux_modules(config: FluxConfig) -> dict[str, list[Part]]:
    """Every linear and norm by our name, in the model's order -> the diffusers modules it is made of, in row order."""
    hidden, mlp = config.hidden_size, config.mlp_hidden
    rows = {  # by the ending of our name, or of the part's; the others have `hidden`
        "final_layer.linear": config.out_channels, SWAPPED: 2 * hidden, "modulation.lin": 3 * hidden,
        "img_mod.lin": 6 * hidden, "txt_mod.lin": 6 * hidden, "img_mlp.0": mlp, "txt_mlp.0": mlp, "proj_mlp": mlp,
        ".scale": hidden // config.num_heads,
    }  # fmt: skip
    top = {ours: name for ours, name in FLUX["top"].items() if config.guidance_embed or "guidance" not in ours}
    levels = [("", "", top)]
    for kind, extra, count in (("double", "", config.depth), ("single", "single_", config.depth_single_blocks)):
        levels += [(f"{kind}_blocks.{i}.", f"{extra}transformer_blocks.{i}.", FLUX[kind]) for i in range(count)]
    table: dict[str, list[Part]] = {}
    for our_prefix, their_prefix, names in levels:
        for ours, theirs in names.items():
            parts = table[our_prefix + ours] = []
            for name in [theirs] if isinstance(theirs, str) else theirs:
                own = next((n for ending, n in rows.items() if ours.endswith(ending) or name.endswith(ending)), hidden)
                parts.append(Part(their_prefix + name, sum(part.rows for part in parts), own))
    return table


@cache
def flux_linears(config: FluxConfig) -> dict[str, list[Part]]:
    return {ours: parts for ours, parts in flux_modules(config).items() if not ours.endswith(".scale")}


class Source(NamedTuple):
    """One of our tensors as a file holds it: `names` stacked along dim 0, in `rows` each, then a change of form."""

    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    form: str = "same"  # "swapped": halves of dim 0 change places; "linear": the file has (o, i), we have (o, i, 1, 1)

    def assemble(self, parts: list[Tensor]) -> Tensor:  # the file's tensors -> ours
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.form == "swapped":
            return tensor.roll(len(tensor) // 2, 0)
        return tensor[..., None, None] if self.form == "linear" else tensor

    def disassemble(self, tensor: Tensor) -> dict[str, Tensor]:  # our tensor -> the file's tensors by name
        if self.form == "swapped":
            tensor = tensor.roll(len(tensor) // 2, 0)
        if self.form == "linear":
            tensor = tensor[..., 0, 0]
        parts = [tensor] if len(self.names) == 1 else tensor.split(self.rows)
        return {name: part.contiguous() for name, part in zip(self.names, parts, strict=True)}


def flux_diffusers(config: FluxConfig) -> dict[str, Source]:
    table = {}
    for ours, parts in flux_modules(config).items():
        for kind in ("",) if ours.endswith(".scale") else (".weight", ".bias"):
            names, rows = tuple(part.name + kind for part in parts), tuple(part.rows for part in parts)
            table[ours + kind] = Source(names, rows, "swapped" if ours == SWAPPED else "same")
    return table


def vae_diffusers(config: VAEConfig, names: list[str]) -> dict[str, Source]:
    """Our VAE tensors (`names`) in diffusers' layout: decoder levels from the other end, 1x1 projections as linears."""
    levels = len(config.channels)
    renamed = {f"encoder.down.{i}.": f"encoder.down_blocks.{i}." for i in range(levels)}
    renamed |= {f"decoder.up.{i}.": f"decoder.up_blocks.{levels - 1 - i}." for i in range(levels)}
    renamed |= {f".{ours}.": f".{theirs}." for ours, theirs in VAE.items()}
    projections = tuple(f"mid.attn_1.{part}.weight" for part in ("q", "k", "v", "proj_out"))
    theirs = {name: reduce(lambda text, pair: text.replace(*pair), renamed.items(), name) for name in names}
    return {n: Source((theirs[n],), form="linear" if n.endswith(projections) else "same") for n in names}
