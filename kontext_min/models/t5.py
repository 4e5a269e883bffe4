"""The encoder of T5 v1.1 (gated GELU): token ids -> one vector per token.

Names are those of the Hugging Face files (T5-XXL: 4,762,310,656 parameters). Two things surprise: attention scores are
not divided by sqrt(d), and the position bias, stored in the first layer only, is added in every layer.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder; the defaults are T5 v1.1 XXL."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


def position_buckets(length: int, num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """Bucket of every (query, key) pair, (L, L) int64: exact for near keys, logarithmic up to max_distance beyond."""
    position = torch.arange(length, device=device)
    relative = position[None, :] - position[:, None]  # key - query; half of the buckets are for keys after the query
    half, exact, distance = num_buckets // 2, num_buckets // 4, relative.abs()
    log_ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (log_ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (relative > 0).long()


class T5LayerNorm(nn.RMSNorm):
    """x / rms(x) * weight: no mean, no bias; the variance is taken in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention with an additive position bias and unscaled scores."""

    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (rearrange(f(x), "B L (H D) -> B H L D", H=self.num_heads) for f in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(rearrange(x, "B H L D -> B L (H D)"))


class Block(nn.Module):
    """Attention, then the gated feed-forward wo(gelu(wi_0 x) * wi_1 x), tanh's GELU: each as x + f(norm(x))."""

    def __init__(self, config: T5Config):
        super().__init__()
        width, inner = config.d_model, config.d_ff
        attention = {"SelfAttention": SelfAttention(config)}
        sizes = {"wi_0": (width, inner), "wi_1": (width, inner), "wo": (inner, width)}
        gated = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        self.layer = nn.ModuleList(map(nn.ModuleDict, (attention, {"DenseReluDense": gated})))  # as the files have it
        for layer in self.layer:
            layer["layer_norm"] = T5LayerNorm(width, config.eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        first, second = self.layer
        x = x + first.SelfAttention(first.layer_norm(x), bias)
        y, gated = second.layer_norm(x), second.DenseReluDense
        return x + gated.wo(F.gelu(gated.wi_0(y), approximate="tanh") * gated.wi_1(y))


class T5Encoder(nn.Module):
    """ids (B, L) int64 -> (B, L, d_model). Padding is not masked: FLUX was trained to see it."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        blocks[0].layer[0].SelfAttention.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": T5LayerNorm(config.d_model, config.eps)})

    def forward(self, ids: Tensor) -> Tensor:
        x = self.shared(ids)  # (B, L, d_model)
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        buckets = position_buckets(ids.shape[1], self.config.num_buckets, self.config.max_distance, ids.device)
        bias = rearrange(table(buckets), "q k h -> 1 h q k").to(x.dtype)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)
