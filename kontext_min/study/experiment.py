"""One edit that can be made again and again, from the same noise at the same times: measured, and shown on a page."""

import html
import math
from collections import defaultdict
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageStat
from torch import Tensor

from kontext_min import flow, presets, sampler
from kontext_min.adapters.inject import muted, updates
from kontext_min.adapters.layers import Adapted
from kontext_min.adapters.merge import svd
from kontext_min.adapters.read import read_adapter, split_lora
from kontext_min.checkpoints.load import find
from kontext_min.compare import card, page, psnr, shift_between
from kontext_min.data.buckets import Size, fit, open_image
from kontext_min.edit import PLAIN, open_editor, output_size
from kontext_min.encoders import decode_image, encode_image
from kontext_min.models.flux import Flux
from kontext_min.models.tokenizers import Tokenizer, t5_tokenizer
from kontext_min.models.vae import VAE
from kontext_min.study.hooks import Call, average

Table = dict[str, dict[str, float]]  # row -> column -> number
HEAT = {"black": "#1b0c41", "mid": "#d44842", "white": "#f9f871"}  # of an overlay: from 0 to the largest
PALE, DARK = (250, 247, 238), (226, 122, 63)  # of a table's cells
STYLE = "body{margin:32px;font:16px/1.5 sans-serif;color:#222}p{color:#555;margin:4px 0 8px}h2{margin:40px 0 0}"


@dataclass(frozen=True)
class Experiment:
    """A model and what it is given: an instruction and a reference of the output's size."""

    flux: Flux  # its modules are the sites
    vae: VAE
    image: Image.Image  # the reference as the model sees it
    conditions: dict[str, flow.Condition]  # of every instruction, the one that is studied first, and of "", none
    words: dict[str, slice]  # of the first instruction: their tokens
    noise: Tensor  # (1, 16, h, w)
    times: Tensor  # (steps + 1,), falling
    guidance: float

    @classmethod
    def open(cls, image, *prompts, model="nano", lora=None, size="auto", steps=8, guidance=2.5, seed=0, base=PLAIN):
        """Load a picture, a model, a LoRA (FILE or FILE:0.5). size: of both pictures, or auto; base: of open_editor."""
        if not prompts or not all(map(str.strip, prompts)) or steps < 1 or not 0 <= seed < 2**63:
            raise ValueError("nothing to study: it takes an instruction, 1 step or more, and a seed of 0 or more")
        picture, named = open_image(Path(image)), [split_lora(str(lora))] if lora else []
        loras = [(read_adapter(file), strength) for file, strength in named]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        editor, texts = open_editor(model, loras, [*prompts, ""], device, dtype, base)
        picture = fit(picture, output_size([Size(*picture.size)], size, "auto", editor.preset))
        latents = encode_image(editor.vae, picture).to(device)
        conditions = {text: flow.Condition(*encoded, [latents]) for text, encoded in texts.items()}
        words = word_slices(t5_tokenizer(find(presets.locate(model)).folder / "tokenizer_2"), prompts[0])
        noise = flow.draw_noise(latents.shape, torch.Generator().manual_seed(seed)).to(device)
        times = flow.schedule(steps, flow.token_count(*noise.shape[-2:]), editor.shift)
        return cls(editor.flux, editor.vae, picture, conditions, words, noise, times, guidance)

    @property
    def condition(self) -> flow.Condition:
        return next(iter(self.conditions.values()))

    @property
    def grid(self) -> tuple[int, int]:  # rows and columns of the target's tokens, and of the reference's
        return self.noise.shape[-2] // 2, self.noise.shape[-1] // 2

    @property
    def streams(self) -> dict[str, slice]:  # where text, target and reference lie in the joint sequence
        text, tokens = self.condition.txt.shape[1], self.grid[0] * self.grid[1]
        target, reference = slice(text, text + tokens), slice(text + tokens, text + 2 * tokens)
        return {"text": slice(0, text), "target": target, "reference": reference}

    def field(self, condition: flow.Condition) -> sampler.Field:
        return sampler.guided(self.flux, condition, None, sampler.Sampling(guidance=self.guidance))

    def run(self, condition: flow.Condition | None = None) -> Tensor:  # the finished latents, (1, 16, h, w)
        *_, x = sampler.euler(self.field(condition or self.condition), self.noise, self.times)
        return x

    def picture(self, latents: Tensor) -> Image.Image:
        return decode_image(self.vae, latents)


def word_slices(tokenizer: Tokenizer, prompt: str) -> dict[str, slice]:
    """Every word of an instruction -> its T5 tokens; a word that comes again has its place behind it."""
    words, slices, start = prompt.split(), {}, 0
    for i, word in enumerate(words, 1):
        end = min(len(tokenizer.encode(" ".join(words[:i]))), tokenizer.length - 1)
        if end > start:
            slices[f"{word} ({i})" if word in slices else word] = slice(start, end)
        start = end
    return slices


