"""Stage two: the transformer and both text encoders, on cached latents: first at 64 px, then at 96 px."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kontext_min import flow
from kontext_min.data.buckets import Size
from kontext_min.models.vae import VAE
from kontext_min.nano.edits import LATER_MIX, MIX, Example, example
from kontext_min.nano.model import Nano, Tokenizers
from kontext_min.nano.muon import optimizers
from kontext_min.nano.pretrain_vae import to_tensor

MUON_RATE, ADAM_RATE = 4e-3, 2e-3
WARM_UP, DECAY = 100, 0.45  # steps; the last share of all steps, with the rate falling to zero
ADAM_NAMES = ("clip.", "t5.shared", "relative_attention_bias", "_in.", "_mod.", "modulation", "final_layer")
CAPTION_DROPOUT = 0.05  # so that true CFG has something to subtract
TEXT_TO_IMAGE_EVERY = 16  # steps
CHANGED = 0.15  # mean squared difference of target and reference above which a token counts as changed
CHANGED_WEIGHT = 6.0
SAVE_EVERY = 250
ENCODE_BATCH = 32


@dataclass(frozen=True)
class Phase:
    """Some steps at one resolution: example i has size sizes[i % len(sizes)]."""

    name: str
    sizes: tuple[Size, ...]
    examples: int
    steps: int
    batch: int
    text_length: int  # tokens; early on, instructions lose padding (none is longer than 12)
    first_index: int
    mix: dict[str, float]


@dataclass(frozen=True)
class Bucket:
    """Cached examples of one size. Latents are normalised, fp16, (N, 16, h, w); reference is None for text-to-image."""

    target: Tensor
    reference: Tensor | None
    t5: Tensor  # (N, LENGTH)
    clip: Tensor  # (N, LENGTH)


# fmt: off
PHASES = (
    Phase("64px", (Size(64, 64), Size(64, 64), Size(64, 64), Size(80, 64), Size(64, 80)),
          examples=32_000, steps=1350, batch=48, text_length=14, first_index=0, mix=MIX),
    Phase("96px", (Size(96, 96), Size(96, 96), Size(112, 80), Size(80, 112), Size(128, 64), Size(64, 128)),
          examples=12_000, steps=660, batch=48, text_length=24, first_index=10**6, mix=LATER_MIX),
)
# fmt: on


def encode_examples(vae: VAE, tokenizers: Tokenizers, examples: list[Example]) -> Bucket:
    """Examples of one size -> their latents and token ids."""

    def latents(pictures) -> Tensor:
        parts = [pictures[i : i + ENCODE_BATCH] for i in range(0, len(pictures), ENCODE_BATCH)]
        return torch.cat([vae.encode(to_tensor(part)).half().contiguous() for part in parts])

    t5, clip = tokenizers([task.prompt for task in examples])
    reference = None if examples[0].reference is None else latents([task.reference for task in examples])
    return Bucket(latents([task.target for task in examples]), reference, t5, clip)


@torch.no_grad()
def make_buckets(vae: VAE, tokenizers: Tokenizers, phase: Phase) -> list[Bucket]:
    """All examples of a phase, sorted into buckets: with reference one per different size, then those without."""
    groups: dict[tuple, list[Example]] = {}
    chunks: dict[tuple, list[Bucket]] = {}
    for i in range(phase.examples):
        size = phase.sizes[i % len(phase.sizes)]
        task = example("train", phase.first_index + i, size, mix=phase.mix)
        key = (task.reference is None, size)
        groups.setdefault(key, []).append(task)
        if len(groups[key]) == ENCODE_BATCH:
            chunks.setdefault(key, []).append(encode_examples(vae, tokenizers, groups.pop(key)))
    for key, rest in groups.items():
        chunks.setdefault(key, []).append(encode_examples(vae, tokenizers, rest))
    return [joined(chunks[key]) for key in sorted(chunks)]


def joined(chunks: list[Bucket]) -> Bucket:
    """Several buckets of one size as one."""
    reference = None if chunks[0].reference is None else torch.cat([chunk.reference for chunk in chunks])
    columns = (torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("target", "t5", "clip"))
    target, t5, clip = columns
    return Bucket(target, reference, t5, clip)


def cached_buckets(folder: Path, vae: VAE, tokenizers: Tokenizers, phase: Phase) -> list[Bucket]:
    """The phase's buckets from `folder`/latents-NAME.pt, which is made if need be."""
    file = folder / f"latents-{phase.name}.pt"
    if not file.exists():
        started = time.process_time()
        buckets = make_buckets(vae, tokenizers, phase)
        torch.save([vars(bucket) for bucket in buckets], file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)
        cpu = (time.process_time() - started) / 60
        print(f"latents {phase.name}: {phase.examples} examples, cpu {cpu:.2f} min", flush=True)
    return [Bucket(**columns) for columns in torch.load(file, weights_only=True)]


