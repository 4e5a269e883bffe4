"""The FLUX autoencoder: pictures (B, 3, 8h, 8w) in [-1, 1] <-> latents (B, 16, h, w), normalised for the transformer.

Names and layout are those of Black Forest Labs' `ae.safetensors` (83,819,683 parameters, 244 tensors).
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

STRIP = 2**24  # numbers that a strip of rows has at most: 67 MB in fp32

norm, conv = partial(nn.GroupNorm, eps=1e-6), partial(nn.Conv2d, kernel_size=3, padding=1)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder and the affine map of its latents; the defaults are FLUX.1's."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # of each level; every level but the last halves the resolution
    layers_per_block: int = 2  # residual blocks of an encoder level; the decoder has one more
    latent_channels: int = 16
    groups: int = 32
    in_channels: int = 3
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def factor(self) -> int:  # pixels per latent along one side
        return 2 ** (len(self.channels) - 1)


def by_strips(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x), for an f that looks one row up and down, one strip of rows after another, so that what f makes on its way
    is never there whole. x (B, C, H, W); f may change the channels and double the sides.
    """
    height, rows = x.shape[2], max(1, STRIP * x.shape[2] // x.numel())
    if rows >= height:
        return f(x)
    out = None
    for top in range(0, height, rows):
        strip = f(x[:, :, max(0, top - 1) : top + rows + 1])
        scale = strip.shape[3] // x.shape[3]
        out = strip.new_empty(*strip.shape[:2], height * scale, strip.shape[3]) if out is None else out
        place = out[:, :, top * scale : (top + rows) * scale]
        place.copy_(strip[:, :, min(top, 1) * scale :][:, :, : place.shape[2]])
    return out


def normalised(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(silu(norm(x))), of large x by strips, with mean and variance of all of it."""
    if x.numel() <= STRIP:
        return conv(F.silu(norm(x)))
    var, mean = torch.var_mean(x.unflatten(1, (norm.num_groups, -1)), dim=(2, 3, 4), correction=0)
    var, mean = (m.repeat_interleave(x.shape[1] // norm.num_groups, 1)[..., None, None] for m in (var, mean))
    scale = norm.weight[:, None, None] * (var + norm.eps).rsqrt()  # (B, C, 1, 1)
    shift = norm.bias[:, None, None] - mean * scale
    return by_strips(lambda rows: conv(F.silu(shift + rows * scale)), x)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a shortcut (1x1 where the channels change)."""

    def __init__(self, before: int, out: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = norm(groups, before), conv(before, out)
        self.norm2, self.conv2 = norm(groups, out), conv(out, out)
        self.nin_shortcut = nn.Identity() if before == out else nn.Conv2d(before, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return normalised(self.norm2, self.conv2, normalised(self.norm1, self.conv1, x)).add_(self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, around a shortcut."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = norm(groups, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (rearrange(f(n), "b c h w -> b 1 (h w) c").contiguous() for f in (self.q, self.k, self.v))
        attention = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(attention, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Upsample(nn.Sequential):
    """Twice the resolution, nearest neighbour, and a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return by_strips(super().forward, x)


def named(**parts: nn.Module) -> nn.Sequential:  # modules that run one after another, under the names of the files
    return nn.Sequential(OrderedDict(parts))


def level(channels: list[int], groups: int) -> nn.Sequential:
    """Residual blocks at one resolution, from channels[0] to [1] and so on; a change of resolution may follow."""
    return named(block=nn.Sequential(*(ResnetBlock(a, b, groups) for a, b in pairwise(channels))))


def middle(channels: int, groups: int) -> nn.Sequential:
    """Residual block, attention, residual block at the lowest resolution."""
    block = partial(ResnetBlock, channels, channels, groups)
    return named(block_1=block(), attn_1=AttnBlock(channels, groups), block_2=block())


def encoder(config: VAEConfig) -> nn.Sequential:
    """Picture (B, 3, 8h, 8w) -> mean and log-variance of the latents (B, 2 * latent_channels, h, w)."""
    channels, groups = config.channels, config.groups
    parts = {"conv_in": conv(config.in_channels, channels[0]), "down": nn.Sequential()}
    for before, out in pairwise((channels[0], *channels)):
        parts["down"].append(stage := level([before] + [out] * config.layers_per_block, groups))
        if len(parts["down"]) < len(channels):  # half the resolution, padded right and bottom only
            stage.downsample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(out, out, 3, stride=2))
    parts["mid"] = middle(out, groups)
    return named(**parts, norm_out=norm(groups, out), silu=nn.SiLU(), conv_out=conv(out, 2 * config.latent_channels))


def decoder(config: VAEConfig) -> nn.Sequential:
    """Latents (B, latent_channels, h, w) -> picture (B, 3, 8h, 8w). `up.i` is level i, so they run from the last."""
    channels, groups = config.channels, config.groups
    parts = {"conv_in": conv(config.latent_channels, channels[-1]), "mid": middle(channels[-1], groups), "up": named()}
    for i, out in reversed(list(enumerate(channels))):
        before = channels[min(i + 1, len(channels) - 1)]
        parts["up"].add_module(str(i), stage := level([before] + [out] * (config.layers_per_block + 1), groups))
        if i:
            stage.upsample = Upsample(OrderedDict(nearest=nn.Upsample(scale_factor=2.0), conv=conv(out, out)))
    return named(**parts, norm_out=norm(groups, out), silu=nn.SiLU(), conv_out=conv(out, config.in_channels))


def run(module: nn.Module, x: Tensor) -> Tensor:
    """module(x); by itself, each sequence of sequences would hold its input until its end."""
    waiting = [module]
    while waiting:
        part, *waiting = waiting
        if type(part) is nn.Sequential:
            waiting = [*part, *waiting]
        else:
            x = part(x)
    return x


class VAE(nn.Module):
    """Pictures <-> normalised latents. Encoding takes the mode (the mean), so it is a function of the picture alone."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config, self.encoder, self.decoder = config, encoder(config), decoder(config)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, 8h, 8w) in [-1, 1] -> raw mean and log-variance, each (B, 16, h, w)."""
        return run(self.encoder, x).chunk(2, dim=1)

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, 8h, 8w) in [-1, 1] -> (mean - shift) * scale, (B, 16, h, w)."""
        return (self.moments(x)[0] - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents z (B, 16, h, w) -> picture (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return run(self.decoder, z / self.config.scaling_factor + self.config.shift_factor)
