"""Pictures of what the model does with one edit: python -m kontext_min.study COMMAND --image FILE --prompt TEXT

attention  where the pictures look at which word, and who looks at whom
ablate     how far the result moves without a block, a head, the reference for some steps, or the LoRA in a block
lora       how large a LoRA is, of what rank, and what it does, by block
path       the picture as predicted at every step, and what text, reference and LoRA do to the velocity
drift      the edit applied to its own result, again and again
"""

import argparse
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kontext_min.adapters.inject import muted, updates
from kontext_min.pictures import sheet
from kontext_min.study import hooks, measures
from kontext_min.study.experiment import Experiment
from kontext_min.study.pictures import heat_map, overlay, write_page

Sections = list[tuple[str, str, Image.Image]]  # name, caption, picture
THUMBNAIL = 192  # pixels of a small picture's longer side


def small(image: Image.Image) -> Image.Image:
    """A picture of which many are shown."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def attention(experiment: Experiment, args: argparse.Namespace) -> Sections:
    """Maps of every word, of one word by block, step and head, and the shares of the three streams."""
    words, streams = experiment.words, experiment.streams
    word = args.word or max(words, key=len)
    if word not in words:
        raise ValueError(f"--word {word}: the instruction has {', '.join(words)}")
    read = slice(max(tokens.stop for tokens in words.values()))
    with ExitStack() as stack:

        def keep(what, average: bool = False):
            return stack.enter_context(hooks.record(experiment.flux, f"{args.block}.attend", what, average=average))

        shares = {name: keep(hooks.attention(tokens, mean=True), True) for name, tokens in streams.items()}
        maps = {}
        for name in ("target", "reference"):
            look = hooks.emphasis(streams[name], read)
            by_step = keep(lambda call, look=look: look(call)[0].mean(0))  # (tokens, words)
            maps[name] = by_step, keep(lambda call, look=look: look(call)[0, ..., words[word]].mean(-1), True)  # (H, …)
        pictures = {"target": small(experiment.picture(experiment.run())), "reference": small(experiment.image)}

    def cell(name: str, label: str, values: Tensor) -> tuple[str, Image.Image]:
        return f"{label} ×{values.max():.1f}", overlay(pictures[name], experiment.grid(values))

    rows, sections = [], []
    for name, (by_step, by_head) in maps.items():
        mean = torch.stack([values for steps in by_step.values() for values in steps.values()]).mean(0)
        cells = [cell(name, w, mean[:, tokens].mean(-1)) for w, tokens in words.items()]
        rows.append((f"where the {name} looks at each word", [("", pictures[name]), *cells]))
        steps = [
            (site, [cell(name, f"step {i}", values[:, words[word]].mean(-1)) for i, values in steps.items()])
            for site, steps in by_step.items()
        ]
        heads = [
            (site, [cell(name, f"head {h}", values) for h, values in enumerate(*steps.values())])
            for site, steps in by_head.items()
        ]
        caption = f"Where the {name} looks at “{word}”; × is the largest value beside the mean of the map."
        sections += [(f"{name}-by-step", caption, sheet(steps)), (f"{name}-by-head", caption, sheet(heads))]
    table = {
        site: {
            f"{a} at {b}": float(row[..., tokens].sum(-1).mean())
            for a, kept in shares.items() for row in kept[site].values() for b, tokens in streams.items()
        } for site in shares["text"]
    }  # fmt: skip
    between = []
    for a, b in (("target", "reference"), ("reference", "target")):
        seen = torch.stack([row[0, :, streams[b]].mean(0) for kept in shares[a].values() for row in kept.values()])
        between.append(cell(b, f"where the {a} looks", (seen / seen.mean(1, keepdim=True)).mean(0)))
    return [
        ("words", "All blocks, heads and steps, every map divided by its mean; × is the peak.", sheet(rows)),
        ("streams", "Share of the attention of one stream's tokens that goes to another's, by block.", heat_map(table)),
        ("between", "Between the two pictures, over all blocks, heads and steps.", sheet([("", between)])),
        *sections,
    ]


def ablate(experiment: Experiment, args: argparse.Namespace) -> Sections:
    """Tables of what every ablation moves, and the pictures."""
    flux, contexts = experiment.flux, {("whole", "as it is"): nullcontext()}
    for part in torch.arange(len(experiment.times) - 1).tensor_split(4):
        if len(part):
            contexts["no reference", f"steps {part[0]}-{part[-1]}"] = hooks.without_reference(flux, part.tolist())
    for block in hooks.sites(flux, args.block):
        contexts[block, "skipped"] = hooks.skip(flux, block)
        if any(updates(flux)):
            contexts[block, "LoRA off"] = muted(flux, f"{block}.*")
        for head in range(flux.config.num_heads if args.heads else 0):
            contexts[block, f"head {head} zero"] = hooks.zero_head(flux, f"{block}.attend", head)
    moved = measures.ablate(experiment, contexts)
    tables, rows = ({}, {}), {}
    for (site, what), (*numbers, picture) in moved.items():
        rows.setdefault(site, []).append((what, small(picture)))
        for table, number in zip(tables, numbers, strict=True):
            table.setdefault(site, {})[what] = number
    latents, psnr = (heat_map(table, form) for table, form in zip(tables, ("{:.2f}", "{:.1f}"), strict=True))
    return [
        ("latents", "How far the finished latents move, as a share of their norm: ||x - x'|| / ||x||.", latents),
        ("psnr", "PSNR in dB of the pictures; low is far, 99 is equal.", psnr),
        ("pictures", "What comes out.", sheet(list(rows.items()))),
    ]


def lora(experiment: Experiment, args: argparse.Namespace) -> Sections:
    """Tables of every update, and how far the result moves without the updates of a block."""
    found = measures.anatomy(experiment)
    captions = {
        "norm": "||dW||, the Frobenius norm of what is added to the weight.",
        "rank": "Effective rank of dW: e to the entropy of its singular values' shares.",
        "effect": "||dW x|| / ||W x|| on the inputs x of this edit.",
    }
    tables = [{b: {name: n[i] for name, n in row.items()} for b, row in found.items()} for i in range(3)]
    sections = [(name, text, heat_map(t)) for (name, text), t in zip(captions.items(), tables, strict=True)]
    moved = measures.ablate(experiment, {block: muted(experiment.flux, f"{block}.*") for block in found})
    table = {block: {"latents": latents, "PSNR": psnr} for block, (latents, psnr, _) in moved.items()}
    caption = "How far the finished latents, and the picture in dB, move when a block's updates are off."
    return [*sections, ("without", caption, heat_map(table))]


def path(experiment: Experiment, args: argparse.Namespace) -> Sections:
    """The strip of predictions, and what is at work at every step."""
    steps = measures.path(experiment)
    cells = [(f"t = {step['t']:.2f}", small(experiment.picture(step.pop("clean")))) for step in steps]
    names = {"speed": "speed"} | {name: f"{name} changes" for name in steps[0] if name not in ("t", "speed")}
    table = {label: {f"t {step['t']:.2f}": step[name] for step in steps} for name, label in names.items()}
    return [
        ("predictions", "The picture as the model predicts it at every step, x - t v.", sheet([("", cells)])),
        (
            "velocity",
            "Speed: root mean square of v. Below: ||v - v without it|| / ||v||.",
            heat_map(table, by_row=True),
        ),
    ]


def drift(experiment: Experiment, args: argparse.Namespace) -> Sections:
    """Every round's picture and its numbers."""
    rounds = measures.drift(experiment, args.rounds)
    cells = [("given", small(experiment.image))]
    cells += [(f"round {i}", small(r["picture"])) for i, r in enumerate(rounds, 1)]
    table: dict[str, dict[str, float]] = {}
    for i, r in enumerate(rounds, 1):
        dx, dy, sure = r["shift"]
        numbers = {"PSNR, dB": r["psnr"], "shift right, px": dx, "shift down, px": dy, "shift is sure from 1": sure}
        for name, number in (numbers | dict(zip(("red", "green", "blue"), r["colour"], strict=True))).items():
            table.setdefault(name, {})[f"round {i}"] = number
    caption = "Beside the given picture: PSNR, shift by phase correlation, change of the mean colours of 255."
    return [
        ("pictures", "The edit, applied to its own result.", sheet([("", cells)])),
        ("numbers", caption, heat_map(table, by_row=True)),
    ]


