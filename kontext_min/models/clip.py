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


class Layer(nn.Module):
    """Pre-norm causal self-attention and feed-forward, each around a shortcut."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        hidden, inner, names = config.hidden_size, config.intermediate_size, ("q_proj", "k_proj", "v_proj", "out_proj")
        self.num_heads, self.activation = config.num_heads, ACTIVATIONS[config.activation]
        self.layer_norm1 = nn.LayerNorm(hidden, eps=config.eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in names})
        self.layer_norm2 = nn.LayerNorm(hidden, eps=config.eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(hidden, inner), "fc2": nn.Linear(inner, hidden)})

    def forward(self, x: Tensor) -> Tensor:
        *projections, out_proj = self.self_attn.values()
        y = self.layer_norm1(x)
        q, k, v = (rearrange(linear(y), "B L (H D) -> B H L D", H=self.num_heads) for linear in projections)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + out_proj(rearrange(heads, "B H L D -> B L (H D)"))
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


class CLIPText(nn.Module):
    """ids (B, L) int64, ending in one or more end-of-text tokens -> pooled (B, hidden_size)."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        token = nn.Embedding(config.vocab_size, config.hidden_size)
        position = nn.Embedding(config.max_positions, config.hidden_size)
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": token, "position_embedding": position}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.num_layers))}),
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
