"""How far a run has come, in pictures: input | base | LoRA | target of every validation item, with PSNR."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from kontext_min import parallel
from kontext_min.adapters.inject import muted
from kontext_min.compare import card, page, psnr
from kontext_min.config import Config
from kontext_min.data.cache import digest
from kontext_min.data.examples import Examples, use_of
from kontext_min.edit import Editor, Text, edit
from kontext_min.presets import Preset
from kontext_min.run_folder import RunFolder, append
from kontext_min.sampler import Sampling
from kontext_min.training.items import Item, asked_items, pair_item
from kontext_min.training.sets import Sets, mix_of


def items_of(config: Config, sets: Sets, preset: Preset) -> list[Item]:
    mix = mix_of(config).complete()
    uses = [use_of(i, example, mix, epoch=0) for i, example in enumerate(sets.validation or sets.training[:1])]
    pairs = [pair_item(config, use, sets.unseen) for use in uses]
    shown = pairs[: config.num_eval_images] if sets.validation and config.validation_using_datasets else []
    own = [item for wanted in sets.asked for item in asked_items(config, wanted, pairs[0], preset)]
    return [] if config.validation_disable else shown + own


def sampling_of(config: Config) -> Sampling:
    steps, start = config.validation_num_inference_steps, config.validation_no_cfg_until_timestep
    return Sampling(steps, config.validation_guidance, config.validation_guidance_real, (start / steps, 1.0))


class Validator:
    """Makes every item's picture with the LoRA as it is now, and once with the base alone."""

    def __init__(self, editor: Editor, examples: Examples, items: list[Item], sampling: Sampling, folder: RunFolder):
        self.editor, self.examples, self.items, self.sampling, self.folder = editor, examples, items, sampling, folder
        self.base: list[Image.Image] = []

    def prepare(self):
        """Write what stays the same, and the base model's pictures unless those of the same items are here already."""
        listed = json.dumps([item.record() for item in self.items], indent=2, ensure_ascii=False)
        views = [view.key() for item in self.items for view in item.references]
        weights = self.examples.weights_of("transformer")
        made_from = digest(listed, *views, f"{self.sampling} {self.examples.dtype}", weights)
        note = self.folder.validation / "base" / "made-from.txt"
        if note.is_file() and note.read_text() == made_from:
            self.base = [Image.open(self.folder.picture("base", i)).convert("RGB") for i in range(len(self.items))]
        elif self.items:
            self.clear()
            with muted(self.editor.flux):
                self.base = self.pictures("base")
            parallel.by_first(self.folder.items.write_text)(listed + "\n", encoding="utf-8")
            parallel.by_first(note.write_text)(made_from)

    @parallel.by_first
    def clear(self):  # set aside what was made of other items, and write what these are made from
        if aside := self.folder.aside([*self.folder.validation.glob("*/"), *self.folder.validation.glob("psnr.jsonl")]):
            print(f"older validation pictures were moved to {aside}")
        for i, item in enumerate(self.items):
            views = {f"input-{k}": view for k, view in enumerate(item.references, 1)}
            for kind, view in (views | ({"target": item.target} if item.target else {})).items():
                save(view.open(), self.folder.picture(kind, i))

    def text(self, prompt: str) -> Text:
        return tuple(part.to(self.editor.device) for part in self.examples.text(prompt))

    @torch.no_grad()
    def pictures(self, kind: str) -> list[Image.Image]:
        made = parallel.shared_out(self.made, self.items)
        for i, image in enumerate(made):
            parallel.by_first(save)(image, self.folder.picture(kind, i))
        return made

    def made(self, item: Item) -> Image.Image:
        negative = self.text(item.negative) if self.sampling.cfg_scale != 1 else None
        text, references = self.text(item.prompt), [view.open() for view in item.references]
        return edit(self.editor, text, references, item.size, replace(self.sampling, seed=item.seed), negative)

    def run(self, step: int) -> str:
        """Write all pictures of a step, and a line of psnr.jsonl on those with a target. -> one sentence on them."""
        if not self.items:
            return f"step {step}: nothing to show, num_eval_images is 0 or validation is disabled"
        if not self.base:
            self.prepare()
        made, rows, scores = self.pictures(f"{step:06d}"), [], []
        if parallel.rank():  # the first one compares
            return ""
        for item, base, lora in zip(self.items, self.base, made, strict=True):
            cells = [*(("input", view.open()) for view in item.references), ("base", base), ("LoRA", lora)]
            if item.target is not None:
                target = item.target.open()
                scores.append({"base": psnr(base, target), "lora": psnr(lora, target)})
                labels = (f"base {scores[-1]['base']:.1f} dB", f"LoRA {scores[-1]['lora']:.1f} dB", "target")
                cells[-2:] = zip(labels, (base, lora, target), strict=True)
            rows.append(card([item.title()], cells))
        page(rows).save(self.folder.sheet(step))
        if not scores:
            return f"step {step}: look at {self.folder.sheet(step)}"
        mean = {kind: sum(score[kind] for score in scores) / len(scores) for kind in ("base", "lora")}
        append(self.folder.psnr, {"step": step, **mean, "pairs": scores})
        return f"step {step}: {mean['lora']:.1f} dB to the target with the LoRA, {mean['base']:.1f} dB without"


def save(image: Image.Image, file: Path):
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