COMMANDS = {run.__name__: run for run in (attention, ablate, lora, path, drift)}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m kontext_min.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", choices=COMMANDS, metavar="COMMAND")
    add("--image", required=True, metavar="FILE", help="the reference")
    add("--prompt", required=True, metavar="TEXT", help="the instruction")
    add("--model", default="nano", help="as of infer.py")
    add("--lora", metavar="FILE")
    add("--out", type=Path, metavar="DIR", help="for the page and its pictures (output/study/COMMAND)")
    add("--size", default="auto", metavar="WxH")
    add("--steps", type=int, default=8)
    add("--guidance", type=float, default=2.5)
    add("--seed", type=int, default=0)
    add("--block", default="*_blocks.*", metavar="PATTERN", help="attention, ablate: only these, e.g. single_blocks.*")
    add("--word", help="attention: the word of the detailed maps (the longest)")
    add("--heads", action="store_true", help="ablate: every head alone, too")
    add("--rounds", type=int, default=6, help="drift: how often")
    args = parser.parse_args(argv)
    keys = ("model", "lora", "size", "steps", "guidance", "seed")
    experiment = Experiment.open(args.image, args.prompt, **{key: getattr(args, key) for key in keys})
    sections = COMMANDS[args.command](experiment, args)
    about = (
        f"“{args.prompt}” · {args.image} · {args.model}{f' with {args.lora}' if args.lora else ''} · {args.steps} steps"
    )
    print(write_page(args.out or Path("output/study", args.command), args.command, about, sections))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"study: {error}")
