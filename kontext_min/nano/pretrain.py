"""nano's pretraining: the autoencoder; transformer and text encoders on its cached latents; then guidance, distilled.

Everything resumes. Muon is for matrices and kernels, Adam for the rest (Jordan et al. 2024; Adam's step size).
"""

import copy
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from kontext_min import flow
from kontext_min.checkpoints.tensors import whole_file
from kontext_min.data.buckets import Size
from kontext_min.models.vae import VAE
from kontext_min.nano.edits import TARGETS, any_picture, example
from kontext_min.nano.model import AUTOENCODER, Nano, export, tokenizers_of
from kontext_min.nano.scenes import Picture, pick

MOMENTUM = 0.95
LOG_EVERY, SAVE_EVERY = 50, 250  # steps
VAE_SIZE, VAE_BATCH = Size(64, 64), 8
VAE_STEPS, VAE_RATE = 3600, 2e-3
KL_WEIGHT = 2e-2  # so much that the decoder bears small errors of the latents
VAE_FIRST_INDEX = 10**8  # the transformer's examples count from 0
MUON_RATE, ADAM_RATE = 4e-3, 2e-3
WARM_UP, DECAY = 100, 0.45  # steps; the last share of all steps, in which the rates fall linearly to zero
ADAM_NAMES = ("clip.", "t5.shared", "relative_attention_bias", "_in.", "_mod.", "modulation", "final_layer")
CAPTION_DROPOUT = 0.07  # so that true CFG has something to subtract
GUIDANCE = (1.0, 4.0)  # what the embedding learns to stand for
DISTIL_SHARE = 0.15  # of the learning rates
CHANGED, CHANGED_WEIGHT = 0.15, 5.0  # a token with more mean squared difference to the reference weighs five times
ENCODE_BATCH, PARTS = 32, 12


@dataclass(frozen=True)
class Phase:
    """Some steps at one resolution: example i has size sizes[i // ENCODE_BATCH % len(sizes)]."""

    name: str
    sizes: tuple[Size, ...]
    examples: int
    steps: int
    batch: int  # examples of the first size; as many pixels of the others
    text_length: int  # tokens; early on, instructions lose padding (none is longer)
    first_index: int


@dataclass(frozen=True)
class Bucket:
    """Cached examples of one size and number of references. Latents are normalised, fp16, (N, 16, h, w)."""

    target: Tensor
    references: list[Tensor]
    t5: Tensor  # (N, LENGTH)
    clip: Tensor  # (N, LENGTH)


# fmt: off
PHASES = (
    Phase("64px", (Size(64, 64), Size(64, 64), Size(64, 64), Size(80, 64), Size(64, 80)),
          examples=60_000, steps=2000, batch=96, text_length=16, first_index=0),
    Phase("96px", (*[Size(96, 96)] * 10, *[Size(112, 80)] * 3, *[Size(80, 112)] * 3, Size(128, 64), Size(64, 128),
                   Size(144, 144), Size(192, 128), Size(128, 192)),
          examples=60_000, steps=3350, batch=96, text_length=24, first_index=3 * 10**6),
)
DISTIL_STEPS = 150  # with half the last phase's batch
# fmt: on


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: a quintic Newton-Schulz iteration on (rows, columns)."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.mT).mT
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, to an RMS of 0.2 x lr. torch's own takes two axes only, and bfloat16, slow on CPUs."""

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - MOMENTUM)
            update = orthogonalise(p.grad.lerp(momentum, MOMENTUM).flatten(1))
            scale = 0.2 * max(update.shape) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)


