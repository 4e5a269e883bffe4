"""One run: going on from a checkpoint, what is due after which step, and stopping without losing anything."""

import json
import shlex
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Event

import json5
import torch
from torch import nn
from tqdm import tqdm

from kontext_min import parallel, presets
from kontext_min.adapters.inject import updates
from kontext_min.adapters.write import write_adapter
from kontext_min.checkpoints.save import save_trained
from kontext_min.config import Config
from kontext_min.data.examples import Examples, use_of
from kontext_min.quantize import form_of
from kontext_min.run_folder import LORA, RunFolder, read_lines
from kontext_min.training import state
from kontext_min.training.evaluate import Evaluator
from kontext_min.training.items import Item, pair_item
from kontext_min.training.optim import EMA
from kontext_min.training.plan import Forecast
from kontext_min.training.track import Tracker
from kontext_min.training.trainer import train
from kontext_min.training.validate import Validator


class Run:
    """Trains, and leaves in output_dir what `run_folder` lists."""

    def __init__(self, config: Config, examples: Examples, validator: Validator, evaluator: Evaluator, seen: Forecast):
        self.config, self.flux, self.examples = config, validator.editor.flux, examples
        self.validator, self.evaluator, self.forecast = validator, evaluator, seen
        self.folder = RunFolder(config.output_dir)
        self.trained = self.folder.lora if config.model_type == "lora" else self.folder.model
        first = min(examples.examples, key=lambda example: example.regularise)  # rather one of what is taught
        first = pair_item(config, use_of(0, first, examples.mix.complete(), epoch=0), None)
        self.recipe = recipe(config, (validator.items or [first])[0])
        self.identity, self.interrupted = state.identity(config, examples), Event()

    def go(self, optimizer: torch.optim.Optimizer) -> str:
        """Train from the beginning or from a checkpoint to the end or to an interruption. -> what to say at last."""
        config, start = self.config, self.resume(optimizer)
        unwritten, *unseen = owed = self.owed()
        if start >= config.max_train_steps and not any(owed):
            return f"max_train_steps {config.max_train_steps} is already reached; nothing to do"
        if config.validation_on_startup and config.model_type == "lora":
            self.validator.prepare()
        parallel.by_first(self.folder.config.write_text)(config.record(), encoding="utf-8")
        if aside := parallel.by_first(self.folder.rewind)(start):  # logs end where it goes on
            print(f"checkpoints and pictures after step {start} were moved to {aside}")
        parallel.wait()
        skipped = sum("skipped" in line for line in read_lines(self.folder.metrics))
        with Tracker(config, parallel.place(self.flux), start) as self.tracker:
            if unwritten:
                self.write(start)
            if any(unseen):
                self.look(start, *unseen)
            try:
                for step, values in train(config, self.validator.editor, optimizer, self.examples, start, skipped):
                    self.tracker.log(step, values)
                    if self.each_step(step):
                        break
            except (ValueError, OSError, torch.OutOfMemoryError) as error:
                raise ValueError(self.what_is_left(error)) from error
        if config.model_type == "lora":
            parallel.by_first(write_card)(config, {**self.recipe, "trained_steps": self.done}, self.examples)
        stopped = f"stopped; {self.trained} is what is trained so far; go on with resume_from_checkpoint=latest"
        left = (self.trained, self.folder.average, self.folder.sheet(self.done))
        return stopped if self.interrupted.is_set() else "\n".join(str(file) for file in left if file.exists())

    def resume(self, optimizer: torch.optim.Optimizer) -> int:
        """Bring all that is trained to the checkpoint to go on from, if there is one. -> its step, or 0."""
        config, parameters = self.config, [p for group in optimizer.param_groups for p in group["params"]]
        self.ema = EMA(parameters, config.ema_decay) if config.use_ema else None
        parts = {"adapter": nn.ModuleList(updates(self.flux)), "optimizer": optimizer}
        parts |= {"ema": self.ema} if self.ema else {}
        self.kept = parallel.Shards(self.flux, optimizer) if config.model_type == "full" else state.Parts(parts)
        self.done = self.start = 0
        signal.signal(signal.SIGINT, self.told)
        signal.signal(signal.SIGTERM, self.told)
        if config.model_type == "full":  # later there is no base
            self.validator.prepare()
        if path := state.chosen(config):
            self.done = self.start = state.restore(path, self.kept, self.identity, config.allow_changed_resume)
            for group in optimizer.param_groups:  # the checkpoint has brought its own settings; setup is optimi's state
                group.update({key: value for key, value in optimizer.defaults.items() if key not in ("lr", "setup")})
            print(f"going on from {path}, after step {self.start}")
        return self.start

    def owed(self) -> list[bool]:  # what to write, show, measure first: what a run that died here has not left
        folder, end = self.folder, self.done >= self.config.max_train_steps
        written = self.trained.exists() and (folder.card.exists() or self.config.model_type == "full")
        shown = folder.sheet(self.done).exists() or not (self.validator.items and self.done)
        measured = any(line["step"] == self.done for line in read_lines(folder.eval)) or not self.evaluator.uses
        show, measure = self.dues(self.done)
        return parallel.gathered([end and not written, show and not shown, measure and not measured])[0]

    def dues(self, step: int) -> tuple[bool, bool]:  # whether pictures and the eval loss are due after a step
        config, end = self.config, step >= self.config.max_train_steps
        interval = config.validation_steps if config.eval_steps_interval is None else config.eval_steps_interval
        return end or due(step, config.validation_steps), not step or end or due(step, interval)

    def what_is_left(self, error: Exception) -> str:
        last = state.last(self.folder.path)
        if isinstance(error, torch.OutOfMemoryError):
            return f"step {self.done + 1} needs more memory than there is: {self.forecast.remedies()}\n{last}"
        if self.config.model_type == "full" or isinstance(error, OSError):
            return f"{error}\n{last}"
        self.write(self.done)
        return f"{error}\n{last}; {self.trained} is the LoRA so far"

    def each_step(self, step: int) -> bool:
        """After the n-th step, counted from 1: what is due. -> whether to stop."""
        if parallel.total(self.interrupted.is_set()):  # on any rank
            self.interrupted.set()
        self.done, config, stop = step, self.config, self.interrupted.is_set()
        if step == self.start + 10 and self.forecast.cuda and not parallel.rank():  # elsewhere memory is of all
            tqdm.write(self.forecast.beside(read_lines(self.folder.metrics)[-9:]))
        if self.ema and due(step, config.ema_update_interval):
            self.ema.update()
        shown, measured = self.dues(step)
        if stop or shown:
            self.write(step)  # before the checkpoint, from which a run would not come back to it
        if stop or step == config.max_train_steps or due(step, config.checkpointing_steps):
            state.save(self.folder.path, step, self.kept, self.identity, config.checkpoints_total_limit)
        if shown or measured:
            self.look(step, shown, measured)
        return stop

    def look(self, step: int, shown: bool, measured: bool):
        self.flux.eval()
        with self.ema.applied() if self.ema and self.config.ema_validation == "ema_only" else nullcontext():
            said = [self.validator.run(step) if shown else "", self.evaluator.run(step) if measured else ""]
        self.flux.train()
        if any(said):
            tqdm.write("\n".join(filter(None, said)))
            self.tracker.validated(step)

    def write(self, step: int):
        if self.config.model_type == "full":
            return save_trained(self.flux, self.examples.checkpoint, self.folder.model, self.examples.dtype)
        recipe, dtype, adapter = {**self.recipe, "trained_steps": step}, self.examples.dtype, list(updates(self.flux))
        form = "lycoris" if self.config.lycoris_config else self.config.lora_format.replace("comfyui", "comfy")
        parallel.by_first(write_adapter)(self.folder.lora, adapter, recipe, dtype, form)
        if self.ema:
            recipe["ema"] = True
            with self.ema.applied():
                parallel.by_first(write_adapter)(self.folder.average, adapter, recipe, dtype, form)

    def told(self, *_):  # Ctrl-C and SIGTERM let the step in hand finish; a second Ctrl-C stops at once
        self.interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def recipe(config: Config, shown: Item) -> dict:
    """What infer.py needs to show this LoRA with no other argument than its file; references are copied beside it."""
    files, model = [], config.pretrained_model_name_or_path
    kind = {"lora_type", "lora_rank", "use_dora", "lycoris_config", "flux_lora_target"} - config.idle
    for i, view in enumerate(shown.references, 1):
        files.append(config.output_dir.resolve() / f"sample-reference-{i}.png")
        parallel.by_first(view.open().save)(files[-1])
    return {
        "title": config.output_dir.name, "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "prompt": [shown.prompt], "negative_prompt": shown.negative, "cfg_scale": config.validation_guidance_real,
        "image": [*map(str, files)], "guidance": config.validation_guidance,
        "steps": config.validation_num_inference_steps, "seed": shown.seed, "size": str(shown.size),
        "reference_size": "keep",  # the copies have the size in which the model saw them
        "precision": form_of(config.base_model_precision) or ("bf16" if config.mixed_precision == "bf16" else "fp32"),
        "base_model_precision": config.base_model_precision, **config.model_dump(mode="json", include=kind),
    }  # fmt: skip