def ablation(experiment: Experiment, contexts: dict[tuple[str, str], AbstractContextManager]) -> tuple[Table, ...]:
    """Make the edit as it is, and once within each context, named by (row, column).
    -> how far the finished latents move, ||x - x'|| / ||x||; PSNR of the pictures in dB; the pictures, with "as it is".
    """
    plain = experiment.run()
    before = experiment.picture(plain)
    moved, quality, pictures = defaultdict(dict), defaultdict(dict), defaultdict(dict, {"as it is": {"": before}})
    for (row, column), context in contexts.items():
        with context:
            x = experiment.run()
        moved[row][column] = float((x - plain).norm() / plain.norm())
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
        module, (x,) = flux.get_submodule(call.site), call.inputs
        there = module.base(x)
        parts = module.change(x, {}, there).float(), there.float()
        return torch.tensor([[float(part[..., u.rows].square().sum()) for part in parts] for u in module.updates])

    with ExitStack() as stack:
        means = [stack.enter_context(average(flux, place, energies)) for place in places]
        experiment.run()
    norm, rank, effect = defaultdict(dict), defaultdict(dict), defaultdict(dict)
    for place, mean in zip(places, means, strict=True):
        block = ".".join(place.split(".")[:2])
        for update, (added, there) in zip(flux.get_submodule(place).updates, mean[place].tolist(), strict=True):
            singular = svd(update, 0)[1].detach()
            share = singular / singular.sum().clamp(min=1e-30)
            name = ".".join(update.name.split(".")[2:]).removeprefix("attn.") or update.name
            norm[block][name] = float(singular.norm())
            rank[block][name] = math.exp(torch.special.entr(share).sum())
            effect[block][name] = math.sqrt(added / there)
    return norm, rank, effect


def follow(experiment: Experiment) -> tuple[list[Tensor], Table]:
    """A run step by step: the target as predicted at each, x - t v; and a table over t of the speed, the root mean
    square of v, and of what text, reference and LoRA change in it, ||v - v without|| / ||v||.
    """
    predicted, table, field = [], defaultdict(dict), experiment.field(experiment.condition)
    less = {"text": experiment.conditions[""], "reference": replace(experiment.condition, references=[])}
    without = {name: experiment.field(condition) for name, condition in less.items()}
    if any(updates(experiment.flux)):
        without["LoRA"] = muted(experiment.flux)(field)  # the same field, within the context

    def watched(x: Tensor, t: Tensor, progress: float) -> Tensor:
        v, column = field(x, t, progress), f"t = {float(t[0]):.3f}"
        predicted.append(x - t * v)
        table["speed"][column] = float(v.square().mean().sqrt())
        for name, other in without.items():
            table[name][column] = float((v - other(x, t, progress)).norm() / v.norm())
        return v

    for _ in sampler.euler(watched, experiment.noise, experiment.times):
        pass
    return predicted, table


def repeat(experiment: Experiment, rounds: int) -> tuple[list[Image.Image], Table]:
    """Apply the edit to the picture, to its result, and so on, each time from the same noise.
    -> the pictures, and beside the first one: PSNR in dB, the shift by phase correlation in pixels with its confidence
    (`compare`), and the change of the mean red, green and blue, of 255.
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


def overlay(image: Image.Image, values: Tensor) -> Image.Image:
    """Values of 0 or more, (rows, columns), as colours over a greyed picture; the brightest is the largest of them."""
    scaled = (values.float() / values.max() * 255).round().byte().cpu().numpy()
    heat = ImageOps.colorize(Image.fromarray(scaled).resize(image.size, Image.Resampling.BICUBIC), **HEAT)
    return Image.blend(image.convert("L").convert("RGB"), heat, 0.6)


def rows_of(pictures: dict[str, dict[str, Image.Image]]) -> Image.Image:
    """Row -> label -> picture as a sheet; large ones are shown small."""
    return page([card([row], list(cells.items()), side=200, shrink=True) for row, cells in pictures.items()])


def heat_map(values: Table, form: str = "{:.2f}", by_row: bool = False) -> Image.Image:
    """Row -> column -> value as a table, a cell the darker the larger its value among all (or in its row)."""
    font, columns = ImageFont.load_default(13), list(dict.fromkeys(name for row in values.values() for name in row))
    left, *widths = (int(max(map(font.getlength, names))) + 14 for names in (values, *((c, "00.00") for c in columns)))
    places = dict(zip(columns, accumulate([left, *widths[:-1]]), strict=True))
    made = Image.new("RGB", (left + sum(widths) + 8, 24 * len(values) + 32), "white")
    pen = ImageDraw.Draw(made)
    for name, width in zip(columns, widths, strict=True):
        pen.text((places[name] + width / 2, 14), name, "gray", font, anchor="mm")
    for i, (row, cells) in enumerate(values.items()):
        pen.text((left - 8, 38 + 24 * i), row, "gray", font, anchor="rm")
        among = [v for line in ([cells] if by_row else values.values()) for v in line.values()]
        for name, value in cells.items():
            x, y, width = places[name], 26 + 24 * i, widths[columns.index(name)]
            share = (value - min(among)) / ((max(among) - min(among)) or 1)
            colour = tuple(round(a + (b - a) * share) for a, b in zip(PALE, DARK, strict=True))
            pen.rectangle((x, y, x + width - 2, y + 22), colour)
            pen.text((x + width / 2, y + 12), form.format(value), "black", font, anchor="mm")
    return made


def write_page(folder: Path, title: str, about: str, sections: list[tuple[str, str, Image.Image]]) -> Path:
    """Sections (name, caption, picture) -> NAME.png of each, and index.html that shows them all."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"]
    parts += [f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>"]
    for name, caption, picture in sections:
        picture.save(folder / f"{name}.png")
        parts.append(f"<h2>{html.escape(name)}</h2><p>{html.escape(caption)}</p><img src='{name}.png'>")
    (folder / "index.html").write_text("\n".join(parts), encoding="utf-8")
    return folder / "index.html"
