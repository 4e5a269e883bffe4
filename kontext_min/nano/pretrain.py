"""nano's pretraining: the autoencoder; transformer and text encoders on its cached latents; then guidance, distilled.

Everything resumes. Muon is for matrices and kernels, Adam for the rest (Jordan et al. 2024; Adam's step size).
"""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kontext_min import flow
from kontext_min.checkpoints.tensors import whole_file
from kontext_min.data.buckets import Size
from kontext_min.flow import Condition
from kontext_min.models.vae import VAE
from kontext_min.nano.edits import TARGETS, any_picture, example
from kontext_min.nano.model import AUTOENCODER, Nano, export, tokenizers_of
from kontext_min.nano.scenes import Picture, pick
from kontext_min.sampler import euler

LOG_EVERY, SAVE_EVERY, WARM_UP = 50, 250, 100  # steps
VAE_SIZES, VAE_BATCH = (Size(64, 64), Size(96, 96), Size(64, 64), Size(112, 80)), 8  # in turn; as many pixels of each
VAE_STEPS, VAE_RATE = 8000, 2e-3
KL_WEIGHT = 1e-2  # so much that the decoder bears small errors of the latents
MUON_RATE, MOMENTUM, ADAM_RATE = 4e-3, 0.95, 2e-3
ADAM_NAMES = ("clip.", "t5.shared", "relative_attention_bias", "_in.", "_mod.", "modulation", "final_layer")
CAPTION_DROPOUT = 0.07  # so that true CFG has something to subtract
GUIDANCE = (1.0, 4.0)  # what the embedding learns to stand for
CHANGED = 0.15  # mean squared difference to the reference from which a token counts as changed
ENCODE_BATCH, PARTS = 32, 12


@dataclass(frozen=True)
class Phase:
    """Some steps at one resolution: example i has size sizes[i // ENCODE_BATCH % len(sizes)]."""

    name: str
    sizes: tuple[Size, ...]
    examples: int
    first_index: int
    steps: int
    falling: int  # its last steps, in which the learning rates fall linearly to zero; 1: they stay
    batch: int = 64  # examples of the first size; as many pixels of the others
    changed_weight: float = 2.0  # of the tokens that an edit changes
    edits: tuple[str, ...] = ()  # every other example is one of these, in turn; the rest as MIX has them
    own: float = 0.0  # share of a batch that is met where nano's own sampling leads, its errors included
    rate: float = 1.0  # of the learning rates


class Bucket(NamedTuple):
    """Examples of one size and number of references."""

    latents: Tensor  # (N, 1 + references, 16, h, w), normalised, the target first; fp16 in the cache
    ids: Tensor  # (N, 2, LENGTH), of T5 and CLIP


SMALL = (Size(64, 64), Size(64, 64), Size(64, 64), Size(80, 64), Size(64, 80))
SIZES = (*[Size(96, 96)] * 10, *[Size(112, 80)] * 3, *[Size(80, 112)] * 3, Size(128, 64), Size(64, 128), Size(144, 144),
         Size(192, 128), Size(128, 192))  # fmt: skip
BADLY = ("reshape", "swap", "resize", "zoom", "insert", "recolour", "move", "background")  # what it did badly
PHASES = (
    Phase("64px", SMALL, 60_000, 0, steps=3000, falling=1, changed_weight=5.0),
    Phase("96px", SIZES, 80_000, 3 * 10**6, steps=7500, falling=4725),
    Phase("96px-2", SIZES, 80_000, 4 * 10**6, steps=8000, falling=4800),
    Phase("96px-3", SIZES, 80_000, 5 * 10**6, steps=3750, falling=2250, edits=BADLY),
    Phase("96px-4", SIZES, 36_000, 9 * 10**6, steps=1000, falling=800, edits=BADLY, own=0.75, rate=0.25),
)
DISTIL_STEPS, DISTIL_SHARE = 150, 0.15  # with half the last phase's batch; of the learning rates


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
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.reshape(p.shape), alpha=-group["lr"] * (0.2 * max(update.shape) ** 0.5))


