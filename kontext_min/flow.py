"""The arithmetic of Kontext: rectified flow between noise and a target, with references as extra tokens.

Time t runs from 0 (the clean target) to 1 (noise); x_t = (1 - t) * target + t * noise, and the model predicts the
velocity dx/dt = noise - target. Latents are the VAE's normalised ones, (B, 16, h, w), one to 8 x 8 pixels;
a token is a 2 x 2 patch of latents, 16 x 16 pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from kontext_min.models.flux import Flux


@dataclass(frozen=True)
class Condition:
    """What the target is made from: the instruction, encoded, and the clean reference latents."""

    txt: Tensor  # (B, L_txt, context_in_dim), T5
    vec: Tensor  # (B, vec_in_dim), pooled CLIP
    references: list[Tensor] = field(default_factory=list)  # each (B, 16, h', w'); sizes may differ between references


def mix(target: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) * target + t * noise, for t (B,)."""
    t = t.view(-1, *[1] * (target.ndim - 1)).to(target.dtype)
    return (1 - t) * target + t * noise


def pack(latents: Tensor) -> Tensor:
    """(B, C, 2h, 2w) -> (B, h*w, C*4), row by row; inside a token channel is slowest, then row, then column."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`; height and width are those of the latents."""
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=height // 2, w=width // 2, ph=2, pw=2)


def position_ids(height: int, width: int, index: int = 0, offset: tuple[int, int] = (0, 0)) -> Tensor:
    """(index, row, column) of every token of latents height x width -> (h/2 * w/2, 3) fp32, on the CPU.
    index is 0 for the target and 1 for every reference; offset moves a further reference by (rows, columns) of tokens.
    """
    rows, columns = torch.arange(height // 2) + offset[0], torch.arange(width // 2) + offset[1]
    return torch.cartesian_prod(torch.tensor([index]), rows, columns).float()  # row-major


def reference_offsets(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where each reference's grid begins, in tokens (row, column), from latent sizes (height, width).
    The first begins at (0, 0); each next one is laid below or to the right of all before it, whichever keeps the
    longer side of the whole shorter (the scheme that ComfyUI calls "offset").
    """
    offsets, height, width = [], 0, 0
    for h, w in sizes:
        row, column = (0, width) if h + height > w + width else (height, 0)
        offsets.append((row // 2, column // 2))
        height, width = max(height, row + h), max(width, column + w)
    return offsets


def sequence_ids(target: Tensor, references: list[Tensor]) -> Tensor:
    """Position ids of the target's tokens followed by every reference's, (L_img, 3), on the target's device."""
    return ids_of(target.device, *(latents.shape[-2:] for latents in (target, *references)))


@lru_cache(maxsize=64)
def ids_of(device: torch.device, target: tuple[int, int], *references: tuple[int, int]) -> Tensor:
    """The same by sizes (height, width) of latents: made once, and not to be changed in place."""
    places = zip(references, reference_offsets(references), strict=True)
    return torch.cat([position_ids(*target), *(position_ids(*size, 1, offset) for size, offset in places)]).to(device)


def velocity(flux: Flux, x_t: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
    """The whole Kontext idea: references are clean extra tokens beside the noisy target's.
    x_t (B, 16, h, w), t (B,) in [0, 1], guidance (B,) the distilled scale -> predicted noise - target, (B, 16, h, w).
    """
    tokens = [pack(latents).to(condition.txt.dtype) for latents in (x_t, *condition.references)]
    prediction = flux(
        img=torch.cat(tokens, dim=1),
        img_ids=sequence_ids(x_t, condition.references),
        txt=condition.txt,
        txt_ids=torch.zeros(condition.txt.shape[1], 3, device=x_t.device),
        timesteps=t,
        y=condition.vec,
        guidance=guidance,
        wanted=tokens[0].shape[1],
    )
    return unpack(prediction[:, : tokens[0].shape[1]], *x_t.shape[-2:])


# ------------------------------------------------------------------------------------------------ time


@dataclass(frozen=True)
class Shift:
    """How times are pushed towards noise. `static` is a factor; without it, it is e^mu of the target's token count.
    The defaults are FLUX.1-dev's; a checkpoint's scheduler_config.json may say otherwise.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    static: float | None = None

    def factor(self, tokens: int) -> float:
        """The shift for a target of that many tokens (references never count): e^mu, mu linear in the tokens."""
        if self.static is not None:
            return self.static
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_shift + slope * (tokens - self.base_tokens))


def shift_time(t: Tensor, factor: float) -> Tensor:
    """factor * t / (1 + (factor - 1) * t): the identity for 1, towards noise above."""
    return factor * t / (1 + (factor - 1) * t)


def schedule(steps: int, tokens: int, shift: Shift | None = None) -> Tensor:
    """The sampler's times for a target of that many tokens: (steps + 1,) fp32, from 1 (noise) to 0."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift_time(times, (shift or Shift()).factor(tokens)).float()


def token_count(height: int, width: int) -> int:  # of latents
    return (height // 2) * (width // 2)


def logit_normal(generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """A training time before the shift, (1,) fp32, as are the next two: sigmoid(scale * a standard normal)."""
    return torch.sigmoid(scale * torch.randn(1, generator=generator))


def uniform(generator: torch.Generator) -> Tensor:
    return torch.rand(1, generator=generator)


def beta(generator: torch.Generator, alpha: float, beta: float) -> Tensor:
    """Beta(alpha, beta), as the share of one of two gamma draws."""
    one, other = torch._standard_gamma(torch.tensor([alpha, beta]), generator=generator)
    return (one / (one + other))[None]


def draw_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise of a latent shape, drawn in fp32 on the generator's device (reproducible on the CPU)."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
