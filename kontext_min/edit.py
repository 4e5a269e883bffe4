"""Prompt and references -> an edited picture: sizes, latents, sampling, pixels. Training's validation uses it too."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kontext_min import flow, presets, sampler
from kontext_min.adapters.inject import apply_updates, at_strength
from kontext_min.adapters.merge import merging
from kontext_min.adapters.read import AdapterFile
from kontext_min.adapters.rows import by_linear
from kontext_min.checkpoints import load
from kontext_min.data.buckets import LANCZOS, Size, fit, nearest_aspect, parse_size
from kontext_min.encoders import Text, TextEncoder, decode_image, encode_image, free
from kontext_min.models.flux import Flux
from kontext_min.models.vae import VAE
from kontext_min.offload import Ahead, open_apart, unneeded
from kontext_min.presets import Preset
from kontext_min.quantize import form_of, quantising

TOKEN = 16  # pixels: sizes are multiples of it
Loras = list[tuple[AdapterFile, float]]
PLAIN = ("no_change", Path("cache"), "no_change")


@dataclass(frozen=True)
class Editor:
    """What makes pictures: the networks of one model, its time shift and its preferred sizes."""

    flux: Flux
    vae: VAE
    shift: flow.Shift
    preset: Preset
    ahead: Ahead = unneeded

    @property
    def device(self) -> torch.device:
        return self.vae.decoder.conv_in.weight.device


def open_editor(
    model: str, loras: Loras, texts: list[str], device: torch.device, dtype: torch.dtype, base=PLAIN, merge=False
) -> tuple[Editor, dict[str, Text]]:
    """Encode all texts, let the text encoders go, then load the rest. -> the editor and text -> (txt, vec).
    loras: each with its strength; ValueError names the one that does not fit, before anything is loaded.
    base: the precision of the transformer, where a quantised one is kept, as in `open_flux`, and the precision of T5.
    merge: add the loras to the weights themselves, before these are quantised: faster, and they cannot be taken off.
    """
    checkpoint = load.find(presets.locate(model))
    empty, *_ = load.empty_flux(checkpoint)
    for lora, _ in loras:
        try:
            by_linear(lora.updates, empty)
        except ValueError as error:
            raise ValueError(f"{lora.path} does not fit {model}: {error}") from error
    precision, cache, t5 = base
    encode = TextEncoder(checkpoint, device, dtype, quantising(t5))
    encoded = {text: encode(text) for text in dict.fromkeys(texts)}
    del encode
    free()
    vae = load.load_vae(checkpoint, device, torch.float32)
    updates = [at_strength(update, strength) for lora, strength in loras for update in lora.updates if merge]
    place = torch.device("cpu") if device.type == "cuda" and form_of(precision) else device
    hook = merging(updates, empty) if updates else None
    flux, ahead = open_apart(place, False, checkpoint, device, dtype, precision, cache, merge=hook)
    for lora, strength in loras if not merge else ():
        apply_updates(flux, lora.updates, strength, dtype)
    return Editor(flux, vae, checkpoint.shift, presets.preset_of(checkpoint.folder), ahead), encoded


def output_size(references: list[Size], size: str, reference_size: str, preset: Preset) -> Size:
    """The size of the picture to make: as asked, else that of the first reference as the model will see it."""
    if size != "auto":
        return parse_size(size).floored(TOKEN)
    if not references:
        return preset.default
    return seen_size(references[0], reference_size, nearest_aspect(references[0], preset.sizes), preset)


def seen_size(original: Size, rule: str, output: Size, preset: Preset) -> Size:
    """The size in which the model sees a reference: `keep` its own in tokens, `match` the output's, `auto`, or WxH."""
    sizes = {"match": output, "keep": original.floored(TOKEN), "auto": nearest_aspect(original, preset.sizes)}
    return sizes.get(rule) or parse_size(rule).floored(TOKEN)


def prepare_reference(image: Image.Image, output: Size, rule: str, preset: Preset) -> Image.Image:
    size = seen_size(Size(*image.size), rule, output, preset)
    return image.resize(size, LANCZOS) if rule == "keep" else fit(image, size)


def edit(
    editor: Editor, text: Text, references: list[Image.Image], size: Size, sampling: sampler.Sampling,
    negative: Text | None = None, each_step: Callable[[Tensor], None] = lambda x: None,
) -> Image.Image:  # fmt: skip
    """One picture of `size` (multiples of a token) from an encoded instruction and prepared references.
    each_step is called with the latents (1, 16, h, w) after every step.
    """
    latents = [encode_image(editor.vae, image).to(editor.device) for image in references]
    condition, unwanted = flow.Condition(*text, latents), negative and flow.Condition(*negative, latents)
    factor = editor.vae.config.factor
    shape = (1, editor.vae.config.latent_channels, size.height // factor, size.width // factor)
    x = flow.draw_noise(shape, torch.Generator().manual_seed(sampling.seed)).to(editor.device)
    times = flow.schedule(sampling.steps, flow.token_count(*shape[-2:]), editor.shift)
    for _, vec in (text, *([negative] if negative and sampling.cfg_scale != 1 else [])):
        editor.ahead(times[:-1], vec.expand(sampling.steps, -1), torch.full_like(times[:-1], sampling.guidance))
    for x in sampler.euler(sampler.guided(editor.flux, condition, unwanted, sampling), x, times):  # noqa: B020
        each_step(x)
    return decode_image(editor.vae, x)
