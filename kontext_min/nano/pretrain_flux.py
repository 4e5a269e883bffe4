"""Stages two and three: transformer and text encoders on cached latents, at 64 px, then 96 px; then its guidance."""

import copy
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from kontext_min import flow
from kontext_min.data.buckets import Size
from kontext_min.models.vae import VAE
from kontext_min.nano.edits import example
from kontext_min.nano.model import Nano, Tokenizers, export
from kontext_min.nano.muon import Training, save_whole
from kontext_min.nano.pretrain_vae import to_tensor

MUON_RATE, ADAM_RATE = 4e-3, 2e-3
WARM_UP, DECAY = 100, 0.45  # steps; the last share of all steps, with the rate falling to zero
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
          examples=60_000, steps=2450, batch=96, text_length=24, first_index=3 * 10**6),
)
DISTIL_STEPS = 150  # with half the last phase's batch
# fmt: on


@torch.no_grad()
def write_part(file: Path, vae: VAE, tokenizer_folder: Path, phase: Phase) -> None:
    """Every PARTS-th batch of the phase's examples, drawn, encoded and sorted into buckets; the suffix is the first."""
    torch.set_num_threads(1)
    tokenizers, chunks = Tokenizers(tokenizer_folder), {}
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
    save_whole({key: vars(joined(buckets)) for key, buckets in chunks.items()}, file)


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


def loss_of(nano: Nano, data: Bucket, empty: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
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


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: warm-up, constant, linear decay."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


class Run(Training):
    """The training of `nano`, in `folder`/flux.pt."""

    def __init__(self, folder: Path):
        torch.manual_seed(2)
        self.nano = Nano()
        super().__init__(folder / "flux.pt", "nano", self.nano, (MUON_RATE, ADAM_RATE), ADAM_NAMES)


def pretrain_flux(work: Path, vae: VAE, folder: Path, phases: tuple[Phase, ...], distil: int) -> None:
    """Train through all phases and distil guidance, or go on from `work`/flux.pt; each is exported to `folder`."""
    run, empty = Run(work), Tokenizers(folder)([""])
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
            run.update(loss_of(run.nano, data, nothing, generator), rate(run.step, total))
        run.save()
        export(folder, run.nano, vae)
    if run.step < total + distil:
        last = replace(phases[-1], steps=distil, batch=phases[-1].batch // 2)
        distil_guidance(run, work, cached_buckets(work, vae, folder, last), empty, total, last)
    export(folder, run.nano, vae)


def distil_guidance(run: Run, folder: Path, buckets: list[Bucket], empty: tuple, first: int, phase: Phase) -> None:
    """The phase's steps after `first`; the teacher is the model as it was before them, kept in `folder`/teacher.pt."""
    file, last = folder / "teacher.pt", first + phase.steps
    if run.step == first:
        save_whole(run.nano.state_dict(), file)
    teacher = copy.deepcopy(run.nano).requires_grad_(False)
    teacher.load_state_dict(torch.load(file, weights_only=True))
    while run.step < last:
        generator = torch.Generator().manual_seed(run.step)
        data = choose(buckets, phase.batch, phase.sizes[0], generator)
        loss = distil_loss(run.nano, teacher, data, empty, generator)
        run.update(loss, DISTIL_SHARE * (last - run.step) / phase.steps)
    run.save()
