"""Text -> (txt, vec) and pictures <-> latents: T5, CLIP and the VAE as things that are loaded, used and let go."""

import gc
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kontext_min.checkpoints.load import Checkpoint, load_clip, load_t5
from kontext_min.models.tokenizers import clip_tokenizer, t5_tokenizer
from kontext_min.models.vae import VAE

Text = tuple[Tensor, Tensor]  # txt (1, L, context_in_dim), vec (1, vec_in_dim)


class TextEncoder:
    """Both text encoders with their tokenizers. Large (9.8 GB for Kontext): use it, then `del` it, and `free`.
    then: as in `checkpoints.tensors.fill`, for T5: to quantise its linears, which in nf4 take 2.5 GB.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, then: Callable | None = None):
        self.device = device
        self.tokenize_t5 = t5_tokenizer(checkpoint.folder / "tokenizer_2")
        self.tokenize_clip = clip_tokenizer(checkpoint.folder / "tokenizer")
        self.t5 = load_t5(checkpoint, device, dtype, then)
        self.clip = load_clip(checkpoint, device, dtype)

    @torch.no_grad()
    def __call__(self, text: str) -> Text:
        if excess := self.tokenize_t5.excess(text):
            print(f"{text[:40]!r}… is longer than {self.tokenize_t5.length} tokens; its last {excess} are not seen")
        ids, ids_clip = (tokenize([text]).to(self.device) for tokenize in (self.tokenize_t5, self.tokenize_clip))
        return self.t5(ids), self.clip(ids_clip)


def free():
    gc.collect()
    torch.cuda.empty_cache()  # nothing where CUDA is not in use
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


@torch.no_grad()
def encode_image(vae: VAE, image: Image.Image) -> Tensor:
    """A picture whose sides are multiples of two latents -> (1, 16, h, w), normalised, on the VAE's device."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    return vae.encode((pixels / 127.5 - 1).to(vae.decoder.conv_in.weight)).float()


@torch.no_grad()
def decode_image(vae: VAE, latents: Tensor) -> Image.Image:  # (1, 16, h, w) -> a picture, values rounded
    x = vae.decode(latents.to(vae.decoder.conv_in.weight.dtype))[0]  # (3, H, W), about [-1, 1]
    if not x.isfinite().all():
        print("the picture is not of numbers alone: try --precision fp32, or less strength of the LoRA")
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def mask_weights(image: Image.Image, factor: int) -> Tensor:
    """A mask -> (1, 1, h, w) fp32, the share of white in every latent's area of factor x factor pixels."""
    white = torch.from_numpy(np.array(image.convert("L"), dtype=np.float32)) / 255
    return F.avg_pool2d(white[None, None], factor)
