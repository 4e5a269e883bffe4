"""One edit that can be made again and again, from the same noise at the same times."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kontext_min import flow, presets, sampler
from kontext_min.adapters.formats import read_adapter
from kontext_min.adapters.inject import apply_updates
from kontext_min.checkpoints import load
from kontext_min.data.buckets import Size, open_image
from kontext_min.edit import output_size, prepare_reference
from kontext_min.encoders import decode_image, encode_image, encode_texts, pixels_per_token
from kontext_min.flow import Condition
from kontext_min.models.flux import Flux
from kontext_min.models.tokenizers import T5Tokenizer
from kontext_min.models.vae import VAE
from kontext_min.sampler import Field, Sampling


@dataclass(frozen=True)
class Experiment:
    """A model and what it is given: an instruction and a reference of the output's size."""

    flux: Flux  # its modules are the sites
    vae: VAE
    image: Image.Image  # the reference as the model sees it
    conditions: dict[str, Condition]  # of every instruction, the one that is studied first, and of "", none
    words: dict[str, slice]  # of the first instruction: their tokens
    noise: Tensor  # (1, 16, h, w)
    times: Tensor  # (steps + 1,), falling
    guidance: float

    @classmethod
    def open(cls, image, *prompts: str, model="nano", lora=None, size="auto", steps=8, guidance=2.5, seed=0):
        """Load a picture, a model and a LoRA from their files. size: of the picture and the output, or auto."""
        if not prompts or not all(prompts) or steps < 1 or not 0 <= seed < 2**63:
            raise ValueError("nothing to study: it takes an instruction, 1 step or more, and a seed of 0 or more")
        picture, adapter = open_image(Path(image)), read_adapter(Path(lora)) if lora else None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        checkpoint = load.find(presets.locate(model))
        texts = encode_texts(checkpoint, [*prompts, ""], device, dtype)
        vae, flux = load.load_vae(checkpoint, device, torch.float32), load.load_flux(checkpoint, device, dtype)
        if adapter:
            apply_updates(flux, adapter.updates, 1.0, dtype)
        preset, multiple = presets.preset_of(checkpoint.folder), pixels_per_token(vae)
        shown = output_size([Size(*picture.size)], size, "auto", preset, multiple)
        picture = prepare_reference(picture, shown, "match", preset, multiple)
        latents = encode_image(vae, picture).to(device)
        conditions = {text: Condition(*encoded, [latents]) for text, encoded in texts.items()}
        words = word_slices(T5Tokenizer(checkpoint.folder / "tokenizer_2"), prompts[0])
        noise = flow.draw_noise(latents.shape, torch.Generator().manual_seed(seed)).to(device)
        times = flow.schedule(steps, flow.token_count(*noise.shape[-2:]), checkpoint.shift)
        return cls(flux, vae, picture, conditions, words, noise, times, guidance)

    @property
    def condition(self) -> Condition:
        """Of the first instruction."""
        return next(iter(self.conditions.values()))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the target's tokens, and of the reference's."""
        return self.noise.shape[-2] // 2, self.noise.shape[-1] // 2

    @property
    def streams(self) -> dict[str, slice]:
        """Where text, target and reference lie in the joint sequence."""
        text, tokens = self.condition.txt.shape[1], self.grid[0] * self.grid[1]
        target, reference = slice(text, text + tokens), slice(text + tokens, text + 2 * tokens)
        return {"text": slice(0, text), "target": target, "reference": reference}

    def field(self, condition: Condition) -> Field:
        """The velocity field of a condition."""
        return sampler.guided(self.flux, condition, None, Sampling(guidance=self.guidance))

    def run(self, condition: Condition | None = None) -> Tensor:
        """The finished latents, (1, 16, h, w)."""
        *_, x = sampler.euler(self.field(condition or self.condition), self.noise, self.times)
        return x

    def picture(self, latents: Tensor) -> Image.Image:
        """Latents as a picture."""
        return decode_image(self.vae, latents)


def word_slices(tokenizer: T5Tokenizer, prompt: str) -> dict[str, slice]:
    """Every word of an instruction -> its T5 tokens; a word that comes again has its place behind it."""
    words, slices, start = prompt.split(), {}, 0
    for i, word in enumerate(words, 1):
        end = min(len(tokenizer.encode(" ".join(words[:i]))), tokenizer.length - 1)
        if end > start:
            slices[f"{word} ({i})" if word in slices else word] = slice(start, end)
        start = end
    return slices
