"""What a run writes while it goes: metrics.jsonl, one line per optimizer step, and a progress bar."""

import json
from pathlib import Path

from tqdm import tqdm


def record(file: Path, line: dict):
    """Add a line to a JSONL file in place of those that an interrupted run wrote for this step and later ones."""
    lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    kept = [old for old in lines if old["step"] < line["step"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in [*kept, line]), encoding="utf-8")


class Tracker:
    """Appends to OUTPUT/metrics.jsonl and moves the bar. Use as a context manager.

    start: the steps already done; later lines of an interrupted run are taken out, since they are written again.
    """

    def __init__(self, folder: Path, total: int, start: int = 0):
        path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if start and path.exists() else []
        path.write_text("".join(f"{line}\n" for line in lines[:start]), encoding="utf-8")
        self.skipped = sum("skipped" in json.loads(line) for line in lines[:start])
        self.file = open(path, "a", encoding="utf-8")
        self.bar = tqdm(total=total, initial=start, unit="step", desc="training")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_):
        self.file.close()
        self.bar.close()

    def log(self, step: int, **values: float | None):
        """One optimizer step; a skipped one has no loss."""
        self.skipped += "skipped" in values
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if values["loss"] is not None:
            self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        self.bar.update()
