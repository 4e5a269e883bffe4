"""What tensors and settings are called in the files: tables between our names and diffusers', used both ways.

Our names are those of the single files (`flux1-kontext-dev.safetensors`, `ae.safetensors`); T5 and CLIP have one.
Where diffusers splits a fused linear, each part is a range of its rows; adapters use the same table.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kontext_min.models.flux import FluxConfig
from kontext_min.models.vae import VAEConfig

# fmt: off
FLUX_TOP = {  # linears, in blocks also the norms of queries and keys
    "img_in":                         "x_embedder",
    "txt_in":                         "context_embedder",
    "time_in.in_layer":               "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer":              "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer":           "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer":          "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer":             "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer":            "time_text_embed.text_embedder.linear_2",
    "final_layer.linear":             "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
FLUX_DOUBLE = {
    "img_mod.lin":   "norm1.linear",
    "txt_mod.lin":   "norm1_context.linear",
    "img_attn.qkv":  ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv":  ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0":     "ff.net.0.proj",
    "img_mlp.2":     "ff.net.2",
    "txt_mlp.0":     "ff_context.net.0.proj",
    "txt_mlp.2":     "ff_context.net.2",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale":   "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale":   "attn.norm_added_k.weight",
}
FLUX_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1":        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2":        "proj_out",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale":   "attn.norm_k.weight",
}
SWAPPED = "final_layer.adaLN_modulation.1"  # (shift, scale) here, (scale, shift) in diffusers: its halves change places

FLUX_SETTINGS = {  # transformer/config.json
    "in_channels": "in_channels", "out_channels": "out_channels", "num_layers": "depth",
    "num_single_layers": "depth_single_blocks", "num_attention_heads": "num_heads",
    "joint_attention_dim": "context_in_dim", "pooled_projection_dim": "vec_in_dim",
    "guidance_embeds": "guidance_embed", "axes_dims_rope": "axes_dim",
}
VAE_SETTINGS = {  # vae/config.json
    "in_channels": "in_channels", "block_out_channels": "channels", "layers_per_block": "layers_per_block",
    "latent_channels": "latent_channels", "norm_num_groups": "groups", "scaling_factor": "scaling_factor",
    "shift_factor": "shift_factor",
}
T5_SETTINGS = {  # text_encoder_2/config.json
    "vocab_size": "vocab_size", "d_model": "d_model", "d_kv": "d_kv", "d_ff": "d_ff", "num_layers": "num_layers",
    "num_heads": "num_heads", "relative_attention_num_buckets": "num_buckets",
    "relative_attention_max_distance": "max_distance", "layer_norm_epsilon": "eps",
}
CLIP_SETTINGS = {  # text_encoder/config.json
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "max_position_embeddings": "max_positions",
    "eos_token_id": "eos_token_id", "hidden_act": "activation", "layer_norm_eps": "eps",
}
SHIFT_SETTINGS = {  # scheduler/scheduler_config.json
    "base_shift": "base_shift", "max_shift": "max_shift", "base_image_seq_len": "base_tokens",
    "max_image_seq_len": "max_tokens",
}
VAE_LEAVES = {  # inside a residual or attention block, and at the ends of encoder and decoder
    "block": "resnets", "downsample": "downsamplers.0", "upsample": "upsamplers.0", "nin_shortcut": "conv_shortcut",
    "norm_out": "conv_norm_out", "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm", "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k", "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
}
# fmt: on


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
    levels = [("", "", {ours: FLUX_TOP[ours] for ours in FLUX_TOP if config.guidance_embed or "guidance" not in ours})]
    levels += [(f"double_blocks.{i}.", f"transformer_blocks.{i}.", FLUX_DOUBLE) for i in range(config.depth)]
    singles = range(config.depth_single_blocks)
    levels += [(f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", FLUX_SINGLE) for i in singles]
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
    """The same of every linear."""
    return {ours: parts for ours, parts in flux_modules(config).items() if not ours.endswith(".scale")}


@dataclass(frozen=True)
class Source:
    """One of our tensors as a file holds it: `names` stacked along dim 0, in `rows` each, then a change of form."""

    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    form: str = "same"  # "swapped": halves of dim 0 change places; "linear": the file has (o, i), we have (o, i, 1, 1)

    def assemble(self, parts: list[Tensor]) -> Tensor:
        """The file's tensors -> ours."""
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.form == "swapped":
            return tensor.roll(len(tensor) // 2, 0)
        return tensor[..., None, None] if self.form == "linear" else tensor

    def disassemble(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensor -> the file's tensors by name."""
        if self.form == "swapped":
            tensor = tensor.roll(len(tensor) // 2, 0)
        if self.form == "linear":
            tensor = tensor[..., 0, 0]
        parts = [tensor] if len(self.names) == 1 else tensor.split(self.rows)
        return {name: part.contiguous() for name, part in zip(self.names, parts, strict=True)}


def flux_diffusers(config: FluxConfig) -> dict[str, Source]:
    """Our transformer tensors in diffusers' layout."""
    table = {}
    for ours, parts in flux_modules(config).items():
        for kind in ("",) if ours.endswith(".scale") else (".weight", ".bias"):
            names, rows = tuple(part.name + kind for part in parts), tuple(part.rows for part in parts)
            table[ours + kind] = Source(names, rows, "swapped" if ours == SWAPPED else "same")
    return table


def vae_diffusers(config: VAEConfig, names: list[str]) -> dict[str, Source]:
    """Our VAE tensors (`names`) in diffusers' layout: decoder levels from the other end, 1x1 projections as linears."""
    table, levels = {}, len(config.channels)
    renamed = {f"encoder.down.{i}.": f"encoder.down_blocks.{i}." for i in range(levels)}
    renamed |= {f"decoder.up.{i}.": f"decoder.up_blocks.{levels - 1 - i}." for i in range(levels)}
    renamed |= {f".{ours}.": f".{theirs}." for ours, theirs in VAE_LEAVES.items()}
    projections = tuple(f"mid.attn_1.{part}.weight" for part in ("q", "k", "v", "proj_out"))
    for name in names:
        their_name = name
        for ours, theirs in renamed.items():
            their_name = their_name.replace(ours, theirs)
        table[name] = Source((their_name,), form="linear" if name.endswith(projections) else "same")
    return table