LICENCES, NO_DIFFUSERS = json5.loads(Path(__file__).with_name("card.json5").read_text("utf-8")).values()
CARD, DIFFUSERS = (Path(__file__).with_name(name).read_text("utf-8") for name in ("card.md", "card_diffusers.md"))
quoted = partial(json.dumps, ensure_ascii=False)  # as a Python string


def write_card(config: Config, recipe: dict, examples: Examples):
    """README.md beside the LoRA; recipe: what the LoRA's header holds."""
    folder, model, prompt = RunFolder(config.output_dir), config.pretrained_model_name_or_path, recipe["prompt"][0]
    sheet, pairs = folder.sheet(recipe["trained_steps"]), sum(bool(e.references) for e in examples.examples)
    places, (width, height) = {"data_backend_config", "output_dir", "cache_dir"}, recipe["size"].split("x")
    values = recipe | {
        "kind": "LoKr" if config.lycoris_config else "DoRA" if config.use_dora else "LoRA", "lora": LORA,
        "model": model, "licence": "\n".join(LICENCES.get(Path(model).name, [])),
        "pairs": pairs, "alone": len(examples.examples) - pairs,
        "base": quoted("weights/nano" if model == "nano" else model),  # a folder of kontext_min's repository
        "dtype": "float32" if recipe["precision"] == "fp32" else "bfloat16", "width": width, "height": height,
        "picture": f"load_image({quoted(Path(recipe['image'][0]).name)})" if recipe["image"] else None,
        "tokens": presets.preset_of(examples.checkpoint.folder).text_shape[0],
        "instruction": quoted(prompt), "argument": shlex.quote(prompt),
        "sheet": f"\n![input, base, LoRA, target](validation/{sheet.name})\n" if sheet.exists() else "",
        "settings": config.model_dump_json(indent=2, exclude_unset=True, exclude=places),
    }  # fmt: skip
    values["diffusers"] = (NO_DIFFUSERS if config.lycoris_config else DIFFUSERS).format(**values)
    folder.card.write_text(CARD.format(**values), encoding="utf-8")
