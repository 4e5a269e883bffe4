"""One run and its folder: what is written when, going on from a checkpoint, and stopping without losing anything."""

import signal
from contextlib import nullcontext
from pathlib import Path
from threading import Event

import torch
from tqdm import tqdm

from kontext_min import flow
from kontext_min.adapters.formats import write_lora
from kontext_min.adapters.inject import updates
from kontext_min.config import Config
from kontext_min.data.examples import Examples, use_of
from kontext_min.models.flux import Flux
from kontext_min.training import state
from kontext_min.training.card import write_card
from kontext_min.training.ema import EMA
from kontext_min.training.evaluate import Evaluator
from kontext_min.training.items import Item, pair_item
from kontext_min.training.trainer import train
from kontext_min.training.validate import Validator

LORA_FILE = "pytorch_lora_weights.safetensors"


class Run:
    """Trains, and leaves the LoRA, checkpoints and validation pictures in output_dir."""

    def __init__(self, config: Config, flux: Flux, examples: Examples, validator: Validator, evaluator: Evaluator):
        self.config, self.flux, self.examples = config, flux, examples
        self.validator, self.evaluator = validator, evaluator
        self.file, self.ema_file = config.output_dir / LORA_FILE, config.output_dir / "ema" / LORA_FILE
        first = pair_item(config, use_of(0, examples.examples[0], examples.mix.complete(), epoch=0), False)
        self.recipe = recipe(config, (validator.items or [first])[0])
        self.identity = state.identity(config, examples)
        self.interrupted = Event()

    def go(self, optimizer: torch.optim.Optimizer, shift: flow.Shift) -> str:
        """Train from the beginning or from a checkpoint to the end or to an interruption. -> what to say at last."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.ema = EMA(parameters, self.config.ema_decay) if self.config.use_ema else None
        self.parts = {"optimizer": optimizer} | ({"ema": self.ema} if self.ema else {})
        self.done = 0
        start, path = 0, state.chosen(self.config)
        if path is not None:
            start = state.restore(path, self.flux, self.parts, self.identity, self.config.allow_changed_resume)
            print(f"going on from {path}, after step {start}")
            self.done = start
        text = self.config.model_dump_json(indent=2, exclude={"ignored"})
        (self.config.output_dir / "config.json").write_text(text + "\n", encoding="utf-8")
        if start >= self.config.max_train_steps:
            return f"max_train_steps {self.config.max_train_steps} is already reached; nothing to do"
        if not start:
            self.validator.begin()
        self.stop_when_told()
        if self.config.validation_on_startup:
            self.validator.prepare()
        if not start:
            self.look(0)
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
        left = [self.file] + [self.ema_file] * self.config.use_ema + [picture] * picture.exists()
        return "\n".join(map(str, left))

    def each_step(self, step: int) -> bool:
        """After the n-th step, counted from 1: what is due. -> whether to stop."""
        self.done = step
        if self.ema and due(step, self.config.ema_update_interval):
            self.ema.update()
        last, stop = step == self.config.max_train_steps, self.interrupted.is_set()
        if last or stop or due(step, self.config.checkpointing_steps):
            limit = self.config.checkpoints_total_limit
            state.save(self.config.output_dir, step, self.flux, self.parts, self.identity, limit)
        if last or stop or due(step, self.config.validation_steps):
            self.write(step)
        self.look(step)
        return stop

    def look(self, step: int):
        """The pictures and the eval loss that are due after a step; 0 is the base model's loss."""
        last, interval = step == self.config.max_train_steps, self.config.eval_steps_interval
        interval = self.config.validation_steps if interval is None else interval
        self.flux.eval()
        with self.ema.applied() if self.ema and self.config.ema_validation == "ema_only" else nullcontext():
            if last or step and due(step, self.config.validation_steps):
                tqdm.write(self.validator.run(step))
            if (last or step == 0 or due(step, interval)) and (text := self.evaluator.run(step)):
                tqdm.write(text)
        self.flux.train()

    def write(self, step: int):
        """The LoRA as it is after a step, in the dtype of the computation, and its average if there is one."""
        recipe = {**self.recipe, "trained_steps": step}
        write_lora(self.file, list(updates(self.flux)), recipe, self.examples.dtype)
        if self.ema:
            self.ema_file.parent.mkdir(exist_ok=True)
            with self.ema.applied():
                write_lora(self.ema_file, list(updates(self.flux)), {**recipe, "ema": True}, self.examples.dtype)

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


def recipe(config: Config, shown: Item) -> dict:
    """What infer.py needs to show this LoRA with no other argument than its file; references are copied beside it."""
    files, model = [], config.pretrained_model_name_or_path
    for i, view in enumerate(shown.references):
        files.append(config.output_dir / f"sample-reference-{i + 1}.png")
        view.open().save(files[-1])
    return {
        "title": config.output_dir.name,
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "prompt": [shown.prompt],
        "negative_prompt": shown.negative,
        "cfg_scale": config.validation_guidance_real,
        "image": [str(file.resolve()) for file in files],
        "guidance": config.validation_guidance,
        "steps": config.validation_num_inference_steps,
        "seed": shown.seed,
        "size": str(shown.size),
        "reference_size": "keep",  # the copies have the size in which the model saw them
        "precision": "bf16" if config.mixed_precision == "bf16" else "fp32",
        "base_model_precision": config.base_model_precision,
        "lora_rank": config.lora_rank,
        "flux_lora_target": config.flux_lora_target,
    }