class Training:
    """A network and its optimizers: Muon for matrices, Adam for vectors and names in `adam`; it goes on from `file`."""

    def __init__(self, file: Path, name: str, network: nn.Module, rates: tuple[float, float], adam: tuple = ()):
        self.file, self.name, self.network, self.rates = file, name, network, rates
        self.step, self.losses, matrices, others = 0, [], [], []
        for place, p in network.named_parameters():
            (others if p.ndim < 2 or any(part in place for part in adam) else matrices).append(p)
        muon = Muon(matrices, {"lr": rates[0], "weight_decay": 0.01})
        self.optims = [muon, torch.optim.Adam(others, rates[1], betas=(0.9, 0.98), fused=True)]
        if file.exists():
            state = torch.load(file, weights_only=True)
            network.load_state_dict(state[name])
            for optim, saved in zip(self.optims, state["optims"], strict=True):
                optim.load_state_dict(saved)
            self.step = state["step"]

    def update(self, loss: Tensor, share: float) -> None:
        """One step of both optimizers at `share` of their learning rates; at times a line, or a save."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optim, full in zip(self.optims, self.rates, strict=True):
            optim.param_groups[0]["lr"] = full * share
            optim.step()
            optim.zero_grad()
        self.step += 1
        self.losses.append(loss.item())
        if self.step % LOG_EVERY == 0:
            recent, minutes = np.mean(self.losses[-LOG_EVERY:]), time.process_time() / 60
            print(f"{self.name} step {self.step} loss {recent:.4f} cpu {minutes:.2f} min", flush=True)
        if self.step % SAVE_EVERY == 0:
            self.save()

    def save(self) -> None:
        """Replace the file."""
        optims = [optim.state_dict() for optim in self.optims]
        with whole_file(self.file) as file:
            torch.save({self.name: self.network.state_dict(), "optims": optims, "step": self.step}, file)


def to_tensor(pictures: list[Picture]) -> Tensor:
    """Pictures (H, W, 3) in 0..1 -> (B, 3, H, W) in -1..1, channels last in memory as convolutions like it."""
    return rearrange(torch.from_numpy(np.stack(pictures)), "b h w c -> b c h w") * 2 - 1


def training_picture(index: int) -> Picture:
    """Picture number `index`: any picture (60 %), or one side of an edit; a tenth of them in a held-out style."""
    r = np.random.default_rng([3, index])
    if r.random() < 0.6:
        _, picture = any_picture(r, "train", VAE_SIZE)
    else:
        task = example("train", VAE_FIRST_INDEX + index, VAE_SIZE)
        picture = pick(r, (task.target, *task.references))
    return pick(r, TARGETS.values())[1](picture).astype(np.float32) if r.random() < 0.1 else picture


def pictures_of(step: int) -> Tensor:
    """Those of one step of the autoencoder. (VAE_BATCH, 3, 64, 64) in -1..1"""
    return to_tensor([training_picture(step * VAE_BATCH + i) for i in range(VAE_BATCH)])


def vae_loss(vae: VAE, x: Tensor, generator: torch.Generator) -> Tensor:
    """Absolute and squared error, error of the gradients, and a little KL so that latents have a known scale."""
    mean, logvar = vae.moments(x)
    z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
    error = vae.decoder(z) - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 4 * error.square().mean() + 0.5 * edges + KL_WEIGHT * kl


@torch.no_grad()
def normalised(vae: VAE) -> VAE:
    """The same weights with the shift and scale that make latents of training pictures N(0, 1)."""
    z = torch.cat([vae.moments(pictures_of(10**6 + i))[0] for i in range(512 // VAE_BATCH)])
    config = replace(vae.config, shift_factor=round(z.mean().item(), 5), scaling_factor=round(1 / z.std().item(), 5))
    result = VAE(config)
    result.load_state_dict(vae.state_dict())
    return result.eval().requires_grad_(False)


def pretrain_vae(folder: Path, steps: int) -> VAE:
    """Train, or go on from `folder`/vae.pt, or read the finished one. Returns it frozen, with normalised latents."""
    torch.manual_seed(1)
    vae = VAE(AUTOENCODER).to(memory_format=torch.channels_last)
    training = Training(folder / "vae.pt", "vae", vae, (VAE_RATE, VAE_RATE))
    while training.step < steps:
        step = training.step  # warm-up over 50 steps, then half a cosine down to zero
        share = min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        training.update(vae_loss(vae, pictures_of(step), torch.Generator().manual_seed(step)), share)
    training.save()
    return normalised(vae)


@torch.no_grad()
def write_part(file: Path, vae: VAE, tokenizer_folder: Path, phase: Phase) -> None:
    """Every PARTS-th batch of the phase's examples, drawn, encoded and sorted into buckets; the suffix is the first."""
    torch.set_num_threads(1)
    tokenizers, chunks = tokenizers_of(tokenizer_folder), {}
    for start in range(int(file.suffix[1:]) * ENCODE_BATCH, phase.examples, PARTS * ENCODE_BATCH):
        size = phase.sizes[start // ENCODE_BATCH % len(phase.sizes)]
        numbers = range(start, min(start + ENCODE_BATCH, phase.examples))
        tasks = [example("train", phase.first_index + i, size) for i in numbers]
        for count in {len(task.references) for task in tasks}:
            group = [task for task in tasks if len(task.references) == count]
            columns = zip(*((task.target, *task.references) for task in group), strict=True)
            target, *references = (vae.encode(to_tensor(pictures)).half().contiguous() for pictures in columns)
            bucket = Bucket(target, references, *tokenizers([task.prompt for task in group]))
            chunks.setdefault((count, *size), []).append(bucket)
    with whole_file(file) as unfinished:
        torch.save({key: vars(joined(buckets)) for key, buckets in chunks.items()}, unfinished)


def joined(chunks: list[Bucket]) -> Bucket:
    """Several buckets of one size as one."""
    whole = {name: torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("target", "t5", "clip")}
    columns = zip(*(chunk.references for chunk in chunks), strict=True)
    return Bucket(references=[torch.cat(column) for column in columns], **whole)


def cached_buckets(folder: Path, vae: VAE, tokenizer_folder: Path, phase: Phase) -> list[Bucket]:
    """The phase's buckets from `folder`/latents-NAME.*; every core helps to make the parts that are not there yet."""
    files = [folder / f"latents-{phase.name}.{part}" for part in range(PARTS)]
    if missing := [file for file in files if not file.exists()]:
        print(f"latents {phase.name}: making {len(missing)} of {PARTS} parts", flush=True)
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            list(pool.map(partial(write_part, vae=vae, tokenizer_folder=tokenizer_folder, phase=phase), missing))
    parts = [torch.load(file, weights_only=True) for file in files]
    return [joined([Bucket(**part[key]) for part in parts if key in part]) for key in sorted(set().union(*parts))]


def choose(buckets: list[Bucket], batch: int, size: Size, generator: torch.Generator) -> Bucket:
    """The batch of a step: one bucket, in proportion to its examples; as many pixels as `batch` pictures of `size`."""
    counts = torch.tensor([len(bucket.target) for bucket in buckets], dtype=torch.float32)
    bucket = buckets[torch.multinomial(counts, 1, generator=generator).item()]
    count = round(batch * size.width * size.height / (64 * bucket.target[0, 0].numel()))
    rows = torch.randint(len(bucket.target), (count,), generator=generator)
    references = [latents[rows].float() for latents in bucket.references]
    return Bucket(bucket.target[rows].float(), references, bucket.t5[rows], bucket.clip[rows])


def token_weights(target: Tensor, references: list[Tensor]) -> Tensor:
    """What the edit changes counts more: (B, L, 1), 1 or CHANGED_WEIGHT."""
    tokens = flow.pack(target)
    if not references:
        return torch.ones_like(tokens[..., :1])
    changed = (tokens - flow.pack(references[0])).square().mean(-1, keepdim=True) > CHANGED
    return torch.where(changed, CHANGED_WEIGHT, 1.0)


def noisy(target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random times (B,), noise, and the mix of target and noise, both (B, 16, h, w)."""
    t = torch.sigmoid(0.7 + 1.2 * torch.randn(len(target), generator=generator))
    noise = torch.randn(target.shape, generator=generator)
    return t, noise, flow.mix(target, noise, t)


def flux_loss(nano: Nano, data: Bucket, empty: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """Weighted squared error of the velocity at random times and guidance 1; some captions are empty."""
    dropped = torch.rand(len(data.target), 1, generator=generator) < CAPTION_DROPOUT
    ids = tuple(torch.where(dropped, nothing, own) for nothing, own in zip(empty, (data.t5, data.clip), strict=True))
    t, noise, x_t = noisy(data.target, generator)
    v = flow.velocity(nano.flux, x_t, t, nano.condition(ids, data.references), torch.ones_like(t))
    weights = token_weights(data.target, data.references)
    error = (flow.pack(v) - flow.pack(noise - data.target)).square().mean(-1, keepdim=True)
    return (weights * error).sum() / weights.sum()


def distil_loss(nano: Nano, teacher: Nano, data: Bucket, empty: tuple, generator: torch.Generator) -> Tensor:
    """Squared error against the teacher's true classifier-free guidance at random scales (Meng et al. 2023)."""
    t, _, x_t = noisy(data.target, generator)
    scale = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(len(t), generator=generator)
    with torch.no_grad():
        v, plain = (
            flow.velocity(teacher.flux, x_t, t, teacher.condition(ids, data.references), torch.ones_like(t))
            for ids in ((data.t5, data.clip), tuple(nothing.expand(len(t), -1) for nothing in empty))
        )
        wanted = plain + scale.view(-1, 1, 1, 1) * (v - plain)
    given = flow.velocity(nano.flux, x_t, t, nano.condition((data.t5, data.clip), data.references), scale)
    return (given - wanted).square().mean()


def pretrain_flux(work: Path, vae: VAE, folder: Path, phases: tuple[Phase, ...], distil: int) -> None:
    """Train through all phases and distil guidance, or go on from `work`/flux.pt; each is exported to `folder`."""
    torch.manual_seed(2)
    nano, empty = Nano(), tokenizers_of(folder)([""])
    run = Training(work / "flux.pt", "nano", nano, (MUON_RATE, ADAM_RATE), ADAM_NAMES)
    total, done = sum(phase.steps for phase in phases), 0
    for phase in phases:
        done += phase.steps
        if run.step >= done:
            continue
        buckets = cached_buckets(work, vae, folder, phase)
        while run.step < done:
            generator = torch.Generator().manual_seed(run.step)
            data, length = choose(buckets, phase.batch, phase.sizes[0], generator), phase.text_length
            if data.references:  # captions of text-to-image are longer and stay
                data = replace(data, t5=data.t5[:, :length], clip=data.clip[:, :length])
            nothing = tuple(ids[:, : data.t5.shape[1]] for ids in empty)
            share = min(1.0, (run.step + 1) / WARM_UP, (total - run.step) / (DECAY * total))
            run.update(flux_loss(nano, data, nothing, generator), share)
        run.save()
        export(folder, nano, vae)
    if run.step < total + distil:
        last = replace(phases[-1], steps=distil, batch=phases[-1].batch // 2)
        distil_guidance(run, work, cached_buckets(work, vae, folder, last), empty, total, last)
    export(folder, nano, vae)


def distil_guidance(run: Training, folder: Path, buckets: list[Bucket], empty: tuple, first: int, phase: Phase) -> None:
    """The phase's steps after `first`; the teacher is the model as it was before them, kept in `folder`/teacher.pt."""
    file, last = folder / "teacher.pt", first + phase.steps
    if run.step == first:
        with whole_file(file) as unfinished:
            torch.save(run.network.state_dict(), unfinished)
    teacher = copy.deepcopy(run.network).requires_grad_(False)
    teacher.load_state_dict(torch.load(file, weights_only=True))
    while run.step < last:
        generator = torch.Generator().manual_seed(run.step)
        data = choose(buckets, phase.batch, phase.sizes[0], generator)
        loss = distil_loss(run.network, teacher, data, empty, generator)
        run.update(loss, DISTIL_SHARE * (last - run.step) / phase.steps)
    run.save()
