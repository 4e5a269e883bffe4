"""One edit that can be made again and again, from the same noise at the same times."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kontext_min import flow, presets, sampler
from kontext_min.adapters.formats import read_lora
from kontext_min.adapters.inject import apply_weights
from kontext_min.checkpoints import load
from kontext_min.data.buckets import Size, open_image
from kontext_min.edit import Editor, output_size, prepare_reference
from kontext_min.encoders import decode_image, encode_image, encode_texts, pixels_per_token
from kontext_min.flow import Condition
from kontext_min.models.flux import Flux
from kontext_min.models.tokenizers import T5Tokenizer
from kontext_min.sampler import Field, Sampling


@dataclass(frozen=True)
class Experiment:
    """A model and what it is given. The sequence is text, target, reference; the last two have one size."""

    editor: Editor
    image: Image.Image  # the reference as the model sees it
    conditions: dict[str, Condition]  # of every prompt, the one that is studied first, and of "", no instruction
    words: dict[str, slice]  # of the first prompt: their tokens
    noise: Tensor  # (1, 16, h, w)
    times: Tensor  # (steps + 1,), falling
    guidance: float

    @classmethod
    def open(cls, image, *prompts: str, model="nano", lora=None, size="auto", steps=8, guidance=2.5, seed=0):
        """Load everything, the picture and the LoRA from their files. size: of the reference and the output, or auto.

        Raises ValueError and FileNotFoundError, in a sentence.
        """
        if not all(prompts) or not prompts or steps < 1 or not 0 <= seed < 2**63:
            raise ValueError("nothing to study: it takes an instruction, 1 step or more, and a seed of 0 or more")
        picture, adapter = open_image(Path(image)), read_lora(Path(lora)) if lora else None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        checkpoint = load.find(presets.locate(model))
        texts = encode_texts(checkpoint, [*prompts, ""], device, dtype)
        vae, flux = load.load_vae(checkpoint, device, torch.float32), load.load_flux(checkpoint, device, dtype)
        if adapter:
            apply_weights(flux, adapter.weights, 1.0, dtype)
        editor = Editor(flux, vae, checkpoint.shift, presets.preset_of(checkpoint.folder))
        multiple = pixels_per_token(vae)
        shown = output_size([Size(*picture.size)], size, "auto", editor.preset, multiple)
        picture = prepare_reference(picture, shown, "match", editor.preset, multiple)
        latents = encode_image(vae, picture).to(device)
        noise = flow.draw_noise(latents.shape, torch.Generator().manual_seed(seed)).to(device)
        times = flow.schedule(steps, flow.token_count(*noise.shape[-2:]), editor.shift)
        words = word_slices(T5Tokenizer(checkpoint.folder / "tokenizer_2"), prompts[0])
        conditions = {text: Condition(*encoded, [latents]) for text, encoded in texts.items()}
        return cls(editor, picture, conditions, words, noise, times, guidance)

    @property
    def flux(self) -> Flux:
        """The transformer, whose modules are the sites."""
        return self.editor.flux

    @property
    def condition(self) -> Condition:
        """Of the first prompt."""
        return next(iter(self.conditions.values()))

    @property
    def streams(self) -> dict[str, slice]:
        """Where text, target and reference lie in the sequence."""
        text, tokens = self.condition.txt.shape[1], flow.token_count(*self.noise.shape[-2:])
        starts = {"text": (0, text), "target": (text, text + tokens), "reference": (text + tokens, text + 2 * tokens)}
        return {name: slice(*ends) for name, ends in starts.items()}

    def grid(self, values: Tensor) -> Tensor:
        """A number for every token of the target or the reference, (L,) -> rows and columns, (h/2, w/2)."""
        return values.reshape(self.noise.shape[-2] // 2, self.noise.shape[-1] // 2)

    def field(self, condition: Condition) -> Field:
        """The velocity field of a condition."""
        return sampler.guided(self.flux, condition, None, Sampling(guidance=self.guidance))

    def run(self, condition: Condition | None = None) -> Tensor:
        """The finished latents, (1, 16, h, w)."""
        *_, x = sampler.euler(self.field(condition or self.condition), self.noise, self.times)
        return x

    def picture(self, latents: Tensor) -> Image.Image:
        """Latents as a picture."""
        return decode_image(self.editor.vae, latents)


def word_slices(tokenizer: T5Tokenizer, prompt: str) -> dict[str, slice]:
    """Every word of a prompt -> its T5 tokens; a word that comes again has its place behind it."""
    words, slices, start = prompt.split(), {}, 0
    for i, word in enumerate(words):
        end = min(len(tokenizer.encode(" ".join(words[: i + 1]))), tokenizer.length - 1)
        if end > start:
            slices[f"{word} ({i + 1})" if word in slices else word] = slice(start, end)
        start = end
    return slices
