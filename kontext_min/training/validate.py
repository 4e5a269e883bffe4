"""How far a run has come, in pictures: input | base | LoRA | target of every validation item, with PSNR."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from kontext_min.adapters.inject import muted
from kontext_min.config import Config
from kontext_min.data.cache import digest
from kontext_min.data.examples import Examples, use_of
from kontext_min.edit import Editor, Text, edit
from kontext_min.presets import Preset
from kontext_min.sampler import Sampling
from kontext_min.training.items import Item, asked_items, pair_item
from kontext_min.training.sets import Sets, mix_of
from kontext_min.training.track import record

MARGIN, LINE = 8, 18  # pixels of a sheet
SHOWN = 256  # small pictures are enlarged to about this on a sheet


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, in dB; infinite when they are equal."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def sheet(rows: list[tuple[str, list[tuple[str, Image.Image]]]]) -> Image.Image:
    """A contact sheet: every row a title and captioned pictures, small ones enlarged without smoothing."""
    enlarged = []
    for title, cells in rows:
        zoom = max(1, SHOWN // max(max(image.size) for _, image in cells))
        enlarged.append((title, [(label, scaled(image, zoom)) for label, image in cells]))
    width = max(sum(image.width + MARGIN for _, image in cells) for _, cells in enlarged) + MARGIN
    height = sum(max(image.height for _, image in cells) + 2 * LINE + MARGIN for _, cells in enlarged) + MARGIN
    page = Image.new("RGB", (width, height), "white")
    pen, font, top = ImageDraw.Draw(page), ImageFont.load_default(13), MARGIN
    for title, cells in enlarged:
        pen.text((MARGIN, top), title, fill="black", font=font)
        left = MARGIN
        for label, image in cells:
            pen.text((left, top + LINE), label, fill="gray", font=font)
            page.paste(image, (left, top + 2 * LINE))
            left += image.width + MARGIN
        top += max(image.height for _, image in cells) + 2 * LINE + MARGIN
    return page


def scaled(image: Image.Image, zoom: int) -> Image.Image:
    """A picture enlarged by a whole factor."""
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def items_of(config: Config, sets: Sets, preset: Preset) -> list[Item]:
    """All that is shown: pairs of the data, then what was asked for."""
    mix = mix_of(config).complete()
    uses = [use_of(i, example, mix, epoch=0) for i, example in enumerate(sets.validation or sets.training[:1])]
    pairs = [pair_item(config, use, sets.unseen) for use in uses]
    shown = pairs[: config.num_eval_images] if sets.validation and config.validation_using_datasets else []
    own = [item for wanted in sets.asked for item in asked_items(config, wanted, pairs[0], preset)]
    return [] if config.validation_disable else shown + own


def sampling_of(config: Config) -> Sampling:
    """How validation pictures are sampled, but for the seed."""
    steps = config.validation_num_inference_steps
    cfg = (config.validation_guidance_real, (config.validation_no_cfg_until_timestep / steps, 1.0))
    return Sampling(steps, config.validation_guidance, *cfg)


class Validator:
    """Makes every item's picture with the LoRA as it is now, and once with the base alone.

    The folder holds a sheet per time, STEP.png, and the pictures alone: input/, target/, base/ and STEP/, by the item's
    number in items.json.
    """

    def __init__(self, editor: Editor, examples: Examples, items: list[Item], sampling: Sampling, folder: Path):
        self.editor, self.examples, self.items, self.sampling, self.folder = editor, examples, items, sampling, folder
        self.base: list[Image.Image] = []

    def begin(self):
        """A new run: nothing of an earlier one is left among its numbers."""
        (self.folder / "psnr.jsonl").unlink(missing_ok=True)

    def prepare(self):
        """Write what stays the same, and the base model's pictures unless those of the same items are here already."""
        if self.base or not self.items:
            return
        listed = json.dumps([item.record() for item in self.items], indent=2, ensure_ascii=False)
        views = [view.key() for item in self.items for view in item.references]
        made_from = digest(listed, *views, repr(self.sampling), self.examples.weights_of("transformer"))
        note, files = self.folder / "base" / "made-from.txt", self.files("base")
        if note.is_file() and note.read_text() == made_from and all(file.is_file() for file in files):
            self.base = [Image.open(file).convert("RGB") for file in files]
            return
        for old in self.folder.glob("*/"):  # of other items
            shutil.rmtree(old)
        for folder in ("input", "target", "base"):
            (self.folder / folder).mkdir(parents=True)
        (self.folder / "items.json").write_text(listed + "\n", encoding="utf-8")
        for i, item in enumerate(self.items):
            for k, view in enumerate(item.references, 1):
                view.open().save(self.folder / "input" / f"{i:02d}-{k}.png")
            if item.target is not None:
                item.target.open().save(self.folder / "target" / f"{i:02d}.png")
        with muted(self.editor.flux):
            self.base = self.pictures("base")
        note.write_text(made_from)

    def files(self, folder: str) -> list[Path]:
        """Where the items' pictures of one kind lie."""
        return [self.folder / folder / f"{i:02d}.png" for i in range(len(self.items))]

    def text(self, prompt: str) -> Text:
        """An encoded prompt on the model's device."""
        txt, vec = self.examples.text(prompt)
        return txt.to(self.editor.device), vec.to(self.editor.device)

    @torch.no_grad()
    def pictures(self, folder: str) -> list[Image.Image]:
        """One picture per item, with what the model holds now; each is written."""
        made = []
        for item, file in zip(self.items, self.files(folder), strict=True):
            negative = self.text(item.negative) if self.sampling.cfg_scale != 1 else None
            references = [view.open() for view in item.references]
            sampling = replace(self.sampling, seed=item.seed)
            made.append(edit(self.editor, self.text(item.prompt), references, item.size, sampling, negative))
            file.parent.mkdir(parents=True, exist_ok=True)
            made[-1].save(file)
        return made

    def run(self, step: int) -> str:
        """Write all pictures of a step, and a line of psnr.jsonl on those with a target. -> one sentence on them."""
        if not self.items:
            return f"step {step}: nothing to show, num_eval_images is 0 or validation is disabled"
        self.prepare()
        rows, scores = [], []
        for item, base, lora in zip(self.items, self.base, self.pictures(f"{step:06d}"), strict=True):
            made = {"base": base, "LoRA": lora}
            if item.target is not None:
                target = item.target.open()
                decibels = {kind: psnr(image, target) for kind, image in made.items()}
                scores.append({"base": decibels["base"], "lora": decibels["LoRA"]})
                made = {f"{kind} {decibels[kind]:.1f} dB": image for kind, image in made.items()} | {"target": target}
            rows.append((item.title(), [("input", view.open()) for view in item.references] + [*made.items()]))
        sheet(rows).save(self.folder / f"{step:06d}.png")
        if not scores:
            return f"step {step}: look at {self.folder / f'{step:06d}.png'}"
        mean = {kind: sum(score[kind] for score in scores) / len(scores) for kind in ("base", "lora")}
        record(self.folder / "psnr.jsonl", {"step": step, **mean, "pairs": scores})
        return f"step {step}: {mean['lora']:.1f} dB to the target with the LoRA, {mean['base']:.1f} dB without"
