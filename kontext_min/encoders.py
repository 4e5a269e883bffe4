"""Text -> (txt, vec) and pictures <-> latents: T5, CLIP and the VAE as things that are loaded, used and let go."""

import gc
from collections.abc import Callable
from functools import partial
from itertools import product

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
    """Both text encoders with their tokenizers. Large (9.8 GB for Kontext): use it, then `del` it.

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
        """One instruction, encoded, on the device."""
        if excess := self.tokenize_t5.excess(text):
            print(f"{text[:40]!r}… is longer than {self.tokenize_t5.length} tokens; its last {excess} are not seen")
        ids, ids_clip = (tokenize([text]).to(self.device) for tokenize in (self.tokenize_t5, self.tokenize_clip))
        return self.t5(ids), self.clip(ids_clip)


def encode_texts(
    checkpoint: Checkpoint, texts: list[str], device: torch.device, dtype: torch.dtype, then: Callable | None = None
) -> dict[str, Text]:
    """Load the text encoders, encode every different text once, and free them. -> text -> (txt, vec) on the device."""
    encode = TextEncoder(checkpoint, device, dtype, then)
    encoded = {text: encode(text) for text in dict.fromkeys(texts)}
    del encode
    free(device)
    return encoded


def free(device: torch.device):
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture -> (1, 3, H, W) fp32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W), about [-1, 1] -> a picture, values rounded."""
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


@torch.no_grad()
def encode_image(vae: VAE, image: Image.Image) -> Tensor:
    """A picture whose sides are multiples of two latents -> (1, 16, h, w), normalised, on the VAE's device."""
    weight = vae.decoder.conv_in.weight
    return vae.encode(to_tensor(image).to(weight.device, weight.dtype)).float()


@torch.no_grad()
def decode_image(vae: VAE, latents: Tensor) -> Image.Image:
    """(1, 16, h, w) -> a picture."""
    return to_image(vae.decode(latents.to(vae.decoder.conv_in.weight.dtype))[0])


def tile(vae: VAE, side: int = 64) -> VAE:
    """Let the VAE see what is above side x side latents in tiles of that size: less memory, about the same result.

    Its norms see one tile at a time. Of nano's, photographs of 22 latents a side, decoded in tiles of 12, have 31 dB to
    what is decoded whole, and 37 dB if they are encoded in tiles, too (means of six).
    """
    factor = vae.config.factor
    vae.encode = partial(in_tiles, vae.encode, side * factor, 1 / factor)
    vae.decode = partial(in_tiles, vae.decode, side, factor)
    return vae


def in_tiles(function: Callable[[Tensor], Tensor], side: int, scale: float, x: Tensor) -> Tensor:
    """function(x), which is `scale` times as high and wide as x (1, C, H, W); tiles overlap by a quarter, and blend."""
    if max(x.shape[2:]) <= side:
        return function(x)
    (height, width), total, weights = (int(n * scale) for n in x.shape[2:]), 0, 0
    starts = [[max(0, min(a, n - side)) for a in range(0, max(1, n - side // 4), side * 3 // 4)] for n in x.shape[2:]]
    for top, left in product(*starts):
        y = function(x[:, :, top : top + side, left : left + side])
        ramps = (torch.arange(1, n + 1, device=x.device) for n in y.shape[2:])
        rows, columns = (torch.minimum(ramp, ramp.flip(0)).clamp(max=int(side * scale / 4)) for ramp in ramps)
        top, left, weight = int(top * scale), int(left * scale), rows[:, None] * columns
        place = (left, width - left - len(columns), top, height - top - len(rows))
        total, weights = total + F.pad(y * weight, place), weights + F.pad(weight, place)
    return total / weights


def mask_weights(image: Image.Image, factor: int) -> Tensor:
    """A mask -> (1, 1, h, w) fp32, the share of white in every latent's area of factor x factor pixels."""
    white = torch.from_numpy(np.array(image.convert("L"), dtype=np.float32)) / 255
    return F.avg_pool2d(white[None, None], factor)


def pixels_per_token(vae: VAE) -> int:
    """Width of a token in pixels: 2 latents, 16 pixels for FLUX."""
    return 2 * vae.config.factor
