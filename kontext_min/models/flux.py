"""The FLUX.1 transformer (MMDiT): text tokens, noisy target tokens and clean reference tokens in one sequence.

Kontext is *only* extra tokens: references are appended to the target's tokens and told apart by their position ids
(see `kontext_min.flow`). Names and layout are those of Black Forest Labs' `flux` (single file, fused qkv).
Shapes: B batch, L tokens, H heads, D channels of one head. The stream width `hidden_size` is H * D.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LayerNorm = partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)  # the modulation shifts and scales instead


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of the transformer; the defaults are FLUX.1-dev and Kontext-dev (11,901,408,320 parameters)."""

    in_channels: int = 64  # 16 latent channels x 2 x 2 patch
    out_channels: int = 64
    vec_in_dim: int = 768  # pooled CLIP text
    context_in_dim: int = 4096  # T5 tokens
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19  # double blocks: text and image have their own weights
    depth_single_blocks: int = 38  # single blocks: one set of weights for the joint sequence
    axes_dim: tuple[int, ...] = (16, 56, 56)  # channels of a head rotated by (index, row, column)
    theta: int = 10_000
    guidance_embed: bool = True

    def __post_init__(self):
        if self.hidden_size != self.num_heads * sum(self.axes_dim):
            said = f"hidden_size {self.hidden_size} is not num_heads {self.num_heads} x sum(axes_dim) {self.axes_dim}"
            raise ValueError(f"transformer sizes do not fit: {said}; correct transformer/config.json")

    @property
    def mlp_hidden(self) -> int:  # width of a block's feed-forward layer
        return int(self.hidden_size * self.mlp_ratio)


def timestep_embedding(s: Tensor) -> Tensor:
    """Sinusoids of 1000 * s, cosines first. s (B,) in [0, 1] or a guidance scale -> (B, 256) in fp32.
    Computed in fp32 whatever the model's dtype: in bf16, 1000 * s would move in steps of 4.
    """
    freqs = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32, device=s.device) / 128)
    args = 1000.0 * s.float()[:, None] * freqs[None]
    return torch.cat([args.cos(), args.sin()], dim=-1)


