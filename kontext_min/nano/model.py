"""nano's four networks together: their sizes, first weights, text encoding, and export."""

import json
from pathlib import Path

from torch import Tensor, nn

from kontext_min.checkpoints.save import save_model, write_json
from kontext_min.flow import Condition
from kontext_min.models.clip import CLIPConfig, CLIPText
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.models.t5 import T5Config, T5Encoder
from kontext_min.models.tokenizers import CLIPTokenizer, T5Tokenizer
from kontext_min.models.vae import VAE
from kontext_min.nano.vocabulary import CLIP_TOKENS, LENGTH, T5_PIECES
from kontext_min.presets import NANO

# fmt: off
FLUX = FluxConfig(vec_in_dim=64, context_in_dim=128, hidden_size=192, num_heads=3, depth=2, depth_single_blocks=4,
                  axes_dim=(8, 28, 28))
T5 = T5Config(vocab_size=T5_PIECES, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, max_distance=32)
CLIP = CLIPConfig(vocab_size=CLIP_TOKENS, hidden_size=64, intermediate_size=256, num_layers=2, num_heads=2,
                  max_positions=LENGTH, eos_token_id=CLIP_TOKENS - 1)
# fmt: on


class Nano(nn.Module):
    """The trainable networks; the autoencoder stands beside them, frozen."""

    def __init__(self):
        super().__init__()
        self.flux, self.t5, self.clip = Flux(FLUX), T5Encoder(T5), CLIPText(CLIP)
        for parameter in self.flux.final_layer.linear.parameters():
            nn.init.zeros_(parameter)
        for block in self.t5.encoder.block:
            nn.init.normal_(block.layer[0].SelfAttention.q.weight, std=(T5.d_model * T5.d_kv) ** -0.5)
        embeddings = self.clip.text_model.embeddings
        for table in (embeddings.token_embedding, embeddings.position_embedding):
            nn.init.normal_(table.weight, std=0.1)

    def condition(self, ids: tuple[Tensor, Tensor], references: list[Tensor]) -> Condition:
        """(T5 ids, CLIP ids), each (B, LENGTH), and normalised reference latents -> what `flow.velocity` takes."""
        return Condition(txt=self.t5(ids[0]), vec=self.clip(ids[1]), references=references)


class Tokenizers:
    """Both tokenizers of a model folder: prompts -> (T5 ids, CLIP ids), each (B, LENGTH)."""

    def __init__(self, folder: Path):
        self.t5, self.clip = T5Tokenizer(folder / "tokenizer_2"), CLIPTokenizer(folder / "tokenizer")

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        return self.t5(prompts), self.clip(prompts)


def export(folder: Path, nano: Nano, vae: VAE) -> None:
    """Write the standard model folder (bf16); the tokenizers are there already. The index names the preset."""
    save_model(folder, flux=nano.flux, vae=vae, t5=nano.t5, clip=nano.clip)
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | {"_name_or_path": NANO.name})
