"""The text tower of CLIP: token ids -> one pooled vector, the hidden state at the end-of-text token.

Names are those of the Hugging Face files, with the `text_model.` prefix (ViT-L/14: 123,060,480 parameters).
FLUX uses the pooled vector without CLIP's text projection.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LEGACY_EOS = 2  # what the published config.json says, wrongly: then the end of text is the largest id
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}  # OpenAI's approximation; exact


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the text tower; the defaults are clip-vit-large-patch14."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_positions: int = 77
    eos_token_id: int = LEGACY_EOS
    activation: str = "quick_gelu"
    eps: float = 1e-5


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.num_heads = config.num_heads
        linears = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = linears

    def forward(self, x: Tensor) -> Tensor:
        projected = (linear(x) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (rearrange(y, "B L (H D) -> B H L D", H=self.num_heads) for y in projected)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(x, "B H L D -> B L (H D)"))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each around a shortcut."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.layer_norm1, self.self_attn = nn.LayerNorm(hidden, eps=config.eps), Attention(config)
        self.layer_norm2, self.activation = nn.LayerNorm(hidden, eps=config.eps), ACTIVATIONS[config.activation]
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(hidden, inner), "fc2": nn.Linear(inner, hidden)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


class CLIPText(nn.Module):
    """ids (B, L) int64, ending in one or more end-of-text tokens -> pooled (B, hidden_size)."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        token = nn.Embedding(config.vocab_size, config.hidden_size)
        position = nn.Embedding(config.max_positions, config.hidden_size)
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": token, "position_embedding": position}),
            "encoder": nn.ModuleDict({"layers": layers}),
            "final_layer_norm": nn.LayerNorm(config.hidden_size, eps=config.eps),
        })  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        text = self.text_model
        positions = text.embeddings.position_embedding.weight[: ids.shape[1]]
        x = text.embeddings.token_embedding(ids) + positions  # (B, L, hidden)
        for layer in text.encoder.layers:
            x = layer(x)
        x = text.final_layer_norm(x)
        eos = self.config.eos_token_id
        first_end = ids.argmax(dim=-1) if eos == LEGACY_EOS else (ids == eos).int().argmax(dim=-1)  # (B,)
        return x[torch.arange(len(x), device=x.device), first_end]
