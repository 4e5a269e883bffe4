"""One run and its folder: what is written when, going on from a checkpoint, and stopping without losing anything."""

import signal
from threading import Event

import torch
from tqdm import tqdm

from kontext_min import flow
from kontext_min.adapters.formats import write_lora
from kontext_min.adapters.inject import updates
from kontext_min.config import Config
from kontext_min.data.examples import Examples, Use
from kontext_min.models.flux import Flux
from kontext_min.training import state
from kontext_min.training.trainer import train
from kontext_min.training.validate import Validator

LORA_FILE = "pytorch_lora_weights.safetensors"


class Run:
    """Trains, and leaves the LoRA, checkpoints and validation pictures in output_dir."""

    def __init__(self, config: Config, flux: Flux, examples: Examples, validator: Validator):
        self.config, self.flux, self.examples, self.validator = config, flux, examples, validator
        self.file = config.output_dir / LORA_FILE
        self.recipe = recipe(config, (validator.uses or examples.uses(0))[0])
        self.identity = state.identity(config, examples)
        self.interrupted = Event()

    def go(self, optimizer: torch.optim.Optimizer, shift: flow.Shift) -> str:
        """Train from the beginning or from a checkpoint to the end or to an interruption. -> what to say at last."""
        self.optimizer = optimizer
        start, path = 0, state.chosen(self.config)
        if path is not None:
            start = state.restore(path, self.flux, optimizer, self.identity, self.config.allow_changed_resume)
            print(f"going on from {path}, after step {start}")
        if start >= self.config.max_train_steps:
            return f"max_train_steps {self.config.max_train_steps} is already reached; nothing to do"
        if not start:
            self.validator.begin()
        self.stop_when_told()
        try:
            train(self.config, self.flux, optimizer, self.examples, shift, start, self.each_step)
        except ValueError:  # nothing is lost: the LoRA as it was before the step that failed
            self.write()
            print(f"stopped; the LoRA so far is in {self.file}")
            raise
        if self.interrupted.is_set():
            return f"stopped; {self.file} is the LoRA so far; go on with resume_from_checkpoint=latest"
        return f"{self.file}\n{self.validator.folder}/{self.config.max_train_steps:06d}.png"

    def each_step(self, step: int) -> bool:
        """After the n-th step, counted from 1: what is due. -> whether to stop."""
        last, stop = step == self.config.max_train_steps, self.interrupted.is_set()
        if last or stop or due(step, self.config.checkpointing_steps):
            limit = self.config.checkpoints_total_limit
            state.save(self.config.output_dir, step, self.flux, self.optimizer, self.identity, limit)
        if last or stop or due(step, self.config.validation_steps):
            self.write()
        if last or due(step, self.config.validation_steps):
            tqdm.write(self.validator.run(step))
        return stop

    def write(self):
        """The LoRA as it is now, in the dtype of the computation."""
        write_lora(self.file, list(updates(self.flux)), self.recipe, self.examples.dtype)

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
    files = []
    for i, view in enumerate(shown.references):
        files.append(config.output_dir / f"sample-reference-{i + 1}.png")
        view.open().save(files[-1])
    return {
        "title": config.output_dir.name,
        "model": config.pretrained_model_name_or_path,
        "prompt": [shown.caption],
        "image": [str(file.resolve()) for file in files],
        "guidance": config.validation_guidance,
        "steps": config.validation_num_inference_steps,
        "trained_steps": config.max_train_steps,
        "lora_rank": config.lora_rank,
        "flux_lora_target": config.flux_lora_target,
    }
