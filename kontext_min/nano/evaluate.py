"""How well nano edits: seeded held-out scenes and photographs, a success rule that looks at pixels, a contact sheet."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from kontext_min import flow, sampler
from kontext_min.checkpoints.load import find, load_clip, load_flux, load_t5, load_vae
from kontext_min.data.buckets import Size
from kontext_min.flow import Condition
from kontext_min.models.clip import CLIPText
from kontext_min.models.flux import Flux
from kontext_min.models.t5 import T5Encoder
from kontext_min.models.vae import VAE
from kontext_min.nano.edits import GLOBAL_EDITS, OBJECT_EDITS, Example, example
from kontext_min.nano.model import Tokenizers
from kontext_min.nano.pretrain_vae import psnr, to_tensor
from kontext_min.sampler import Sampling

SIZES = (Size(96, 96), Size(112, 80), Size(80, 112), Size(96, 96))
EDITS = (*GLOBAL_EDITS, *OBJECT_EDITS, "keep", "text to image")
SAMPLING = Sampling(steps=8, guidance=2.5, seed=0)
CHANGED = 0.15  # on -1..1: a pixel counts as changed if a channel of reference and target differ by more
ENOUGH = 0.25  # success: the squared error on changed pixels is below this share of the reference's there
UNDISTURBED = 20.0  # strict success: also at least this PSNR, dB, on the pixels that should stay
BATCH = 25


@dataclass(frozen=True)
class Editor:
    """A model folder, loaded in fp32."""

    flux: Flux
    vae: VAE
    t5: T5Encoder
    clip: CLIPText
    tokenizers: Tokenizers
    shift: flow.Shift

    @classmethod
    def read(cls, folder: Path) -> "Editor":
        """All networks of a model folder."""
        checkpoint, place = find(folder), (torch.device("cpu"), torch.float32)
        networks = (load(checkpoint, *place) for load in (load_flux, load_vae, load_t5, load_clip))
        return cls(*networks, Tokenizers.read(folder), checkpoint.shift)

    @torch.inference_mode()
    def __call__(self, prompts: list[str], references: Tensor | None, size: Size) -> Tensor:
        """Edited pictures (B, 3, H, W) in -1..1; references alike, or None for text-to-image."""
        t5, clip = self.tokenizers(prompts)
        latents = [] if references is None else [self.vae.encode(references)]
        condition = Condition(self.t5(t5), self.clip(clip), latents)
        shape = (len(prompts), 16, size.height // 8, size.width // 8)
        x = flow.draw_noise(shape, torch.Generator().manual_seed(SAMPLING.seed))
        times = flow.schedule(SAMPLING.steps, flow.token_count(*shape[-2:]), self.shift)
        *_, x = sampler.euler(sampler.guided(self.flux, condition, None, SAMPLING), x, times)
        return self.vae.decode(x).clamp(-1, 1)


@dataclass(frozen=True)
class Cases:
    """Examples of one edit and one size; pictures (B, 3, H, W) in -1..1, reference None for text-to-image."""

    prompts: list[str]
    reference: Tensor | None
    target: Tensor
    size: Size
    photograph: Tensor  # (B,) bool


def cases_of(edit: str, count: int) -> list[Cases]:
    """`count` validation examples of an edit, in batches of one size."""
    groups: dict[Size, list[Example]] = {}
    for i in range(count):
        size = SIZES[i % len(SIZES)]
        groups.setdefault(size, []).append(example("validation", 10_000 + i, size, edit))
    batches = []
    for size, examples in groups.items():
        for start in range(0, len(examples), BATCH):
            some = examples[start : start + BATCH]
            reference = None if some[0].reference is None else to_tensor([task.reference for task in some])
            target = to_tensor([task.target for task in some])
            photograph = torch.tensor([task.photograph for task in some])
            batches.append(Cases([task.prompt for task in some], reference, target, size, photograph))
    return batches


def success(output: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """Per picture: whether the changed pixels came out; where nothing should change, whether nothing did. (B,) bool"""
    mask = changed_pixels(reference, target)
    error = ((output - target).square() * mask).flatten(1).sum(1)
    before = ((reference - target).square() * mask).flatten(1).sum(1)
    return torch.where(before > 0, error < ENOUGH * before, psnr(output, target) > 25)


def changed_pixels(reference: Tensor, target: Tensor) -> Tensor:
    """(B, 1, H, W), 1 where the edit changes something one can see."""
    return ((target - reference).abs().amax(1, keepdim=True) > CHANGED).float()


def outside_psnr(output: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB on the pixels that should stay, per picture; nan where all change. (B,)"""
    mask = 1 - changed_pixels(reference, target)
    squared = (((output - target) / 2).square() * mask).flatten(1).sum(1)
    return -10 * torch.log10((squared / (3 * mask.flatten(1).sum(1))).clamp(min=1e-8))


