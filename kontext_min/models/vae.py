"""The FLUX autoencoder: pictures (B, 3, 8h, 8w) in [-1, 1] <-> latents (B, 16, h, w), normalised for the transformer.

Names and layout are those of Black Forest Labs' `ae.safetensors` (83,819,683 parameters, 244 tensors).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


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
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.channels) - 1)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a shortcut (1x1 where the channels change)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, around a shortcut."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (rearrange(f(n), "b c h w -> b 1 (h w) c").contiguous() for f in (self.q, self.k, self.v))
        attention = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(attention, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halve the resolution: pad right and bottom by one (not symmetric), 3x3 convolution with stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then (but at the last level) a change of resolution."""

    def __init__(
        self, blocks: list[ResnetBlock], downsample: nn.Module | None = None, upsample: nn.Module | None = None
    ):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        if downsample is not None:
            self.downsample = downsample
        if upsample is not None:
            self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Picture (B, 3, 8h, 8w) -> mean and log-variance of the latents (B, 2 * latent_channels, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        levels, width = [], channels[0]
        for i, out in enumerate(channels):
            blocks = [ResnetBlock(width if j == 0 else out, out, groups) for j in range(config.layers_per_block)]
            levels.append(Level(blocks, downsample=Downsample(out) if i < len(channels) - 1 else None))
            width = out
        self.down = nn.ModuleList(levels)
        self.mid = Middle(width, groups)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) -> picture (B, 3, 8h, 8w). `up[i]` is level i: run backwards."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.channels, config.groups
        width = channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = Middle(width, groups)
        levels = []
        for i, out in reversed(list(enumerate(channels))):
            blocks = [ResnetBlock(width if j == 0 else out, out, groups) for j in range(config.layers_per_block + 1)]
            levels.insert(0, Level(blocks, upsample=Upsample(out) if i > 0 else None))
            width = out
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """Pictures <-> normalised latents. Encoding takes the mode (the mean), so it is a function of the picture alone."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, 8h, 8w) in [-1, 1] -> raw mean and log-variance, each (B, 16, h, w)."""
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, 8h, 8w) in [-1, 1] -> (mean - shift) * scale, (B, 16, h, w)."""
        return (self.moments(x)[0] - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents z (B, 16, h, w) -> picture (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(z / self.config.scaling_factor + self.config.shift_factor)
