"""One run and its folder: what is written when, going on from a checkpoint, and stopping without losing anything."""

import signal
from dataclasses import replace
from pathlib import Path
from threading import Event

import torch
from tqdm import tqdm

from kontext_min import flow
from kontext_min.adapters.formats import write_lora
from kontext_min.adapters.inject import updates
from kontext_min.config import Config
from kontext_min.data.examples import Examples, Use, use_of
from kontext_min.models.flux import Flux
from kontext_min.training import state
from kontext_min.training.card import write_card
from kontext_min.training.trainer import train
from kontext_min.training.validate import Validator

LORA_FILE = "pytorch_lora_weights.safetensors"


class Run:
    """Trains, and leaves the LoRA, checkpoints and validation pictures in output_dir."""

    def __init__(self, config: Config, flux: Flux, examples: Examples, validator: Validator):
        self.config, self.flux, self.examples, self.validator = config, flux, examples, validator
        self.file = config.output_dir / LORA_FILE
        first = use_of(0, examples.examples[0], replace(examples.mix, caption_dropout=0, reference_dropout=0), epoch=0)
        self.recipe = recipe(config, (validator.uses or [first])[0])
        self.identity = state.identity(config, examples)
        self.interrupted = Event()

    def go(self, optimizer: torch.optim.Optimizer, shift: flow.Shift) -> str:
        """Train from the beginning or from a checkpoint to the end or to an interruption. -> what to say at last."""
        self.optimizer = optimizer
        self.done = 0
        start, path = 0, state.chosen(self.config)
        if path is not None:
            start = state.restore(path, self.flux, optimizer, self.identity, self.config.allow_changed_resume)
            print(f"going on from {path}, after step {start}")
            self.done = start
        text = self.config.model_dump_json(indent=2, exclude={"ignored"})
        (self.config.output_dir / "config.json").write_text(text + "\n", encoding="utf-8")
        if start >= self.config.max_train_steps:
            return f"max_train_steps {self.config.max_train_steps} is already reached; nothing to do"
        if not start:
            self.validator.begin()
        self.stop_when_told()
        try:
            train(self.config, self.flux, optimizer, self.examples, shift, start, self.each_step)
        except ValueError:  # nothing is lost: the LoRA as it was before the step that failed
            self.write(self.done)
            print(f"stopped; the LoRA so far is in {self.file}")
            raise
        write_card(self.config, {**self.recipe, "trained_steps": self.done}, self.examples)
        if self.interrupted.is_set():
            return f"stopped; {self.file} is the LoRA so far; go on with resume_from_checkpoint=latest"
        picture = self.validator.folder / f"{self.config.max_train_steps:06d}.png"
        return f"{self.file}\n{picture}" if picture.exists() else str(self.file)

    def each_step(self, step: int) -> bool:
        """After the n-th step, counted from 1: what is due. -> whether to stop."""
        self.done = step
        last, stop = step == self.config.max_train_steps, self.interrupted.is_set()
        if last or stop or due(step, self.config.checkpointing_steps):
            limit = self.config.checkpoints_total_limit
            state.save(self.config.output_dir, step, self.flux, self.optimizer, self.identity, limit)
        if last or stop or due(step, self.config.validation_steps):
            self.write(step)
        if last or due(step, self.config.validation_steps):
            tqdm.write(self.validator.run(step))
        return stop

    def write(self, step: int):
        """The LoRA as it is after a step, in the dtype of the computation."""
        recipe = {**self.recipe, "trained_steps": step}
        write_lora(self.file, list(updates(self.flux)), recipe, self.examples.dtype)

    def stop_when_told(self):
        """Ctrl-C and SIGTERM let the step in hand finish; a second Ctrl-C stops at once."""

        def handle(number: int, frame):
            self.interrupted.set()
            signal.signal(signal.SIGINT, signal.default_int_handler)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps happens now; 0 is never."""
    return interval > 0 and step % interval == 0


def recipe(config: Config, shown: Use) -> dict:
    """What infer.py needs to show this LoRA with no other argument than its file; references are copied beside it."""
    files, model = [], config.pretrained_model_name_or_path
    for i, view in enumerate(shown.references):
        files.append(config.output_dir / f"sample-reference-{i + 1}.png")
        view.open().save(files[-1])
    return {
        "title": config.output_dir.name,
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "prompt": [shown.caption],
        "image": [str(file.resolve()) for file in files],
        "guidance": config.validation_guidance,
        "steps": config.validation_num_inference_steps,
        "seed": config.validation_seed,
        "size": str(shown.target.size),
        "reference_size": "keep",  # the copies have the size in which the model saw them
        "precision": "bf16" if config.mixed_precision == "bf16" else "fp32",
        "base_model_precision": config.base_model_precision,
        "lora_rank": config.lora_rank,
        "flux_lora_target": config.flux_lora_target,
    }