def measure(editor: Editor, batch: Cases) -> tuple[dict[str, Tensor], Tensor]:
    """Per-picture numbers of one batch, each (B,), and the outputs."""
    output = editor(batch.prompts, batch.reference, batch.size)
    with torch.inference_mode():
        ceiling = editor.vae.decode(editor.vae.encode(batch.target)).clamp(-1, 1)
    numbers = {"psnr": psnr(output, batch.target), "ceiling": psnr(ceiling, batch.target)}
    if batch.reference is None:
        return numbers, output
    shuffled = editor(batch.prompts, batch.reference.roll(1, dims=0), batch.size)
    numbers["copy"] = psnr(batch.reference, batch.target).clamp(max=60)
    for name, picture in (("", output), ("shuffled_", shuffled)):
        done = success(picture, batch.reference, batch.target)
        disturbed = outside_psnr(picture, batch.reference, batch.target) < UNDISTURBED
        numbers |= {f"{name}success": done.float(), f"{name}strict": (done & ~disturbed).float()}
    numbers["photographs"] = torch.where(batch.photograph, numbers["success"], torch.nan)
    numbers["outside"] = outside_psnr(output, batch.reference, batch.target)
    numbers["outside_ceiling"] = outside_psnr(ceiling, batch.reference, batch.target)
    return numbers, output


def evaluate(folder: Path, count: int) -> tuple[dict[str, dict[str, float]], list]:
    """Means over `count` cases of every edit, and three cases of each as rows of a contact sheet."""
    editor, table, rows = Editor.read(folder), {}, []
    for edit in EDITS:
        measured = [(batch, *measure(editor, batch)) for batch in cases_of(edit, count)]
        keys = measured[0][1]
        means = {key: torch.cat([numbers[key] for _, numbers, _ in measured]).nanmean().item() for key in keys}
        table[edit] = {key: round(mean, 3) for key, mean in means.items() if mean == mean}  # no photographs: nan
        rows += shown([(batch, output) for batch, _, output in measured])
        print(line(edit, table[edit]), flush=True)
    return table, rows


def shown(batches: list[tuple[Cases, Tensor]]) -> list[tuple[Cases, Tensor, int]]:
    """Three rows of the contact sheet: the first cases of the first batches, and a photograph where there is one."""
    rows = [(batch, output, 0) for batch, output in batches[:3]]
    photographs = [(batch, output, i) for batch, output in batches for i in batch.photograph.nonzero().flatten()]
    return rows[:2] + (photographs[-1:] or rows[2:])


def line(edit: str, numbers: dict[str, float]) -> str:
    """One row of the printed table."""
    shares = ("success", "strict", "shuffled_success", "shuffled_strict", "photographs")
    percent = " ".join(f"{key} {numbers[key]:4.0%}" for key in shares if key in numbers)
    names = ("psnr", "copy", "ceiling", "outside", "outside_ceiling")
    return f"{edit:14s} {percent:86s} " + " ".join(f"{key} {numbers[key]:.1f}" for key in names if key in numbers)


def contact_sheet(rows: list, columns: int = 3, zoom: int = 2) -> Image.Image:
    """Reference | output | target of every row, with the prompt above."""
    width, height = 3 * 116 * zoom, 112 * zoom + 20
    sheet = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (batch, output, row) in enumerate(rows):
        left, top = i % columns * width, i // columns * height
        pen.text((left + 4, top + 4), batch.prompts[row], fill="black")
        pictures = (None if batch.reference is None else batch.reference[row], output[row], batch.target[row])
        for j, picture in enumerate(pictures):
            if picture is not None:
                sheet.paste(enlarged(picture, zoom), (left + 4 + j * 114 * zoom, top + 20))
    return sheet


def enlarged(picture: Tensor, zoom: int) -> Image.Image:
    """(3, H, W) in -1..1 as an image, each pixel zoom x zoom."""
    pixels = rearrange(((picture + 1) * 127.5).round().clamp(0, 255), "c h w -> h w c").numpy().astype(np.uint8)
    return Image.fromarray(pixels).resize((pixels.shape[1] * zoom, pixels.shape[0] * zoom), Image.NEAREST)


def report(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Print the table; write metrics.json and sheet.jpg into the model folder."""
    table, rows = evaluate(folder, count)
    settings = {"cases": count, "steps": SAMPLING.steps, "guidance": SAMPLING.guidance, "success_below": ENOUGH}
    (folder / "metrics.json").write_text(json.dumps({"settings": settings, "edits": table}, indent=2) + "\n")
    contact_sheet(rows).save(folder / "sheet.jpg", quality=85)
    return table
