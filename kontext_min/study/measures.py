"""What a model does, in numbers: what ablations move, what a LoRA adds where, the path to the picture, drift."""

import math
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import numpy as np
import torch
from PIL import ImageStat
from torch import Tensor

from kontext_min.adapters.inject import muted, updates
from kontext_min.adapters.layers import Adapted
from kontext_min.data.align import shift_between
from kontext_min.encoders import encode_image
from kontext_min.pictures import psnr
from kontext_min.sampler import euler
from kontext_min.study.experiment import Experiment
from kontext_min.study.hooks import Call, record


def relative(part: Tensor, whole: Tensor) -> float:
    """||part|| / ||whole||."""
    return float(part.norm() / whole.norm())


def ablate(experiment: Experiment, contexts: dict[str, AbstractContextManager]) -> dict[str, tuple]:
    """Make the edit as it is, and once within each context.

    -> name -> (||x - x'|| / ||x|| of the finished latents, PSNR of the pictures in dB, the picture)
    """
    plain = experiment.run()
    before, moved = experiment.picture(plain), {}
    for name, context in contexts.items():
        with context:
            x = experiment.run()
        after = experiment.picture(x)
        moved[name] = relative(x - plain, plain), psnr(after, before), after
    return moved


def anatomy(experiment: Experiment) -> dict[str, dict[str, tuple[float, float, float]]]:
    """What a LoRA is: block -> module -> (||dW||, its effective rank, ||dW x|| / ||W x|| on the inputs of a run).

    The effective rank is e to the entropy of the singular values' shares (Roy and Vetterli 2007).
    """
    flux = experiment.flux
    places = [name for name, module in flux.named_modules() if isinstance(module, Adapted)]
    if not places:
        raise ValueError("the model has no LoRA; give one with --lora FILE")

    def energies(call: Call) -> Tensor:
        module, x, found = flux.get_submodule(call.site), call.inputs[0], []
        y = module.base(x)
        for update in module.updates:
            added = update(x)
            there = y[..., update.start : update.start + added.shape[-1]]
            found.append([float(part.float().square().sum()) for part in (added, there)])
        return torch.tensor(found)  # (updates, 2)

    with ExitStack() as stack:
        kept = {place: stack.enter_context(record(flux, place, energies, average=True)) for place in places}
        experiment.run()
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for place, energy in kept.items():
        block, (values,) = ".".join(place.split(".")[:2]), energy[place].values()
        for update, (added, there) in zip(flux.get_submodule(place).updates, values.tolist(), strict=True):
            singular = torch.linalg.svdvals(delta(update))
            rank = math.exp(torch.special.entr(singular / singular.sum()).sum())
            name = ".".join(update.name.split(".")[2:]) or update.name
            found.setdefault(block, {})[name] = float(singular.norm()), rank, math.sqrt(added / there)
    return found


def delta(update):
    return update.scale * update.B.float() @ update.A.float()


def path(experiment: Experiment) -> list[dict]:
    """Every step of a run: t; clean, the target as predicted now, x - t v; speed, the root mean square of v;

    and what text, reference and LoRA change in the velocity, ||v - v without|| / ||v||.
    """
    condition, steps = experiment.condition, []
    field, no_text, no_reference = map(
        experiment.field, (condition, experiment.conditions[""], replace(condition, references=[]))
    )

    def watched(x: Tensor, t: Tensor, progress: float) -> Tensor:
        v = field(x, t, progress)
        without = {"text": no_text(x, t, progress), "reference": no_reference(x, t, progress)}
        if any(updates(experiment.flux)):
            with muted(experiment.flux):
                without["LoRA"] = field(x, t, progress)
        changes = {name: relative(v - other, v) for name, other in without.items()}
        steps.append({"t": float(t[0]), "clean": x - t * v, "speed": float(v.square().mean().sqrt()), **changes})
        return v

    for _ in euler(watched, experiment.noise, experiment.times):
        pass
    return steps


def drift(experiment: Experiment, rounds: int) -> list[dict]:
    """Apply the edit to the picture, to its result, and so on, each time from the same noise.

    -> of every round its picture, and beside the first one: shift (`align.Shift`), PSNR, and the change of the mean
    colour, (red, green, blue) of 255.
    """
    first, image, found = experiment.image, experiment.image, []
    for _ in range(rounds):
        latents = encode_image(experiment.editor.vae, image).to(experiment.noise.device)
        image = experiment.picture(experiment.run(replace(experiment.condition, references=[latents])))
        colour = np.subtract(ImageStat.Stat(image).mean, ImageStat.Stat(first).mean).tolist()
        found.append(
            {"picture": image, "shift": shift_between(first, image), "psnr": psnr(image, first), "colour": colour}
        )
    return found
