"""How well nano edits, alone or with a LoRA: seeded held-out pictures, a rule that looks at pixels, a contact sheet."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from kontext_min.adapters.read import read_adapter
from kontext_min.checkpoints.save import write_json
from kontext_min.compare import card, page, psnr
from kontext_min.data.buckets import Size
from kontext_min.edit import Editor, edit, open_editor
from kontext_min.encoders import Text, decode_image, encode_image
from kontext_min.nano.edits import MIX, SIZES, Example, example, to_image
from kontext_min.sampler import Sampling

SAMPLING = Sampling(steps=8, guidance=1.0)  # the seed is the case's number
CHANGED = 19  # of 255: a pixel counts as changed if a channel of reference and target differ by more
ENOUGH = 0.25  # success: the squared error on changed pixels is below this share of the reference's there,
UNDISTURBED = 20.0  # and the other pixels have at least this PSNR in dB
NEAR = 16  # pixels, a token's side: an unchanged pixel further from every changed one is "elsewhere"
KEPT = 25.0  # where nothing should change, success is this PSNR in dB
GUIDANCES = {f"guidance {scale:g}": replace(SAMPLING, guidance=scale) for scale in (1.0, 2.5, 4.0)}
GUIDANCES |= {f"true CFG {scale:g}": replace(SAMPLING, cfg_scale=scale) for scale in (2.5, 4.0)}


def cases(name: str, count: int) -> list[Example]:
    return [example("validation", 10_000 + i, SIZES[i % len(SIZES)], name) for i in range(count)]


def judge(output: Image.Image, reference: Image.Image, target: Image.Image) -> tuple[bool, float, float]:
    """Whether what should change came out and the rest stayed; PSNR in dB of the rest, and elsewhere; nan of none."""
    made, before, wanted = (np.asarray(image, np.float64) for image in (output, reference, target))
    changed = np.abs(wanted - before).max(-1) > CHANGED  # what one can see, (H, W)
    near = np.asarray(Image.fromarray(changed).convert("L").filter(ImageFilter.MaxFilter(2 * NEAR + 1))) > 0
    outside, elsewhere = (psnr(made[rest], wanted[rest]) if rest.any() else math.nan for rest in (~changed, ~near))
    if not changed.any():
        return outside > KEPT, outside, elsewhere
    error, least = (np.square(picture - wanted)[changed].sum() for picture in (made, before))
    return error < ENOUGH * least and not outside < UNDISTURBED, outside, elsewhere


def measure(
    editor: Editor, texts: dict[str, Text], task: Example, other: Example, sampling: Sampling
) -> tuple[dict[str, float], Image.Image]:
    """Numbers of one case, nan where they mean nothing, and its card. other: a case whose references are tried too."""
    target, *references = map(to_image, (task.target, *task.references))
    given = (Size(*target.size), sampling, texts[""])
    output = edit(editor, texts[task.prompt], references, *given)
    ceiling = decode_image(editor.vae, encode_image(editor.vae, target))
    numbers = {"psnr": psnr(output, target), "ceiling": psnr(ceiling, target)}
    if references:
        shuffled = edit(editor, texts[task.prompt], list(map(to_image, other.references)), *given)
        made = (output, ceiling, shuffled)
        (done, *rest), (best, *ceilings), (wrong, *_) = (judge(picture, references[0], target) for picture in made)
        numbers |= {
            "copy": min(60.0, psnr(references[0], target)),
            "success": done, "success_ceiling": best, "shuffled": wrong, "shuffled_psnr": psnr(shuffled, target),
            "photographs": done if task.photograph else math.nan, "outside": rest[0], "outside_ceiling": ceilings[0],
            "elsewhere": rest[1], "elsewhere_ceiling": ceilings[1],
        }  # fmt: skip
    named = [*(("reference", picture) for picture in references), ("nano", output), ("target", target)]
    return numbers, card([task.prompt], named)


def evaluate(folder: Path, edits: Iterable[str], count: int, sampling=SAMPLING, lora=None) -> tuple[dict, Image.Image]:
    """Means over `count` cases of every edit, printed as they come, and a sheet with three cases of each."""
    prompts = [task.prompt for name in edits for task in cases(name, count)]
    loras = [(read_adapter(lora), 1.0)] if lora else []
    editor, texts = open_editor(str(folder), loras, [*prompts, ""], torch.device("cpu"), torch.float32)
    table, cards = {}, []
    for name in edits:
        tasks = cases(name, count)
        seeded = [(task, tasks[i - 1], replace(sampling, seed=i)) for i, task in enumerate(tasks)]
        numbers, shown = zip(*(measure(editor, texts, *one) for one in seeded), strict=True)
        columns = {key: [one[key] for one in numbers if not math.isnan(one[key])] for key in numbers[0]}
        table[name] = {key: round(float(np.mean(found)), 3) for key, found in columns.items() if found}
        print(f"{name:14s}", *(f"{key} {mean:5.2f}" for key, mean in table[name].items()), flush=True)
        cards += shown[:3]
    return table, page(cards, columns=3)


def report(folder: Path, count: int) -> None:
    table, sheet = evaluate(folder, MIX, count)
    effect = {}
    for name, sampling in GUIDANCES.items():
        print(f"at {name}:")
        effect[name], _ = evaluate(folder, ("add", "recolour"), min(count, 40), sampling)
    settings = {"cases": count, "steps": SAMPLING.steps, "guidance": SAMPLING.guidance, "success_below": ENOUGH}
    write_json(folder / "metrics.json", {"settings": settings, "edits": table, "guidance": effect})
    sheet.save(folder / "sheet.jpg", quality=85)


def report_lora(folder: Path, lora: Path, edits: Iterable[str], count: int) -> None:
    """Base and LoRA, and the share of the way from the better of doing nothing and the base to the ceiling."""
    read_adapter(lora)  # what is wrong with it is said before the base is measured
    base, _ = evaluate(folder, edits, count)
    table, sheet = evaluate(folder, edits, count, lora=lora)
    for name, numbers in table.items():
        at = max(base[name]["psnr"], numbers.get("copy", 0.0))
        way, gone = numbers["ceiling"] - at, numbers["psnr"] - at
        numbers |= {"base": base[name]["psnr"], "closed": round(gone / way, 3) if way > 0 else None}
        print(f"{name:14s} copy or base {at:5.2f} LoRA {at + gone:5.2f}", f"closed {gone / way:.0%}" if way > 0 else "")
    write_json(lora.with_suffix(".json"), table)
    sheet.save(lora.with_suffix(".jpg"), quality=85)
