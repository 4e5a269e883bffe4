"""How well nano edits, alone or with a LoRA: seeded held-out pictures, a rule that looks at pixels, a contact sheet."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from kontext_min import flow, sampler
from kontext_min.adapters.inject import apply_updates
from kontext_min.adapters.read import read_adapter
from kontext_min.checkpoints.load import find, load_clip, load_flux, load_t5, load_vae
from kontext_min.data.buckets import Size
from kontext_min.encoders import to_image
from kontext_min.flow import Condition
from kontext_min.nano.edits import FURTHER_EDITS, GLOBAL_EDITS, HELD_OUT, OBJECT_EDITS, Example, example
from kontext_min.nano.held_out import held_out_example
from kontext_min.nano.model import Tokenizers
from kontext_min.nano.pretrain_vae import psnr, to_tensor
from kontext_min.sampler import Sampling
from kontext_min.sheet import card, page

SIZES = (Size(96, 96), Size(112, 80), Size(80, 112), Size(96, 96))
EDITS = (*GLOBAL_EDITS, *OBJECT_EDITS, "keep", *FURTHER_EDITS, "text to image")
SAMPLING = Sampling(steps=8, guidance=1.0, seed=0)
CHANGED = 0.15  # on -1..1: a pixel counts as changed if a channel of reference and target differ by more
ENOUGH = 0.25  # success: the squared error on changed pixels is below this share of the reference's there,
UNDISTURBED = 20.0  # and the other pixels have at least this PSNR in dB
KEPT = 25.0  # where nothing should change, success is this PSNR in dB
BATCH = 25
GUIDANCES = {f"guidance {scale:g}": replace(SAMPLING, guidance=scale) for scale in (1.0, 2.5, 4.0)}
GUIDANCES |= {f"true CFG {scale:g}": replace(SAMPLING, cfg_scale=scale) for scale in (2.5, 4.0)}


class Editor:
    """A model folder, loaded in fp32, at times with a LoRA."""

    def __init__(self, networks: list[nn.Module], tokenizers: Tokenizers, shift: flow.Shift):
        self.flux, self.vae, self.t5, self.clip = networks
        self.tokenizers, self.shift = tokenizers, shift

    @classmethod
    def read(cls, folder: Path, lora: Path | None = None) -> "Editor":
        """All networks of a model folder."""
        checkpoint, place = find(folder), (torch.device("cpu"), torch.float32)
        networks = [load(checkpoint, *place) for load in (load_flux, load_vae, load_t5, load_clip)]
        if lora is not None:
            apply_updates(networks[0], read_adapter(lora).updates, 1.0, torch.float32)
        return cls(networks, Tokenizers.read(folder), checkpoint.shift)

    @torch.inference_mode()
    def __call__(self, prompts: list[str], references: list[Tensor], size: Size, sampling=SAMPLING) -> Tensor:
        """Edited pictures (B, 3, H, W) in -1..1; references alike, none for text-to-image."""
        latents = [self.vae.encode(pictures) for pictures in references]
        texts = (self.tokenizers(prompts), self.tokenizers([""] * len(prompts)))
        condition, empty = (Condition(self.t5(t5), self.clip(clip), latents) for t5, clip in texts)
        shape = (len(prompts), 16, size.height // 8, size.width // 8)
        x = flow.draw_noise(shape, torch.Generator().manual_seed(sampling.seed))
        times = flow.schedule(sampling.steps, flow.token_count(*shape[-2:]), self.shift)
        *_, x = sampler.euler(sampler.guided(self.flux, condition, empty, sampling), x, times)
        return self.vae.decode(x).clamp(-1, 1)


@dataclass(frozen=True)
class Cases:
    """Examples of one edit and one size; pictures (B, 3, H, W) in -1..1."""

    prompts: list[str]
    references: list[Tensor]
    target: Tensor
    size: Size
    photograph: Tensor  # (B,) bool


def cases_of(edit: str, count: int) -> list[Cases]:
    """`count` validation examples of an edit, learnt or held out, in batches of one size."""
    groups: dict[Size, list[Example]] = {}
    make = held_out_example if edit in HELD_OUT else example
    for i in range(count):
        size = SIZES[i % len(SIZES)]
        groups.setdefault(size, []).append(make("validation", 10_000 + i, size, edit))
    batches = []
    for size, examples in groups.items():
        for start in range(0, len(examples), BATCH):
            some = examples[start : start + BATCH]
            references = [to_tensor(pictures) for pictures in zip(*(task.references for task in some), strict=True)]
            target = to_tensor([task.target for task in some])
            photograph = torch.tensor([task.photograph for task in some])
            batches.append(Cases([task.prompt for task in some], references, target, size, photograph))
    return batches


def success(output: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """Per picture: whether what should change came out and the rest stayed. (B,) bool"""
    mask = changed_pixels(reference, target)
    error = ((output - target).square() * mask).flatten(1).sum(1)
    before = ((reference - target).square() * mask).flatten(1).sum(1)
    done = (error < ENOUGH * before) & ~(outside_psnr(output, reference, target) < UNDISTURBED)
    return torch.where(before > 0, done, psnr(output, target) > KEPT)


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
    output = editor(batch.prompts, batch.references, batch.size)
    with torch.inference_mode():
        ceiling = editor.vae.decode(editor.vae.encode(batch.target)).clamp(-1, 1)
    numbers = {"psnr": psnr(output, batch.target), "ceiling": psnr(ceiling, batch.target)}
    if not batch.references:
        return numbers, output
    reference = batch.references[0]
    shuffled = editor(batch.prompts, [pictures.roll(1, dims=0) for pictures in batch.references], batch.size)
    numbers["copy"] = psnr(reference, batch.target).clamp(max=60)
    numbers["success"] = success(output, reference, batch.target).float()
    numbers["shuffled"] = success(shuffled, reference, batch.target).float()
    numbers["shuffled_psnr"] = psnr(shuffled, batch.target)
    numbers["photographs"] = torch.where(batch.photograph, numbers["success"], torch.nan)
    numbers["outside"] = outside_psnr(output, reference, batch.target)
    numbers["outside_ceiling"] = outside_psnr(ceiling, reference, batch.target)
    return numbers, output


def evaluate(editor: Editor, edits: Sequence[str], count: int) -> tuple[dict[str, dict[str, float]], list]:
    """Means over `count` cases of every edit, and three cases of each as rows of a contact sheet."""
    table, rows = {}, []
    for edit in edits:
        batches = cases_of(edit, count)
        numbers, outputs = zip(*(measure(editor, batch) for batch in batches), strict=True)
        means = {key: torch.cat([part[key] for part in numbers]).nanmean().item() for key in numbers[0]}
        table[edit] = {key: round(mean, 3) for key, mean in means.items() if mean == mean}  # no photographs: nan
        rows += shown(list(zip(batches, outputs, strict=True)))
        print(line(edit, table[edit]), flush=True)
    return table, rows


def guidance_effect(editor: Editor, edit: str, count: int) -> dict[str, dict[str, float]]:
    """PSNR, success and how far the pictures move (RMS of 255) at some guidances and true CFG scales."""
    batches, table, plain = cases_of(edit, count), {}, None
    for name, sampling in GUIDANCES.items():
        outputs = [editor(batch.prompts, batch.references, batch.size, sampling) for batch in batches]
        plain = outputs if plain is None else plain
        moved = torch.cat([(a - b).square().flatten(1).mean(1) for a, b in zip(outputs, plain, strict=True)])
        pairs = list(zip(outputs, batches, strict=True))
        done = torch.cat([success(output, batch.references[0], batch.target) for output, batch in pairs])
        quality = torch.cat([psnr(output, batch.target) for output, batch in pairs])
        table[name] = {
            "psnr": round(quality.mean().item(), 2),
            "success": round(done.float().mean().item(), 3),
            "moved": round(127.5 * moved.mean().sqrt().item(), 2),
        }
        print(f"{edit} at {name}: {table[name]}", flush=True)
    return table


def shown(batches: list[tuple[Cases, Tensor]]) -> list[tuple[Cases, Tensor, int]]:
    """Three rows of the contact sheet: the first cases of the first batches, and a photograph where there is one."""
    rows = [(batch, output, 0) for batch, output in batches[:3]]
    photographs = [(batch, output, i) for batch, output in batches for i in batch.photograph.nonzero().flatten()]
    return rows[:2] + (photographs[-1:] or rows[2:])


def line(edit: str, numbers: dict[str, float]) -> str:
    """One row of the printed table."""
    percent = " ".join(f"{key} {numbers[key]:4.0%}" for key in ("success", "shuffled", "photographs") if key in numbers)
    names = ("psnr", "copy", "ceiling", "outside", "outside_ceiling")
    return f"{edit:14s} {percent:48s} " + " ".join(f"{key} {numbers[key]:.1f}" for key in names if key in numbers)


def contact_sheet(rows: list) -> Image.Image:
    """References | output | target of every row, below the prompt."""
    cards = []
    for batch, output, row in rows:
        named = [("reference", pictures) for pictures in batch.references] + [
            ("nano", output),
            ("target", batch.target),
        ]
        cards.append(card([batch.prompts[row]], [(label, to_image(pictures[row])) for label, pictures in named]))
    return page(cards, columns=3)


def report(folder: Path, count: int) -> None:
    """Print the table of a model folder; write metrics.json and sheet.jpg into it."""
    editor = Editor.read(folder)
    table, rows = evaluate(editor, EDITS, count)
    effect = {edit: guidance_effect(editor, edit, min(count, 40)) for edit in ("add", "recolour")}
    settings = {"cases": count, "steps": SAMPLING.steps, "guidance": SAMPLING.guidance, "success_below": ENOUGH}
    metrics = {"settings": settings, "edits": table, "guidance": effect}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    contact_sheet(rows).save(folder / "sheet.jpg", quality=85)


def report_lora(folder: Path, lora: Path, edits: Sequence[str], count: int) -> None:
    """Print what a LoRA does to each edit, beside the base; write LORA.json and LORA.jpg next to the file.

    closed: how much of the way from the better of base and reference to the autoencoder's ceiling it goes, in dB.
    """
    base, _ = evaluate(Editor.read(folder), edits, count)
    table, rows = evaluate(Editor.read(folder, lora), edits, count)
    for edit, numbers in table.items():
        start = max(base[edit]["psnr"], numbers.get("copy", 0.0))
        numbers["base"] = base[edit]["psnr"]
        numbers["closed"] = round((numbers["psnr"] - start) / (numbers["ceiling"] - start), 3)
        names = ("copy", "base", "psnr", "ceiling", "shuffled_psnr")
        figures = " ".join(f"{name} {numbers[name]:.1f}" for name in names if name in numbers)
        print(f"{edit:14s} {figures} closed {numbers['closed']:.0%}", flush=True)
    lora.with_suffix(".json").write_text(json.dumps(table, indent=2) + "\n")
    contact_sheet(rows).save(lora.with_suffix(".jpg"), quality=85)
