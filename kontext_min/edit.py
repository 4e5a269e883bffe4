"""Prompt and references -> an edited picture: sizes, latents, sampling, pixels. Training's validation uses it too."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from kontext_min import flow, sampler
from kontext_min.data.buckets import LANCZOS, Size, fit, nearest_aspect, parse_size
from kontext_min.encoders import Text, decode_image, encode_image
from kontext_min.flow import Condition
from kontext_min.models.flux import Flux
from kontext_min.models.vae import VAE
from kontext_min.presets import Preset
from kontext_min.sampler import Sampling


@dataclass(frozen=True)
class Editor:
    """What makes pictures: the networks of one model, its time shift and its preferred sizes."""

    flux: Flux
    vae: VAE
    shift: flow.Shift
    preset: Preset

    @property
    def device(self) -> torch.device:
        """Where the sampling runs."""
        return next(self.flux.parameters()).device


def output_size(references: list[Size], size: str, reference_size: str, preset: Preset, multiple: int) -> Size:
    """The size of the picture to make: as asked, else that of the first reference as the model will see it."""
    if size != "auto":
        return parse_size(size).floored(multiple)
    if not references:
        return preset.default
    return sized(references[0], nearest_aspect(references[0], preset.sizes), reference_size, multiple)


def sized(reference: Size, match: Size, rule: str, multiple: int) -> Size:
    """The size in which the model sees a reference. rule: keep (floored to tokens), match, or WxH; auto has `match`."""
    if rule == "keep":
        return reference.floored(multiple)
    return match if rule in ("auto", "match") else parse_size(rule).floored(multiple)


def prepare_reference(image: Image.Image, size: Size, rule: str, preset: Preset, multiple: int) -> Image.Image:
    """A reference as the model sees it; `size` is the output's. `keep` resizes without a crop, all others crop."""
    original = Size(*image.size)
    if rule == "keep":
        return image.resize(original.floored(multiple), LANCZOS)
    match = nearest_aspect(original, preset.sizes) if rule == "auto" else size
    return fit(image, sized(original, match, rule, multiple))


def edit(
    editor: Editor,
    text: Text,
    references: list[Image.Image],
    size: Size,
    sampling: Sampling,
    negative: Text | None = None,
    each_step: Callable[[Tensor], None] = lambda x: None,
) -> Image.Image:
    """One picture of `size` (multiples of a token) from an encoded instruction and prepared references.

    each_step is called with the latents (1, 16, h, w) after every step.
    """
    latents = [encode_image(editor.vae, image).to(editor.device) for image in references]
    condition, unwanted = Condition(*text, latents), negative and Condition(*negative, latents)
    factor = editor.vae.config.factor
    shape = (1, editor.vae.config.latent_channels, size.height // factor, size.width // factor)
    x = flow.draw_noise(shape, torch.Generator().manual_seed(sampling.seed)).to(editor.device)
    times = flow.schedule(sampling.steps, flow.token_count(*shape[-2:]), editor.shift)
    for x in sampler.euler(sampler.guided(editor.flux, condition, unwanted, sampling), x, times):  # noqa: B020
        each_step(x)
    return decode_image(editor.vae, x)