def optimizers(network: nn.Module, muon: float, adam: float, names=()) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for place, p in network.named_parameters():
        (others if p.ndim < 2 or any(name in place for name in names) else matrices).append(p)
    return [Muon(matrices, {"lr": muon, "weight_decay": 0.01}), torch.optim.Adam(others, adam, (0.9, 0.98), fused=True)]


def train(file: Path, network: nn.Module, optims: list, shares: dict[int, float], loss_of: Callable, bf16=False):
    """Steps of loss_of(step), at their shares of the rates; bf16: of products alone. Goes on from its file."""
    step, losses = min(shares), []
    if file.exists():
        state = torch.load(file, weights_only=True)
        network.load_state_dict(state["network"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        step = state["step"]
    while step in shares:
        with torch.autocast("cpu", torch.bfloat16, bf16):
            loss = loss_of(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for optim in optims:
                optim.param_groups[0]["lr"] = optim.defaults["lr"] * shares[step]
                optim.step()
                optim.zero_grad()
        step += 1
        losses.append(loss.item())
        if step % LOG_EVERY == 0:
            recent, minutes = np.mean(losses[-LOG_EVERY:]), time.process_time() / 60
            print(f"{file.stem} step {step} loss {recent:.4f} cpu {minutes:.2f} min", flush=True)
        if step % SAVE_EVERY == 0 or step not in shares:
            with whole_file(file) as unfinished:
                saved = [optim.state_dict() for optim in optims]
                torch.save({"network": network.state_dict(), "optims": saved, "step": step}, unfinished)


def to_tensor(pictures: list[Picture]) -> Tensor:
    """Pictures (H, W, 3) in 0..1 -> (B, 3, H, W) in -1..1, channels last in memory as convolutions like it."""
    return rearrange(torch.from_numpy(np.stack(pictures)), "b h w c -> b c h w") * 2 - 1


def training_picture(index: int, size: Size) -> Picture:
    """Picture number `index`: any picture (60 %), or one side of an edit; a tenth of them in a held-out style."""
    r = np.random.default_rng([3, index])
    if r.random() < 0.6:
        _, picture = any_picture(r, "train", size)
    else:
        task = example("train", 10**8 + index, size)  # the transformer's count from 0
        picture = pick(r, (task.target, *task.references))
    return pick(r, TARGETS.values())[1](picture).astype(np.float32) if r.random() < 0.1 else picture


def pictures_of(step: int) -> Tensor:  # those of one step of the autoencoder. (B, 3, H, W) in -1..1
    size = VAE_SIZES[step % len(VAE_SIZES)]
    count = round(VAE_BATCH * math.prod(VAE_SIZES[0]) / math.prod(size))
    return to_tensor([training_picture(step * VAE_BATCH + i, size) for i in range(count)])


def vae_loss(vae: VAE, step: int) -> Tensor:
    """Absolute and squared error, error of the gradients, and a little KL so that latents have a known scale."""
    x = pictures_of(step)
    mean, logvar = vae.moments(x)
    z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=Generator().manual_seed(step))
    error = vae.decoder(z) - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 8 * error.square().mean() + 0.5 * edges + KL_WEIGHT * kl


def pretrain_vae(folder: Path, steps: int) -> VAE:
    """Train, or go on from `folder`/vae.pt, or read the finished one. Returns it frozen, with normalised latents."""
    torch.manual_seed(1)
    vae = VAE(AUTOENCODER).to(memory_format=torch.channels_last)
    cosine = {i: min(1.0, (i + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * i / steps)) for i in range(steps)}  # to zero
    train(folder / "vae.pt", vae, optimizers(vae, VAE_RATE, VAE_RATE), cosine, partial(vae_loss, vae))
    vae.eval().requires_grad_(False)
    z = torch.cat([vae.moments(pictures_of(10**6 + i * len(VAE_SIZES)))[0] for i in range(64)])
    shift, scale = round(z.mean().item(), 5), round(1 / z.std().item(), 5)  # which make latents N(0, 1)
    vae.config = replace(vae.config, shift_factor=shift, scaling_factor=scale)
    return vae.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def write_part(file: Path, vae: VAE, tokenizer_folder: Path, phase: Phase) -> None:
    """Every PARTS-th batch of the phase's examples, drawn and encoded; the file's suffix is the first."""
    torch.set_num_threads(1)
    tokenize, chunks = tokenizers_of(tokenizer_folder), []
    for start in range(int(file.suffix[1:]) * ENCODE_BATCH, phase.examples, PARTS * ENCODE_BATCH):
        size = phase.sizes[start // ENCODE_BATCH % len(phase.sizes)]
        numbers = range(start, min(start + ENCODE_BATCH, phase.examples))
        asked = [phase.edits[i // 2 % len(phase.edits)] if phase.edits and i % 2 else None for i in numbers]
        tasks = [example("train", phase.first_index + i, size, edit) for i, edit in zip(numbers, asked, strict=True)]
        for count in {len(task.references) for task in tasks}:
            group = [task for task in tasks if len(task.references) == count]
            columns = zip(*((task.target, *task.references) for task in group), strict=True)
            latents = torch.stack([vae.encode(to_tensor(pictures)).half() for pictures in columns], dim=1)
            chunks.append(((count, *size), latents, tokenize([task.prompt for task in group])))
    with whole_file(file) as unfinished:
        torch.save(chunks, unfinished)


def cached_buckets(folder: Path, vae: VAE, tokenizer_folder: Path, phase: Phase) -> list[Bucket]:
    files = [folder / f"latents-{phase.name}.{part}" for part in range(PARTS)]
    if missing := [file for file in files if not file.exists()]:
        print(f"latents {phase.name}: making {len(missing)} of {PARTS} parts", flush=True)
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            list(pool.map(partial(write_part, vae=vae, tokenizer_folder=tokenizer_folder, phase=phase), missing))
    buckets = defaultdict(list)
    for key, *chunk in chain.from_iterable(torch.load(file, weights_only=True) for file in files):
        buckets[key].append(chunk)
    return [Bucket(*map(torch.cat, zip(*chunks, strict=True))) for _, chunks in sorted(buckets.items())]


def choose(buckets: list[Bucket], phase: Phase, generator: Generator) -> Bucket:
    """The batch of a step: of one bucket, drawn in proportion to its examples; as many pixels as the phase wants."""
    counts = torch.tensor([len(bucket.ids) for bucket in buckets], dtype=torch.float32)
    latents, ids = buckets[torch.multinomial(counts, 1, generator=generator).item()]
    count = round(phase.batch * math.prod(phase.sizes[0]) / (64 * latents[0, 0, 0].numel()))
    rows = torch.randint(len(ids), (count,), generator=generator)
    return Bucket(latents[rows].float(), ids[rows])


def token_weights(target: Tensor, references: list[Tensor], weight: float) -> Tensor:
    """What the edit changes counts more, and so does the rest where that is less: (B, L, 1), 1 or `weight`."""
    tokens = flow.pack(target)
    if not references:
        return torch.ones_like(tokens[..., :1])
    changed = (tokens - flow.pack(references[0])).square().mean(-1, keepdim=True) > CHANGED
    most = changed.float().mean(1, keepdim=True) > 0.5
    return torch.where(changed | most, weight, 1.0)


def states(nano: Nano, target: Tensor, seen: Condition, scale: Tensor, own: float, generator: Generator):
    """Random times (B,), many near 1, where sampling settles most, and x_t (B, 16, h, w): noise mixed with the target.
    A share `own` is where 1 to 9 of its own steps lead, at guidance `scale` (B,): so it learns to mend its errors.
    """
    t = torch.sigmoid(1.1 + 1.8 * torch.randn(len(target), generator=generator))
    noise = torch.randn(target.shape, generator=generator)
    x_t = flow.mix(target, noise, t)
    if count := round(own * len(target)):
        steps = int(torch.randint(6, 11, (), generator=generator))
        done = int(torch.randint(1, steps, (), generator=generator))
        times = flow.schedule(steps, flow.token_count(*target.shape[-2:]))[: done + 1]
        part = Condition(seen.txt[:count], seen.vec[:count], [reference[:count] for reference in seen.references])
        field = lambda x, t, _: flow.velocity(nano.flux, x, t, part, scale[:count]).float()  # noqa: E731
        *_, x_t[:count] = euler(field, noise[:count], times)
        t[:count] = times[-1]
    return t, x_t


def flux_loss(nano: Nano, phase: Phase, empty: Tensor, data: Bucket, generator: Generator) -> Tensor:
    target, *references = data.latents.unbind(1)
    dropped = torch.rand(len(target), 1, 1, generator=generator) < CAPTION_DROPOUT
    condition = nano.condition(torch.where(dropped, empty, data.ids), references)
    t, x_t = states(nano, target, condition, torch.ones(len(target)), phase.own, generator)
    v = flow.velocity(nano.flux, x_t, t, condition, torch.ones_like(t))
    weights = token_weights(target, references, phase.changed_weight)
    wanted = (x_t - target) / t.view(-1, 1, 1, 1)  # noise - target, also of what stands for noise on nano's own way
    error = (flow.pack(v) - flow.pack(wanted)).square().mean(-1, keepdim=True)
    return (weights * error).sum() / weights.sum()


def distil_loss(nano: Nano, teacher: Nano, phase: Phase, empty: Tensor, data: Bucket, generator: Generator) -> Tensor:
    """Squared error over scale² against the teacher's true CFG at random scales, half of them 1 (Meng et al. 2023)."""
    target, *references = data.latents.unbind(1)
    scale = torch.empty(len(target)).uniform_(*GUIDANCE, generator=generator)
    scale[::2] = 1.0  # without guidance nothing may be lost
    condition = nano.condition(data.ids, references)
    t, x_t = states(nano, target, condition, scale, phase.own, generator)
    with torch.no_grad():
        seen = [teacher.condition(ids, references) for ids in (data.ids, empty.expand_as(data.ids))]
        v, plain = (flow.velocity(teacher.flux, x_t, t, given, torch.ones_like(t)) for given in seen)
        wanted = plain + scale.view(-1, 1, 1, 1) * (v - plain)
    error = flow.velocity(nano.flux, x_t, t, condition, scale) - wanted
    return (error.square().mean((1, 2, 3)) / scale**2).mean()


def pretrain_flux(work: Path, vae: VAE, folder: Path, phases: tuple[Phase, ...], distil: int, bf16: bool) -> None:
    """Train through all phases in `work`/flux.pt, then distil guidance in distilled.pt; each is written to `folder`."""
    torch.manual_seed(2)
    nano, empty = Nano(), tokenizers_of(folder)([""])
    optims = optimizers(nano, MUON_RATE, ADAM_RATE, ADAM_NAMES)

    def run(name: str, phase: Phase, end: int, loss: Callable[..., Tensor]):  # steps up to `end`
        buckets = cached_buckets(work, vae, folder, phase)

        def loss_of(step: int) -> Tensor:
            generator = Generator().manual_seed(step)
            with sdpa_kernel(SDPBackend.MATH):  # of sequences as short as these, faster on CPUs
                return loss(empty, choose(buckets, phase, generator), generator)

        steps = range(end - phase.steps, end)
        shares = {step: phase.rate * min(1.0, (step + 1) / WARM_UP, (end - step) / phase.falling) for step in steps}
        train(work / name, nano, optims, shares, loss_of, bf16)
        export(folder, nano, vae)

    for phase, end in zip(phases, accumulate(phase.steps for phase in phases), strict=True):
        run("flux.pt", phase, end, partial(flux_loss, nano, phase))
    half = replace(phase, batch=phase.batch // 2, steps=distil, falling=distil, rate=DISTIL_SHARE)
    loss = partial(distil_loss, nano, copy.deepcopy(nano).requires_grad_(False), half)
    run("distilled.pt", half, end + distil, loss)