def choose(buckets: list[Bucket], step: int, batch: int, generator: torch.Generator) -> Bucket:
    """The batch of a step: one size, in proportion to the examples; every 16th step is text-to-image."""
    wanted = step % TEXT_TO_IMAGE_EVERY == TEXT_TO_IMAGE_EVERY - 1
    pool = [bucket for bucket in buckets if (bucket.reference is None) == wanted]
    counts = torch.tensor([len(bucket.target) for bucket in pool], dtype=torch.float32)
    bucket = pool[torch.multinomial(counts, 1, generator=generator).item()]
    rows = torch.randint(len(bucket.target), (batch,), generator=generator)
    reference = None if bucket.reference is None else bucket.reference[rows].float()
    return Bucket(bucket.target[rows].float(), reference, bucket.t5[rows], bucket.clip[rows])


def token_weights(target: Tensor, references: list[Tensor]) -> Tensor:
    """What the edit changes counts more: (B, L, 1), 1 or CHANGED_WEIGHT."""
    tokens = flow.pack(target)
    if not references:
        return torch.ones_like(tokens[..., :1])
    changed = (tokens - flow.pack(references[0])).square().mean(-1, keepdim=True) > CHANGED
    return torch.where(changed, CHANGED_WEIGHT, 1.0)


def loss_of(nano: Nano, data: Bucket, empty: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """Weighted squared error of the velocity at random times and guidances."""
    count = len(data.target)
    dropped = torch.rand(count, 1, generator=generator) < CAPTION_DROPOUT
    pairs = zip(empty, (data.t5, data.clip), strict=True)
    ids = tuple(torch.where(dropped, nothing[:, : own.shape[1]], own) for nothing, own in pairs)
    references = [] if data.reference is None else [data.reference]
    t = torch.sigmoid(0.7 + 1.2 * torch.randn(count, generator=generator))
    guidance = 1 + 3 * torch.rand(count, generator=generator)
    noise = torch.randn(data.target.shape, generator=generator)
    x_t = flow.mix(data.target, noise, t)
    v = flow.velocity(nano.flux, x_t, t, nano.condition(ids, references), guidance)
    weights = token_weights(data.target, references)
    error = (flow.pack(v) - flow.pack(noise - data.target)).square().mean(-1, keepdim=True)
    return (weights * error).sum() / weights.sum()


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: warm-up, constant, linear decay."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


def cut(data: Bucket, length: int) -> Bucket:
    """Instructions cut to `length` tokens; captions of text-to-image are longer and stay."""
    if data.reference is None:
        return data
    return Bucket(data.target, data.reference, data.t5[:, :length], data.clip[:, :length])


class Run:
    """The networks, their optimizers and the step they are at; one file holds all of it."""

    def __init__(self, folder: Path):
        torch.manual_seed(2)
        self.nano, self.step, self.file = Nano(), 0, folder / "flux.pt"
        self.optims = optimizers([self.nano], MUON_RATE, ADAM_RATE, ADAM_NAMES)
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.nano.load_state_dict(state["nano"])
            for optim, saved in zip(self.optims, state["optims"], strict=True):
                optim.load_state_dict(saved)
            self.step = state["step"]

    def save(self) -> None:
        """Replace the file."""
        optims = [optim.state_dict() for optim in self.optims]
        state = {"nano": self.nano.state_dict(), "optims": optims, "step": self.step}
        torch.save(state, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").rename(self.file)

    def update(self, loss: Tensor, share: float) -> None:
        """One step of both optimizers at `share` of their learning rates."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.nano.parameters(), 1.0)
        for optim, full in zip(self.optims, (MUON_RATE, ADAM_RATE), strict=True):
            optim.param_groups[0]["lr"] = full * share
            optim.step()
            optim.zero_grad()
        self.step += 1


def pretrain_flux(folder: Path, vae: VAE, tokenizers: Tokenizers, phases: tuple[Phase, ...], report) -> Nano:
    """Train through all phases, or go on from `folder`/flux.pt. `report(nano, step)` is called at every save."""
    run, empty = Run(folder), tokenizers([""])
    total, done, started, average = sum(phase.steps for phase in phases), 0, time.process_time(), None
    for phase in phases:
        done += phase.steps
        if run.step >= done:
            continue
        buckets = cached_buckets(folder, vae, tokenizers, phase)
        while run.step < done:
            generator = torch.Generator().manual_seed(run.step)
            data = cut(choose(buckets, run.step, phase.batch, generator), phase.text_length)
            loss = loss_of(run.nano, data, empty, generator)
            run.update(loss, rate(run.step, total))
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            if run.step % 50 == 0 or run.step == done:
                cpu = (time.process_time() - started) / 60
                print(f"flux {phase.name} step {run.step}/{total} loss {average:.4f} cpu {cpu:.2f} min", flush=True)
            if run.step % SAVE_EVERY == 0 or run.step == done:
                run.save()
                report(run.nano, run.step)
    return run.nano.eval()
