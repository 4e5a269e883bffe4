"""What a model does, in tables (row -> column -> number) and pictures: ablations, a LoRA's parts, the path, drift."""

import math
from collections import defaultdict
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import numpy as np
import torch
from PIL import ImageStat
from PIL.Image import Image
from torch import Tensor

from kontext_min.adapters.inject import muted, updates
from kontext_min.adapters.layers import Adapted
from kontext_min.data.align import shift_between
from kontext_min.encoders import encode_image
from kontext_min.pictures import psnr
from kontext_min.sampler import euler
from kontext_min.study.experiment import Experiment
from kontext_min.study.hooks import Call, record

Table = dict[str, dict[str, float]]


def relative(part: Tensor, whole: Tensor) -> float:
    """||part|| / ||whole||."""
    return float(part.norm() / whole.norm())


def ablate(
    experiment: Experiment, contexts: dict[tuple[str, str], AbstractContextManager]
) -> tuple[Table, Table, dict[str, dict[str, Image]]]:
    """Make the edit as it is, and once within each context, named by (row, column).

    -> how far the finished latents move, ||x - x'|| / ||x||; PSNR of the pictures in dB; the pictures, with "as it is".
    """
    plain = experiment.run()
    before = experiment.picture(plain)
    moved, quality, pictures = defaultdict(dict), defaultdict(dict), defaultdict(dict, {"as it is": {"": before}})
    for (row, column), context in contexts.items():
        with context:
            x = experiment.run()
        moved[row][column] = relative(x - plain, plain)
        pictures[row][column] = experiment.picture(x)
        quality[row][column] = psnr(pictures[row][column], before)
    return moved, quality, pictures


def anatomy(experiment: Experiment) -> tuple[Table, Table, Table]:
    """What a LoRA's updates dW are, by block and module. Raises ValueError when there are none.

    -> ||dW||; its effective rank, e to the entropy of the singular values' shares (Roy and Vetterli 2007);
    ||dW x|| / ||W x|| on all inputs x of a run.
    """
    flux = experiment.flux
    places = [name for name, module in flux.named_modules() if isinstance(module, Adapted)]
    if not places:
        raise ValueError("the model has no LoRA; give one with --lora FILE")

    def energies(call: Call) -> Tensor:  # (updates, 2): of what is added to their rows, and of what is there
        module = flux.get_submodule(call.site)
        there = module.base(*call.inputs).float()
        rows = [slice(update.start, update.start + update.shape[0]) for update in module.updates]
        return torch.stack(
            [torch.stack([part[..., own].square().sum() for part in (call.output - there, there)]) for own in rows]
        )

    with ExitStack() as stack:
        kept = {place: stack.enter_context(record(flux, place, energies, average=True)) for place in places}
        experiment.run()
    norm, rank, effect = defaultdict(dict), defaultdict(dict), defaultdict(dict)
    for place, energy in kept.items():
        block, (values,) = ".".join(place.split(".")[:2]), energy[place].values()
        for update, (added, there) in zip(flux.get_submodule(place).updates, values.tolist(), strict=True):
            singular = torch.linalg.svdvals(update.delta().detach())
            name = ".".join(update.name.split(".")[2:]).removeprefix("attn.") or update.name
            norm[block][name] = float(singular.norm())
            rank[block][name] = math.exp(torch.special.entr(singular / singular.sum()).sum())
            effect[block][name] = math.sqrt(added / there)
    return norm, rank, effect


def path(experiment: Experiment) -> tuple[list[Tensor], Table]:
    """A run step by step: the target as predicted at each, x - t v; and a table over t of the speed, the root mean
    square of v, and of what text, reference and LoRA change in it, ||v - v without|| / ||v||.
    """
    condition, predicted, table = experiment.condition, [], defaultdict(dict)
    field = experiment.field(condition)
    without_text = experiment.field(experiment.conditions[""])
    without_reference = experiment.field(replace(condition, references=[]))

    def watched(*at) -> Tensor:
        v, (x, t, _) = field(*at), at
        without = {"text": without_text(*at), "reference": without_reference(*at)}
        if any(updates(experiment.flux)):
            with muted(experiment.flux):
                without["LoRA"] = field(*at)
        predicted.append(x - t * v)
        column = f"t = {float(t[0]):.2f}"
        table["speed"][column] = float(v.square().mean().sqrt())
        for name, other in without.items():
            table[name][column] = relative(v - other, v)
        return v

    for _ in euler(watched, experiment.noise, experiment.times):
        pass
    return predicted, table


def drift(experiment: Experiment, rounds: int) -> tuple[list[Image], Table]:
    """Apply the edit to the picture, to its result, and so on, each time from the same noise.

    -> the pictures, and beside the first one: PSNR in dB, the shift by phase correlation in pixels with its confidence
    (`data.align`), and the change of the mean red, green and blue, of 255.
    """
    if rounds < 1:
        raise ValueError(f"drift takes 1 round or more, got --rounds {rounds}")
    first, pictures, table = experiment.image, [experiment.image], defaultdict(dict)
    for i in range(rounds):
        latents = encode_image(experiment.vae, pictures[-1]).to(experiment.noise.device)
        image = experiment.picture(experiment.run(replace(experiment.condition, references=[latents])))
        colour = np.subtract(ImageStat.Stat(image).mean, ImageStat.Stat(first).mean)
        numbers = {"PSNR": psnr(image, first), **shift_between(first, image)._asdict()}
        for name, number in (numbers | dict(zip(("red", "green", "blue"), colour, strict=True))).items():
            table[name][f"round {i + 1}"] = float(number)
        pictures.append(image)
    return pictures, table
