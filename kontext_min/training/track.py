"""What a run tells while it goes: metrics.jsonl, a bar, and, through their own libraries, TensorBoard and W&B."""

import secrets
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.std import EMA, tqdm

from kontext_min import parallel
from kontext_min.config import Config
from kontext_min.memory import in_use
from kontext_min.run_folder import SMOOTHING, RunFolder, append, read_lines

Reporter = tuple[Callable, Callable]  # of (step, numbers by name, pictures by name); and what ends it


class Tracker(ExitStack):
    """Adds to metrics.jsonl, moves the bar, tells the reporters: a context manager. start: the steps already done."""

    def __init__(self, config: Config, device: torch.device, start: int = 0):
        super().__init__()
        self.folder, self.device, self.loss = RunFolder(config.output_dir), device, EMA(1 - SMOOTHING)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # what the encoders took is over
        name = config.tracker_run_name or config.output_dir.name
        logs = config.logging_dir / name if config.logging_dir else config.output_dir / "logs"
        told = [to for name, to in REPORTERS.items() if config.report_to in ("all", name) and parallel.rank() == 0]
        self.reporters = [to(config, logs, start) for to in told]
        for _, close in self.reporters:
            self.callback(close)
        self.bar = self.enter_context(tqdm(total=config.max_train_steps, initial=start, unit="step", desc="training"))

    @parallel.by_first
    def log(self, step: int, values: dict[str, float | None]):  # one optimizer step; a skipped one has no loss
        values = {**values, **in_use(self.device)}
        append(self.folder.metrics, {"step": step, **values})
        for report, _ in self.reporters:
            report(step, {f"train/{name}": value for name, value in values.items() if value is not None}, {})
        shown = {"loss": f"{self.loss(values['loss']):.4f}", "lr": f"{values['lr']:.1e}"}
        shown |= {"memory": f"{values['memory']:.1f}GB"} if "memory" in values else {}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    @parallel.by_first
    def validated(self, step: int):
        """Pass on the numbers and pictures that validation left for a step."""
        self.bar.unpause()  # the time that validation takes is none of the steps'
        if not self.reporters:
            return
        found = {}
        for file in (self.folder.psnr, self.folder.eval):
            for line in (line | (line.get("probe") or {}) for line in read_lines(file) if line["step"] == step):
                found |= {f"validation/{file.stem}/{k}": v for k, v in line.items() if isinstance(v, float)}
        files = {"validation/sheet": self.folder.sheet(step)}
        files |= {f"validation/{file.stem}": file for file in self.folder.validation.glob(f"{step:06d}/*.png")}
        pictures = {name: Image.open(file).convert("RGB") for name, file in files.items() if file.exists()}
        for report, _ in self.reporters:
            report(step, found, pictures)


def to_tensorboard(config: Config, folder: Path, start: int) -> Reporter:
    """An event file in a folder; it makes void what an interrupted run wrote for steps after `start`."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=start + 1)

    def log(step: int, values: dict[str, float], images: dict[str, Image.Image]):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        for name, image in images.items():
            writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    return log, writer.close


def to_wandb(config: Config, folder: Path, start: int) -> Reporter:
    """A run at W&B; a resumed one goes on under the same id. W&B drops steps that it has, and they are the same."""
    import wandb

    file, name = config.output_dir / "wandb-id", config.tracker_run_name or config.output_dir.name
    if not start or not file.exists():
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    names = {"project": config.tracker_project_name, "name": name, "id": file.read_text(encoding="utf-8")}
    run = wandb.init(resume="allow", dir=str(folder), config=config.model_dump(mode="json"), **names)

    def log(step: int, values: dict[str, float], images: dict[str, Image.Image]):
        if values or images:
            run.log(values | {name: wandb.Image(image) for name, image in images.items()}, step=step)

    return log, run.finish


REPORTERS = {"tensorboard": to_tensorboard, "wandb": to_wandb}


def missing(config: Config) -> list[str]:  # one sentence for each library that report_to needs and that is not there
    asked = (name for name in REPORTERS if config.report_to in ("all", name))
    absent = [name for name in asked if not getattr(find_spec(name), "origin", None)]  # a mere folder has none
    return [f"report_to {config.report_to} needs a library: pip install {name}" for name in absent]
