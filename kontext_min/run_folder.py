"""What a run leaves in its output_dir: every file's name, its logs, and how a new run or a resumed one treats them.

config.json                           every key in force; a config file again
metrics.jsonl                         a line per optimizer step
pytorch_lora_weights.safetensors      the LoRA; its moving average is in ema/
sample-reference-1.png                what infer.py shows the LoRA on
checkpoint-500/                       all that a run needs to go on
README.md  report.html  logs/         the model card; everything on one page; what trackers write
validation/items.json                 what is shown: items 0, 1, …
validation/input/00-1.png             item 0's first reference; target/00.png: what is wanted; base/00.png: the base's
validation/000500/00.png              the LoRA's picture after step 500; 000500.png is a sheet of all items
validation/psnr.jsonl  eval.jsonl     a line per sheet; a line per evaluation
"""

import json
from pathlib import Path

LORA = "pytorch_lora_weights.safetensors"
LEFT_BEHIND = (
    "config.json", "metrics.jsonl", "validation", "*.safetensors", "ema", "checkpoint-*", "sample-reference-*.png",
    "logs", "wandb-id", "README.md", "report.html",
)  # fmt: skip


class RunFolder:
    """The files of one run, by what they are; none need be there."""

    def __init__(self, path: Path):
        self.path = path
        self.config, self.metrics = path / "config.json", path / "metrics.jsonl"
        self.lora, self.average = path / LORA, path / "ema" / LORA
        self.card, self.report = path / "README.md", path / "report.html"
        self.validation = path / "validation"
        self.items, self.psnr = self.validation / "items.json", self.validation / "psnr.jsonl"
        self.eval = self.validation / "eval.jsonl"

    def sheet(self, step: int) -> Path:
        """All items at a step on one picture."""
        return self.validation / f"{step:06d}.png"

    def picture(self, kind: str | int, i: int) -> Path:
        """Of item i: its `target`, the `base` model's picture, or the LoRA's at a step."""
        return self.validation / (kind if isinstance(kind, str) else f"{kind:06d}") / f"{i:02d}.png"

    def pictures(self, step: int) -> list[Path]:
        """The LoRA's after a step, by item."""
        return sorted(self.validation.glob(f"{step:06d}/*.png"))

    def input(self, i: int, k: int) -> Path:
        """Reference k, counted from 1, of item i."""
        return self.validation / "input" / f"{i:02d}-{k}.png"

    def inputs(self, i: int) -> list[Path]:
        """The references of item i that are there."""
        return sorted(self.validation.glob(f"input/{i:02d}-*.png"))

    def steps(self) -> list[int]:
        """Those after which pictures were made."""
        return sorted(int(path.name) for path in self.validation.glob("*/") if path.name.isdigit())

    def rewind(self, step: int):
        """Take out of the logs what an interrupted run wrote after a step, since it is written again."""
        for file in (self.metrics, self.psnr, self.eval):
            kept = [text for text in whole_lines(file) if json.loads(text)["step"] <= step]
            if file.exists():
                file.write_text("".join(f"{text}\n" for text in kept), encoding="utf-8")

    def set_aside(self) -> Path | None:
        """Move what an earlier run left to previous-N in the folder: a new run neither mixes with it nor loses it."""
        old = [path for pattern in LEFT_BEHIND for path in sorted(self.path.glob(pattern))]
        if not any(path != self.config for path in old):
            return None
        numbers = [int(p.name[9:]) for p in self.path.glob("previous-*") if p.name[9:].isdigit()]
        target = self.path / f"previous-{max(numbers, default=0) + 1}"
        target.mkdir()
        for path in old:
            path.rename(target / path.name)
        return target


def read(file: Path):
    """JSON with None for NaN and infinities, which browsers do not read; None without the file."""
    return parse(file.read_text(encoding="utf-8")) if file.exists() else None


def read_lines(file: Path) -> list[dict]:
    """JSON lines, likewise."""
    return [parse(text) for text in whole_lines(file)]


def append(file: Path, line: dict):
    """Add a JSON line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def whole_lines(file: Path) -> list[str]:
    """A log's lines but for a last one that was cut off, when the run was killed; none without the file."""
    return file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []


def parse(text: str):
    return json.loads(text, parse_constant=lambda name: None)
