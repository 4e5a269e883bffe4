"""What a run leaves in its output_dir: every file's name, and what a resumed run and a new one do with them.

config.json                       every key in force; a config file again
metrics.jsonl                     a line per optimizer step
model/                            with model_type full: the model, trained, in its own layout
pytorch_lora_weights.safetensors  the LoRA; ema/ has its average, sample-reference-1.png what infer.py shows it on
checkpoint-500/                   all that a run needs to go on; previous-1/ has what a later start set aside
README.md  report.html  logs/     the model card; everything on one page; what trackers write
validation/items.json             what is shown: items 0, 1, …
validation/KIND/00.png            of item 0; KIND: input-1 (a reference), target, base (its own), 000500 (the LoRA's)
validation/000500.png             a sheet of all items after step 500
validation/psnr.jsonl             a line per sheet; eval.jsonl: a line per evaluation
"""

import json
from pathlib import Path

LORA = "pytorch_lora_weights.safetensors"
SMOOTHING = 0.98  # of the loss that is shown: a mean over about 50 steps
LEFT_BEHIND = (
    "config.json", "metrics.jsonl", "validation", LORA, "ema", "checkpoint-*", "sample-reference-*.png",
    "logs", "wandb-id", "README.md", "report.html", "model",
)  # fmt: skip


class RunFolder:
    """The files of one run, by what they are; none need be there."""

    def __init__(self, path: Path):
        self.path = path
        self.config, self.metrics = path / "config.json", path / "metrics.jsonl"
        self.lora, self.average, self.model = path / LORA, path / "ema" / LORA, path / "model"
        self.card, self.report, self.validation = path / "README.md", path / "report.html", path / "validation"
        self.items, self.psnr, self.eval = (self.validation / n for n in ("items.json", "psnr.jsonl", "eval.jsonl"))

    def sheet(self, step: int) -> Path:
        return self.validation / f"{step:06d}.png"

    def picture(self, kind: str, i: int) -> Path:
        return self.validation / kind / f"{i:02d}.png"

    def pictures(self, i: int) -> dict[str, Path]:
        """Kind -> picture of item i, for those that are there; the LoRA's come first, by step."""
        return {file.parent.name: file for file in sorted(self.validation.glob(f"*/{i:02d}.png"))}

    def rewind(self, step: int) -> Path | None:  # logs end with a step; later checkpoints and pictures are set aside
        for file in filter(Path.exists, (self.metrics, self.psnr, self.eval)):
            kept = [json.dumps(line) + "\n" for line in read_lines(file) if line["step"] <= step]
            file.write_text("".join(kept), encoding="utf-8")
        pictures = [path for path in self.validation.glob("*") if path.stem.isdigit() and int(path.stem) > step]
        return self.aside([path for path in checkpoints(self.path) if int(path.name[11:]) > step] + pictures)

    def set_aside(self) -> Path | None:
        """Move what an earlier run left to previous-N in the folder: a new run neither mixes with it nor loses it."""
        old = [path for pattern in LEFT_BEHIND for path in sorted(self.path.glob(pattern))]
        return self.aside(old) if any(path != self.config for path in old) else None

    def aside(self, old: list[Path]) -> Path | None:  # to previous-N
        numbers = [int(p.name[9:]) for p in self.path.glob("previous-*") if p.name[9:].isdigit()]
        target = self.path / f"previous-{max(numbers, default=0) + 1}"
        for path in old:
            target.mkdir(exist_ok=True)
            path.rename(target / path.name)
        return target if old else None


def checkpoints(folder: Path) -> list[Path]:  # by step
    numbered = {int(path.name[11:]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    return [numbered[step] for step in sorted(numbered)]


def read_lines(file: Path) -> list[dict]:
    """JSON lines but for a last one that was cut off, when the run was killed; none without the file."""
    texts = file.read_text(encoding="utf-8").split("\n") if file.exists() else [""]
    return [json.loads(text) for text in texts[:-1]]


def append(file: Path, line: dict):
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
