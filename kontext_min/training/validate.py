"""How far a run has come, in pictures: input | base | LoRA | target of every validation pair, with PSNR."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from kontext_min.adapters.inject import muted
from kontext_min.data.examples import Examples, use_of
from kontext_min.edit import Editor, edit
from kontext_min.sampler import Sampling

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


class Validator:
    """Edits the validation pairs with the LoRA as it is now, and once with the base alone."""

    def __init__(self, editor: Editor, examples: Examples, sampling: Sampling, folder: Path):
        self.editor, self.examples, self.sampling, self.folder = editor, examples, sampling, folder
        self.uses = [use_of(i, example, examples.mix, epoch=0) for i, example in enumerate(examples.examples)]
        self.base: list[Image.Image] = []

    def begin(self):
        """A new run: nothing of an earlier one is left among its numbers."""
        (self.folder / "psnr.jsonl").unlink(missing_ok=True)

    def pictures(self) -> list[Image.Image]:
        """One edit per validation pair, with what the model holds now."""
        made = []
        for use in self.uses:
            text = tuple(part.to(self.editor.device) for part in self.examples.text(use.caption))
            references = [view.open() for view in use.references]
            made.append(edit(self.editor, text, references, use.target.size, self.sampling))
        return made

    @torch.no_grad()
    def run(self, step: int) -> str:
        """Write validation/STEP.png and a line of psnr.jsonl. -> one sentence on how it stands."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.uses:
            return "no validation pairs"
        if not self.base:
            with muted(self.editor.flux):
                self.base = self.pictures()
        rows, scores = [], []
        for use, base, lora in zip(self.uses, self.base, self.pictures(), strict=True):
            target = use.target.open()
            score = {"base": psnr(base, target), "lora": psnr(lora, target)}
            scores.append(score)
            cells = [("input", view.open()) for view in use.references]
            cells += [
                (f"base {score['base']:.1f} dB", base),
                (f"LoRA {score['lora']:.1f} dB", lora),
                ("target", target),
            ]
            rows.append((f"{use.example.name}: {use.caption}", cells))
        sheet(rows).save(self.folder / f"{step:06d}.png")
        mean = {kind: sum(score[kind] for score in scores) / len(scores) for kind in ("base", "lora")}
        self.record({"step": step, **mean, "pairs": scores})
        return f"step {step}: {mean['lora']:.1f} dB to the target with the LoRA, {mean['base']:.1f} dB without"

    def record(self, line: dict):
        """Add a line to psnr.jsonl in place of those that an interrupted run wrote for later steps."""
        file = self.folder / "psnr.jsonl"
        lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
        kept = [old for old in lines if old["step"] < line["step"]]
        file.write_text("".join(json.dumps(entry) + "\n" for entry in [*kept, line]), encoding="utf-8")