def rope_angles(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> Tensor:
    """Rotations e^(i angle) of position ids. ids (L, 3) -> (L, D/2), complex64 from fp64 angles (fp32 on MPS)."""
    exact = torch.float32 if ids.device.type == "mps" else torch.float64
    omegas = (theta ** -(torch.arange(0, dim, 2, dtype=exact, device=ids.device) / dim) for dim in axes_dim)
    angle = torch.cat(list(map(torch.outer, ids.to(exact).T, omegas)), dim=-1)  # (L, D/2), an axis beside the other
    return torch.complex(angle.cos().float(), angle.sin().float())


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate channel pairs (x[2j], x[2j+1]), each one complex number, in fp32. x (B, H, L, D), pe (L, D/2) -> as x."""
    if torch.compiler.is_compiling():  # inductor makes no kernels of complex numbers
        (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), torch.view_as_real(pe).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, H, L, D/2)
    return torch.view_as_real(pairs * pe).flatten(-2).type_as(x)


def embedder(in_dim: int, hidden: int) -> nn.Sequential:
    """Linear, SiLU, Linear: a sinusoid or the pooled text -> (B, hidden)."""
    layers = {"in_layer": nn.Linear(in_dim, hidden), "silu": nn.SiLU(), "out_layer": nn.Linear(hidden, hidden)}
    return nn.Sequential(OrderedDict(layers))


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dimension, eps 1e-6; torch computes it in fp32 and rounds once."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale, eps=1e-6)


class QKNorm(nn.Module):
    """q, k, v of all heads, (B, L, H*D) each -> (B, H, L, D) each: q and k normed per head, before the rotation."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, *qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (rearrange(x, "B L (H D) -> B H L D", D=len(self.query_norm.scale)) for x in qkv)
        return self.query_norm(q), self.key_norm(k), v


class Attend(nn.Module):
    """Rotate q and k, then softmax(q k^T / sqrt(D)) v. (B, H, L, D) each, q of `rows` alone -> (B, rows, H*D)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pe: Tensor, rows: slice = slice(None)) -> Tensor:
        x = F.scaled_dot_product_attention(apply_rope(q, pe[rows]), apply_rope(k, pe), v)
        return rearrange(x, "B H L D -> B L (H D)")


class Modulation(nn.Module):
    """vec (B, hidden) -> 3 (single) or 6 (double) tensors (B, 1, hidden): shift, scale, gate [, shift, scale, gate]."""

    def __init__(self, hidden: int, double: bool):
        super().__init__()
        self.lin = nn.Linear(hidden, (6 if double else 3) * hidden)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None, :].split(vec.shape[-1], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, 1 + scale, x)


def self_attention(hidden: int, num_heads: int) -> nn.ModuleDict:
    """The projections of one stream's attention: fused qkv, QK-norm and the output projection."""
    qkv, proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
    return nn.ModuleDict({"qkv": qkv, "norm": QKNorm(hidden // num_heads), "proj": proj})


def feed_forward(hidden: int, mlp_hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, mlp_hidden), nn.GELU(approximate="tanh"), nn.Linear(mlp_hidden, hidden))


class DoubleStreamBlock(nn.Module):
    """Image and text tokens keep their own weights and meet in one attention over the joint sequence, text first."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        hidden = config.hidden_size
        self.img_mod = Modulation(hidden, double=True)
        self.img_norm1 = LayerNorm(hidden)
        self.img_attn = self_attention(hidden, config.num_heads)
        self.img_norm2 = LayerNorm(hidden)
        self.img_mlp = feed_forward(hidden, config.mlp_hidden)
        self.txt_mod = Modulation(hidden, double=True)
        self.txt_norm1 = LayerNorm(hidden)
        self.txt_attn = self_attention(hidden, config.num_heads)
        self.txt_norm2 = LayerNorm(hidden)
        self.txt_mlp = feed_forward(hidden, config.mlp_hidden)
        self.attend = Attend()

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)  # six (B, 1, hidden) each, the last one the last gate
        img, img_change, txt, txt_change = self.branch(img, txt, img_mod[:-1], txt_mod[:-1], pe)
        return torch.addcmul(img, img_mod[-1], img_change), torch.addcmul(txt, txt_mod[-1], txt_change)

    def branch(self, img: Tensor, txt: Tensor, img_mod: tuple, txt_mod: tuple, pe: Tensor) -> tuple[Tensor, ...]:
        """All but the last gates and sums: img and txt after attention, and what their feed-forwards add to each."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2 = img_mod
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2 = txt_mod
        streams = zip(
            self.txt_attn.norm(*self.txt_attn.qkv(modulate(self.txt_norm1(txt), txt_shift1, txt_scale1)).chunk(3, -1)),
            self.img_attn.norm(*self.img_attn.qkv(modulate(self.img_norm1(img), img_shift1, img_scale1)).chunk(3, -1)),
            strict=True,
        )
        qkv = (torch.cat(parts, dim=2) for parts in streams)  # (B, H, L_txt + L_img, D) each
        x = self.attend(*qkv, pe)  # (B, L_txt + L_img, hidden)
        txt_x, img_x = x.split([txt.shape[1], img.shape[1]], dim=1)

        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(txt_x))
        img = torch.addcmul(img, img_gate1, self.img_attn.proj(img_x))
        txt_change = self.txt_mlp(modulate(self.txt_norm2(txt), txt_shift2, txt_scale2))
        img_change = self.img_mlp(modulate(self.img_norm2(img), img_shift2, img_scale2))
        return img, img_change, txt, txt_change


class SingleStreamBlock(nn.Module):
    """Attention and feed-forward side by side on the joint sequence, each with one half of two fused linears."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        hidden = config.hidden_size
        self.widths = (hidden, hidden, hidden, config.mlp_hidden)
        self.linear1 = nn.Linear(hidden, sum(self.widths))  # -> [q k v | mlp]
        self.linear2 = nn.Linear(hidden + config.mlp_hidden, hidden)  # [attention | mlp] ->
        self.norm = QKNorm(hidden // config.num_heads)
        self.pre_norm = LayerNorm(hidden)
        self.modulation = Modulation(hidden, double=False)
        self.attend = Attend()

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor, rows: slice = slice(None)) -> Tensor:
        """rows: the tokens that go on, all of them but after the last block."""
        shift, scale, gate = self.modulation(vec)  # (B, 1, hidden) each
        return torch.addcmul(x[:, rows], gate, self.branch(x, shift, scale, pe, rows))

    def branch(self, x: Tensor, shift: Tensor, scale: Tensor, pe: Tensor, rows: slice) -> Tensor:
        """What the block adds to these tokens, before its gate."""
        x = modulate(self.pre_norm(x), shift, scale)
        if rows != slice(None) and type(self.linear1) is nn.Linear:  # of the others only keys and values are needed
            parts = zip(self.linear1.weight.split(self.widths), self.linear1.bias.split(self.widths), strict=True)
            seen = (x[:, rows], x, x, x[:, rows])
            q, k, v, mlp = (F.linear(tokens, *part) for tokens, part in zip(seen, parts, strict=True))
        else:
            q, k, v, mlp = self.linear1(x).split(self.widths, dim=-1)
            q, mlp = q[:, rows], mlp[:, rows]
        attention = self.attend(*self.norm(q, k, v), pe, rows=rows)  # (B, rows, hidden)
        return self.linear2(torch.cat([attention, F.gelu(mlp, approximate="tanh")], dim=-1))


class LastLayer(nn.Module):
    """Modulated LayerNorm and the projection to patches. The single file stores (shift, scale) in this order."""

    def __init__(self, hidden: int, out_channels: int):
        super().__init__()
        self.norm_final = LayerNorm(hidden)
        self.linear = nn.Linear(hidden, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Flux(nn.Module):
    """The velocity field of FLUX.1, on packed tokens. `flow.velocity` is the way to call it with latents."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, hidden)
        self.time_in = embedder(256, hidden)
        self.vector_in = embedder(config.vec_in_dim, hidden)
        self.guidance_in = embedder(256, hidden) if config.guidance_embed else None
        self.txt_in = nn.Linear(config.context_in_dim, hidden)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(hidden, config.out_channels)

    def embed(self, timesteps: Tensor, y: Tensor, guidance: Tensor) -> Tensor:
        """The one vector that modulates every token: time, guidance and pooled text -> vec (B, hidden)."""
        vec = self.time_in(timestep_embedding(timesteps).to(y.dtype))
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(y.dtype))
        return vec + self.vector_in(y)

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, *, timesteps, y, guidance, wanted=None
    ) -> Tensor:
        """One evaluation for a whole batch of sequences; text comes first in the joint sequence.
        img (B, L_img, in_channels) packed target tokens followed by reference tokens, img_ids (L_img, 3)
        txt (B, L_txt, context_in_dim), txt_ids (L_txt, 3); y (B, vec_in_dim) pooled text
        timesteps (B,) in [0, 1] with 1 = noise; guidance (B,), the distilled scale (ignored without guidance_embed)
        wanted: how many of the image tokens the caller keeps, the target's; the last block leaves out all others
        -> (B, wanted or L_img, out_channels)
        """
        vec = self.embed(timesteps, y, guidance)  # (B, hidden)
        img, txt = self.img_in(img), self.txt_in(txt)  # (B, L, hidden) each
        pe = rope_angles(torch.cat([txt_ids, img_ids]), self.config.axes_dim, self.config.theta)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        x = torch.cat([txt, img], dim=1)  # (B, L_txt + L_img, hidden)
        *blocks, last = self.single_blocks
        for block in blocks:
            x = block(x, vec, pe)
        first = txt.shape[1]
        x = last(x, vec, pe)[:, first:] if wanted is None else last(x, vec, pe, rows=slice(first, first + wanted))
        return self.final_layer(x, vec)
