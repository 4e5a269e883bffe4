"""Pictures of what the model does with one edit: python -m kontext_min.study COMMAND --image FILE --prompt TEXT

attention  where the pictures look at which word, and who looks at whom
ablate     how far the result moves without a block, a head, the reference for some steps, or the LoRA in a block
lora       how large a LoRA is, of what rank, and what it does, by block
path       the picture as predicted at every step, and what text, reference and LoRA do to the velocity
drift      the edit applied to its own result, again and again
"""

import argparse
import sys
from collections import defaultdict
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kontext_min.adapters.inject import muted, updates
from kontext_min.study import hooks, measures
from kontext_min.study.experiment import Experiment
from kontext_min.study.pictures import heat_map, overlay, rows_of, write_page

Sections = list[tuple[str, str, Image.Image]]  # name, caption, picture


def attention(experiment: Experiment, args: argparse.Namespace) -> Sections:
    """Maps of every word, of one word by block, step and head, and the shares of the three streams."""
    words, streams = experiment.words, experiment.streams
    word = args.word or max(words, key=len)
    if word not in words:
        raise ValueError(f"--word {word}: the instruction has {', '.join(words)}")
    (rows, maps, of_word), pictures = watch(experiment, f"{args.block}.attend", words[word])

    def drawn(name: str, values: dict[str, Tensor]) -> dict[str, Image.Image]:
        peaks = {f"{label} x{v.max() / v.mean():.1f}": v.reshape(experiment.grid) for label, v in values.items()}
        return {label: overlay(pictures[name], grid) for label, grid in peaks.items()}

    sheets = defaultdict(lambda: defaultdict(dict))
    for name, other in (("target", "reference"), ("reference", "target")):
        mean = torch.stack(list(maps[name].values())).mean(0)  # (tokens, words')
        found = drawn(name, {text: mean[:, part].mean(-1) for text, part in words.items()})
        sheets["words"][f"where the {name} looks at each word"] = {"": pictures[name], **found}
        for site in rows[name]:
            seen = rows[name][site][0, :, streams[other]].mean(0)
            sheets["between"][site] |= drawn(other, {f"where the {name} looks": seen})
            by_head, by_step = of_word[name][site].mean(0), of_word[name][site].mean(1)
            sheets[f"{name}-heads"][site] = drawn(name, {f"head {i}": v for i, v in enumerate(by_head)})
            sheets[f"{name}-steps"][site] = drawn(name, {f"step {i}": v for i, v in enumerate(by_step)})
    shares = {
        site: {
            f"{a} at {b}": float(rows[a][site][..., streams[b]].sum(-1).mean()) for a, b in product(streams, streams)
        }
        for site in rows["text"]
    }
    captions = {
        "words": "Over all blocks, heads and steps, every map divided by its mean; x is the peak.",
        "between": "Where one picture's tokens look in the other, by block.",
    }
    found = [(name, captions.get(name, f"Where it looks at “{word}”."), rows_of(rows)) for name, rows in sheets.items()]
    return [*found, ("streams", "Shares of one stream's attention that go to another.", heat_map(shares))]


def watch(experiment: Experiment, pattern: str, word: slice) -> tuple[list[dict], dict[str, Image.Image]]:
    """One run, its attention by stream and site, and the two pictures.

    -> of the mean token (1, H, L); emphasis of the instruction over heads and steps (tokens, words') and that of one
    word (steps, H, tokens).
    """
    said, kept = slice(max(part.stop for part in experiment.words.values())), ({}, {}, {})
    with ExitStack() as stack:
        for name, tokens in experiment.streams.items():
            look = hooks.emphasis(tokens, said)
            whats = (
                (hooks.attention(tokens, mean=True), True),
                (lambda call, look=look: look(call).mean((0, 1)), True),
                (lambda call, look=look: look(call)[..., word].mean(-1), False),
            )
            for kind, (what, average) in zip(kept, whats, strict=True):
                kind[name] = stack.enter_context(hooks.record(experiment.flux, pattern, what, average=average))
        pictures = {"target": experiment.picture(experiment.run()), "reference": experiment.image}
    cat = lambda found: {site: torch.cat([*values.values()]) for site, values in found.items()}  # noqa: E731
    return [{name: cat(found) for name, found in kind.items()} for kind in kept], pictures


