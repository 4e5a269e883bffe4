"""How well nano edits, alone or with a LoRA: seeded held-out pictures, a rule that looks at pixels, a contact sheet."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kontext_min import flow, sampler
from kontext_min.adapters.inject import apply_updates
from kontext_min.adapters.read import read_adapter
from kontext_min.checkpoints.load import find, load_flux, load_vae
from kontext_min.checkpoints.save import write_json
from kontext_min.compare import card, page
from kontext_min.data.buckets import Size
from kontext_min.encoders import TextEncoder, to_image
from kontext_min.nano.edits import MIX, Example, example
from kontext_min.nano.pretrain import to_tensor

SIZES = (Size(96, 96), Size(112, 80), Size(80, 112), Size(96, 96))
SAMPLING = sampler.Sampling(steps=8, guidance=1.0, seed=0)
CHANGED = 0.15  # on -1..1: a pixel counts as changed if a channel of reference and target differ by more
ENOUGH = 0.25  # success: the squared error on changed pixels is below this share of the reference's there,
UNDISTURBED = 20.0  # and the other pixels have at least this PSNR in dB
KEPT = 25.0  # where nothing should change, success is this PSNR in dB
BATCH = 25
GUIDANCES = {f"guidance {scale:g}": replace(SAMPLING, guidance=scale) for scale in (1.0, 2.5, 4.0)}
GUIDANCES |= {f"true CFG {scale:g}": replace(SAMPLING, cfg_scale=scale) for scale in (2.5, 4.0)}


class Editor:
    """A model folder, loaded in fp32, at times with a LoRA."""

    def __init__(self, folder: Path, lora: Path | None = None):
        checkpoint, place = find(folder), (torch.device("cpu"), torch.float32)
        self.flux, self.vae = load_flux(checkpoint, *place), load_vae(checkpoint, *place)
        self.text, self.shift = TextEncoder(checkpoint, *place), checkpoint.shift
        if lora is not None:
            apply_updates(self.flux, read_adapter(lora).updates, 1.0, torch.float32)

    @torch.inference_mode()
    def __call__(self, prompts: list[str], references: list[Tensor], size: Size, sampling=SAMPLING) -> Tensor:
        """Edited pictures (B, 3, H, W) in -1..1; references alike, none for text-to-image."""
        text, latents = self.text, [self.vae.encode(pictures) for pictures in references]

        def condition(texts: list[str]) -> flow.Condition:
            return flow.Condition(text.t5(text.tokenize_t5(texts)), text.clip(text.tokenize_clip(texts)), latents)

        field = sampler.guided(self.flux, condition(prompts), condition([""] * len(prompts)), sampling)
        shape = (len(prompts), 16, size.height // 8, size.width // 8)
        x = flow.draw_noise(shape, torch.Generator().manual_seed(sampling.seed))
        times = flow.schedule(sampling.steps, flow.token_count(*shape[-2:]), self.shift)
        *_, x = sampler.euler(field, x, times)
        return self.vae.decode(x).clamp(-1, 1)


def batches(edit: str, count: int) -> Iterator[list[Example]]:
    """`count` validation examples of an edit, learnt or held out, in batches of one size."""
    for size in dict.fromkeys(SIZES):
        numbers = [10_000 + i for i in range(count) if SIZES[i % len(SIZES)] == size]
        for start in range(0, len(numbers), BATCH):
            yield [example("validation", i, size, edit) for i in numbers[start : start + BATCH]]


def psnr(output: Tensor, target: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    """dB (B,) of pictures (B, 3, H, W) in -1..1 where the mask (B, 1, H, W) is 1; nan where it never is."""
    mask = torch.ones_like(target) * mask
    squared = ((output.clamp(-1, 1) - target) / 2).square() * mask
    return -10 * torch.log10((squared.flatten(1).sum(1) / mask.flatten(1).sum(1)).clamp(min=1e-8))


def judge(output: Tensor, reference: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Per picture: 1 if what should change came out and the rest stayed, else 0; the rest's PSNR, nan without. (B,)"""
    mask = ((target - reference).abs().amax(1, keepdim=True) > CHANGED).float()  # what one can see, (B, 1, H, W)
    error, before = (((x - target).square() * mask).flatten(1).sum(1) for x in (output, reference))
    outside = psnr(output, target, 1 - mask)
    done = (error < ENOUGH * before) & ~(outside < UNDISTURBED)
    return torch.where(before > 0, done, psnr(output, target) > KEPT).float(), outside


