"""Stage one: the autoencoder, on drawn scenes, their edits and photographs, at 64 px."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kontext_min.data.buckets import Size
from kontext_min.models.vae import VAE, VAEConfig
from kontext_min.nano.edits import any_picture, example
from kontext_min.nano.held_out import TARGETS
from kontext_min.nano.muon import Training
from kontext_min.nano.scenes import Picture, pick

CONFIG = VAEConfig(channels=(16, 32, 64, 64), layers_per_block=1, groups=8, scaling_factor=1.0, shift_factor=0.0)
SIZE, BATCH = Size(64, 64), 8
VAE_STEPS, LEARNING_RATE = 3600, 2e-3
KL_WEIGHT = 2e-2  # so much that the decoder bears small errors of the latents
FIRST_INDEX = 10**8  # the transformer's examples count from 0


def to_tensor(pictures: list[Picture]) -> Tensor:
    """Pictures (H, W, 3) in 0..1 -> (B, 3, H, W) in -1..1, channels last in memory as convolutions like it."""
    return rearrange(torch.from_numpy(np.stack(pictures)), "b h w c -> b c h w") * 2 - 1


def training_picture(index: int) -> Picture:
    """Picture number `index`: any picture (60 %), or one side of an edit; a tenth of them in a held-out style."""
    r = np.random.default_rng([3, index])
    if r.random() < 0.6:
        _, picture = any_picture(r, "train", SIZE)
    else:
        task = example("train", FIRST_INDEX + index, SIZE)
        picture = pick(r, (task.target, *task.references))
    return pick(r, TARGETS.values())[1](picture).astype(np.float32) if r.random() < 0.1 else picture


def batch(step: int) -> Tensor:
    """The pictures of one step. (BATCH, 3, 64, 64) in -1..1"""
    return to_tensor([training_picture(step * BATCH + i) for i in range(BATCH)])


def loss_of(vae: VAE, x: Tensor, generator: torch.Generator) -> Tensor:
    """Absolute and squared error, error of the gradients, and a little KL so that latents have a known scale."""
    mean, logvar = vae.moments(x)
    z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
    error = vae.decoder(z) - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 4 * error.square().mean() + 0.5 * edges + KL_WEIGHT * kl


def psnr(output: Tensor, target: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    """dB (B,) of pictures (B, 3, H, W) in -1..1 where the mask (B, 1, H, W) is 1; nan where it never is."""
    mask = torch.ones_like(target) * mask
    squared = ((output.clamp(-1, 1) - target) / 2).square() * mask
    return -10 * torch.log10((squared.flatten(1).sum(1) / mask.flatten(1).sum(1)).clamp(min=1e-8))


@torch.no_grad()
def normalised(vae: VAE, pictures: int = 512) -> VAE:
    """The same weights with the shift and scale that make latents of training pictures N(0, 1)."""
    z = torch.cat([vae.moments(batch(10**6 + i))[0] for i in range(pictures // BATCH)])
    config = replace(vae.config, shift_factor=round(z.mean().item(), 5), scaling_factor=round(1 / z.std().item(), 5))
    result = VAE(config)
    result.load_state_dict(vae.state_dict())
    return result.eval().requires_grad_(False)


def pretrain_vae(folder: Path, steps: int) -> VAE:
    """Train, or go on from `folder`/vae.pt, or read the finished one. Returns it frozen, with normalised latents."""
    torch.manual_seed(1)
    vae = VAE(CONFIG).to(memory_format=torch.channels_last)
    training = Training(folder / "vae.pt", "vae", vae, (LEARNING_RATE, LEARNING_RATE))
    while training.step < steps:
        step = training.step  # warm-up over 50 steps, then half a cosine down to zero
        share = min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        training.update(loss_of(vae, batch(step), torch.Generator().manual_seed(step)), share)
    training.save()
    return normalised(vae)