def ablate(experiment: Experiment, args: argparse.Namespace) -> Sections:
    """Tables of what every ablation moves, and the pictures."""
    flux, contexts = experiment.flux, {}
    for part in torch.arange(len(experiment.times) - 1).split(max(1, (len(experiment.times) - 1) // 4)):
        contexts["without reference", f"steps {part[0]}-{part[-1]}"] = hooks.without_reference(flux, part.tolist())
    for block in hooks.sites(flux, args.block):
        contexts[block, "skipped"] = hooks.skip(flux, block)
        if any(updates(flux)):
            contexts[block, "LoRA off"] = muted(flux, block)
        for head in range(flux.config.num_heads if args.heads else 0):
            contexts[block, f"head {head} off"] = hooks.zero_head(flux, f"{block}.attend", head)
    moved, psnr, pictures = measures.ablate(experiment, contexts)
    return [
        ("latents", "How far the finished latents move: ||x - x'|| / ||x||.", heat_map(moved)),
        ("psnr", "PSNR of the pictures in dB: low is far, 99 is equal.", heat_map(psnr, "{:.1f}")),
        ("pictures", "What comes out.", rows_of(pictures)),
    ]


def lora(experiment: Experiment, args: argparse.Namespace) -> Sections:
    """Tables of every update, and how far the result moves without a block's updates."""
    norm, rank, effect = measures.anatomy(experiment)
    off = {(block, "latents"): muted(experiment.flux, block) for block in norm}
    return [
        ("norm", "||dW||, the Frobenius norm of what is added to the weight.", heat_map(norm)),
        ("rank", "Effective rank of dW: e to the entropy of its singular values' shares.", heat_map(rank)),
        ("effect", "||dW x|| / ||W x|| on the inputs x of this edit.", heat_map(effect)),
        (
            "without",
            "How far the latents move without a block's updates.",
            heat_map(measures.ablate(experiment, off)[0]),
        ),
    ]


def path(experiment: Experiment, args: argparse.Namespace) -> Sections:
    """The strip of predictions, and what is at work at every step."""
    predicted, table = measures.path(experiment)
    strip = {"": dict(zip(table["speed"], map(experiment.picture, predicted), strict=True))}
    caption = "Speed: root mean square of v. What text, reference and LoRA change: ||v - v without|| / ||v||."
    return [
        ("predictions", "The picture as predicted at every step, x - t v.", rows_of(strip)),
        ("velocity", caption, heat_map(table, by_row=True)),
    ]


def drift(experiment: Experiment, args: argparse.Namespace) -> Sections:
    """Every round's picture and its numbers."""
    pictures, table = measures.drift(experiment, args.rounds)
    strip = {"": {f"round {i}" if i else "given": picture for i, picture in enumerate(pictures)}}
    caption = "Beside the given picture: PSNR in dB, shift in pixels (sure with a confidence of 1), colours of 255."
    return [
        ("pictures", "The edit, applied to its own result.", rows_of(strip)),
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
    for name, default in (("model", "nano"), ("lora", None), ("size", "auto")):
        add(f"--{name}", default=default, help="as of infer.py")
    for name, default in (("steps", 8), ("guidance", 2.5), ("seed", 0)):
        add(f"--{name}", type=type(default), default=default, help=f"default {default}")
    add("--block", default="*_blocks.*", metavar="PATTERN", help="attention, ablate: only these, e.g. single_blocks.*")
    add("--word", help="attention: the word of the detailed maps (the longest)")
    add("--heads", action="store_true", help="ablate: also every head alone")
    add("--rounds", type=int, default=6, help="drift: how often (6)")
    add("--out", type=Path, metavar="DIR", help="for the page and its pictures (output/study/COMMAND)")
    args = parser.parse_args(argv)
    keys = ("model", "lora", "size", "steps", "guidance", "seed")
    experiment = Experiment.open(args.image, args.prompt, **{key: getattr(args, key) for key in keys})
    sections = COMMANDS[args.command](experiment, args)
    about = " · ".join(filter(None, (f"“{args.prompt}”", args.image, args.model, args.lora, f"{args.steps} steps")))
    print(write_page(args.out or Path("output/study", args.command), args.command, about, sections))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"study: {error}")