@torch.inference_mode()
def measure(editor: Editor, tasks: list[Example], sampling: sampler.Sampling) -> tuple[dict[str, Tensor], Image.Image]:
    """Per-picture numbers of one batch, each (B,), and a card of one case, a photograph if there is one."""
    columns = zip(*((task.target, *task.references) for task in tasks), strict=True)
    target, *references = map(to_tensor, columns)  # (B, 3, H, W) in -1..1
    prompts, size = [task.prompt for task in tasks], Size(*target.shape[:1:-1])
    photograph = torch.tensor([task.photograph for task in tasks])
    output = editor(prompts, references, size, sampling)
    ceiling = editor.vae.decode(editor.vae.encode(target)).clamp(-1, 1)
    numbers = {"psnr": psnr(output, target), "ceiling": psnr(ceiling, target)}
    if references:
        shuffled = editor(prompts, [pictures.roll(1, dims=0) for pictures in references], size, sampling)
        pictures = (output, ceiling, shuffled)
        (done, outside), (best, apart), (wrong, _) = (judge(made, references[0], target) for made in pictures)
        numbers |= {
            "copy": psnr(references[0], target).clamp(max=60),
            "success": done, "success_ceiling": best, "shuffled": wrong, "shuffled_psnr": psnr(shuffled, target),
            "outside": outside, "outside_ceiling": apart, "photographs": torch.where(photograph, done, torch.nan),
        }  # fmt: skip
    row = int(photograph.int().argmax())
    named = [*(("reference", pictures) for pictures in references), ("nano", output), ("target", target)]
    return numbers, card([prompts[row]], [(label, to_image(pictures[row])) for label, pictures in named])


def evaluate(editor: Editor, edits: Iterable[str], count: int, sampling=SAMPLING) -> tuple[dict, Image.Image]:
    """Means over `count` cases of every edit, printed as they come, and a sheet with three cases of each."""
    table, cards = {}, []
    for edit in edits:
        numbers, shown = zip(*(measure(editor, batch, sampling) for batch in batches(edit, count)), strict=True)
        means = {key: torch.cat([part[key] for part in numbers]).nanmean().item() for key in numbers[0]}
        table[edit] = {key: round(mean, 3) for key, mean in means.items() if mean == mean}  # no photographs: nan
        print(f"{edit:14s}", *(f"{key} {mean:5.2f}" for key, mean in table[edit].items()), flush=True)
        cards += shown[:3]
    return table, page(cards, columns=3)


def report(folder: Path, count: int) -> None:
    """Print the table of a model folder, and of some guidances; write metrics.json and sheet.jpg into it."""
    editor, effect = Editor(folder), {}
    table, sheet = evaluate(editor, MIX, count)
    for name, sampling in GUIDANCES.items():
        print(f"at {name}:")
        effect[name], _ = evaluate(editor, ("add", "recolour"), min(count, 40), sampling)
    settings = {"cases": count, "steps": SAMPLING.steps, "guidance": SAMPLING.guidance, "success_below": ENOUGH}
    write_json(folder / "metrics.json", {"settings": settings, "edits": table, "guidance": effect})
    sheet.save(folder / "sheet.jpg", quality=85)


def report_lora(folder: Path, lora: Path, edits: Iterable[str], count: int) -> None:
    """Print what a LoRA does to each edit, beside the base; write LORA.json and LORA.jpg next to the file."""
    base, _ = evaluate(Editor(folder), edits, count)
    table, sheet = evaluate(Editor(folder, lora), edits, count)
    for edit, numbers in table.items():
        numbers["base"] = base[edit]["psnr"]
        start = max(numbers["base"], numbers.get("copy", 0.0))  # closed: the share of the way from here to the ceiling
        numbers["closed"] = round((numbers["psnr"] - start) / (numbers["ceiling"] - start), 3)
        print(f"{edit:14s} copy or base {start:5.2f} LoRA {numbers['psnr']:5.2f} closed {numbers['closed']:.0%}")
    write_json(lora.with_suffix(".json"), table)
    sheet.save(lora.with_suffix(".jpg"), quality=85)
