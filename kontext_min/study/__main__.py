"""Pictures of what the model does with one edit: python -m kontext_min.study COMMAND --image FILE --prompt TEXT

attention  where the pictures look at which word, and who looks at whom
ablate     how far the result moves without a block, a head, the reference for some steps, or the LoRA in a block
lora       how large a LoRA is, of what rank, and what it does, by block
path       the picture as predicted at every step, and what text, reference and LoRA do to the velocity
drift      the edit applied to its own result, again and again
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kontext_min.adapters.inject import muted, updates
from kontext_min.parallel import errors_in_one_line
from kontext_min.study import experiment, hooks
from kontext_min.study.experiment import Experiment, heat_map, overlay, rows_of

Sections = Iterator[tuple[str, str, Image.Image]]  # name, caption, picture


def attention(edit: Experiment, args: argparse.Namespace) -> Sections:
    """Maps of every word, of one word by block, step and head, and the shares of the three streams."""
    words, streams, site = edit.words, edit.streams, f"{args.block}.attend"
    word = args.word or max(words, key=len)
    if word not in words:
        raise ValueError(f"--word {word}: the instruction has {', '.join(words)}")
    means, maps, steps, sheets, shares = {}, {}, {}, defaultdict(lambda: defaultdict(dict)), defaultdict(dict)
    with ExitStack() as stack:
        for name, tokens in streams.items():
            look = hooks.emphasis(tokens, slice(max(part.stop for part in words.values())))
            one = lambda call, look=look: look(call)[..., words[word]].mean((0, 1, 3))  # noqa: E731
            means[name] = stack.enter_context(hooks.average(edit.flux, site, hooks.attention(tokens, mean=True)))
            maps[name] = stack.enter_context(hooks.average(edit.flux, site, look))  # site -> (1, H, tokens, words')
            steps[name] = stack.enter_context(hooks.record(edit.flux, site, one))  # site -> step -> (tokens,)
        pictures = {"target": edit.picture(edit.run()), "reference": edit.image}

    def draw(sheet: str, row: str, label: str, name: str, values: Tensor):
        image = overlay(pictures[name], values.reshape(edit.grid))
        sheets[sheet][row][f"{label} x{values.max() / values.mean():.1f}"] = image

    for name, other in (("target", "reference"), ("reference", "target")):
        sheets["words"][f"where the {name} looks at each word"][""] = pictures[name]
        every = torch.stack(list(maps[name].values())).mean((0, 1, 2))  # (tokens, words')
        for text, part in words.items():
            draw("words", f"where the {name} looks at each word", text, name, every[:, part].mean(-1))
        for block, values in maps[name].items():
            draw("between", block, f"where the {name} looks", other, means[name][block][0, :, streams[other]].mean(0))
            for i, head in enumerate(values[0, ..., words[word]].mean(-1)):
                draw(f"{name}-heads", block, f"head {i}", name, head)
            for i, step in steps[name][block].items():
                draw(f"{name}-steps", block, f"step {i}", name, step)
    for (a, b), block in product(product(streams, streams), means["text"]):
        shares[block][f"{a} at {b}"] = float(means[a][block][..., streams[b]].sum(-1).mean())
    captions = {
        "words": "Over all blocks, heads and steps, every map divided by its mean; x is the peak.",
        "between": "Where the tokens of one picture look in the other, by block.",
    }
    about = f"Where it looks at “{word}”."
    yield from ((name, captions.get(name, about), rows_of(rows)) for name, rows in sheets.items())
    yield "streams", "Shares of one stream's attention that go to another.", heat_map(shares)


def ablate(edit: Experiment, args: argparse.Namespace) -> Sections:
    """Tables of what every ablation moves, and the pictures."""
    flux, contexts, count = edit.flux, {}, len(edit.times) - 1
    for part in torch.arange(count).split(max(1, count // 4)):
        contexts["without reference", f"steps {part[0]}-{part[-1]}"] = hooks.without_reference(flux, part.tolist())
    for block in hooks.sites(flux, args.block):
        contexts[block, "skipped"] = hooks.skip(flux, block)
        if any(updates(flux)):
            contexts[block, "LoRA off"] = muted(flux, block)
        for head in range(flux.config.num_heads if args.heads else 0):
            contexts[block, f"head {head} off"] = hooks.zero_head(flux, f"{block}.attend", head)
    moved, psnr, pictures = experiment.ablation(edit, contexts)
    yield "latents", "How far the finished latents move: ||x - x'|| / ||x||.", heat_map(moved)
    yield "psnr", "PSNR of the pictures in dB: low is far, 99 is equal.", heat_map(psnr, "{:.1f}")
    yield "pictures", "What comes out.", rows_of(pictures)


def lora(edit: Experiment, args: argparse.Namespace) -> Sections:
    norm, rank, effect = experiment.anatomy(edit)
    moved, _, _ = experiment.ablation(edit, {(block, "latents"): muted(edit.flux, block) for block in norm})
    yield "norm", "||dW||, the Frobenius norm of what is added to the weight (DoRA: of B A).", heat_map(norm)
    yield "rank", "Effective rank of dW: e to the entropy of its singular values' shares.", heat_map(rank)
    yield "effect", "||dW x|| / ||W x|| on the inputs x of this edit.", heat_map(effect)
    yield "without", "How far the finished latents move without a block's updates.", heat_map(moved)


def path(edit: Experiment, args: argparse.Namespace) -> Sections:
    predicted, table = experiment.follow(edit)
    strip = dict(zip(table["speed"], map(edit.picture, predicted), strict=True))
    caption = "Speed: root mean square of v. What text, reference and LoRA change: ||v - v without|| / ||v||."
    yield "predictions", "The picture as predicted at every step, x - t v.", rows_of({"": strip})
    yield "velocity", caption, heat_map(table, by_row=True)


def drift(edit: Experiment, args: argparse.Namespace) -> Sections:
    pictures, table = experiment.repeat(edit, args.rounds)
    strip = {f"round {i}" if i else "given": picture for i, picture in enumerate(pictures)}
    caption = "Beside the given picture: PSNR in dB, shift in pixels (sure with a confidence of 1), colours of 255."
    yield "pictures", "The edit, applied to its own result.", rows_of({"": strip})
    yield "numbers", caption, heat_map(table, by_row=True)


COMMANDS = {run.__name__: run for run in (attention, ablate, lora, path, drift)}


def main(argv: list[str] | None = None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m kontext_min.study", description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("command", choices=COMMANDS, metavar="COMMAND")
    add("--image", required=True, metavar="FILE", help="the reference")
    add("--prompt", required=True, metavar="TEXT", help="the instruction")
    settings = {"model": "nano", "lora": None, "size": "auto", "steps": 8, "guidance": 2.5, "seed": 0}
    for name, default in settings.items():
        kind = str if default is None else type(default)
        add(f"--{name}", type=kind, default=default, help=f"as of infer.py, at most once ({default})")
    add("--precision", choices=("auto", "int8", "nf4", "fp8"), default="auto", help="of the base's weights (auto)")
    add("--block", default="*_blocks.*", metavar="PATTERN", help="attention, ablate: only these, e.g. single_blocks.*")
    add("--word", help="attention: the word of the detailed maps (the longest)")
    add("--heads", action="store_true", help="ablate: also every head alone")
    add("--rounds", type=int, default=6, help="drift: how often (6)")
    add("--out", type=Path, metavar="DIR", help="for the page and its pictures (output/study/COMMAND)")
    args = parser.parse_args(argv)
    base = (args.precision.replace("auto", "no_change"), Path("cache/base"), "no_change")
    edit = Experiment.open(args.image, args.prompt, base=base, **{name: getattr(args, name) for name in settings})
    if not all(site.partition("_blocks.")[2].isdecimal() for site in hooks.sites(edit.flux, args.block)):
        raise ValueError(f"--block {args.block} fits more than blocks; one is called single_blocks.0")
    sections = list(COMMANDS[args.command](edit, args))
    about = " · ".join(filter(None, (f"“{args.prompt}”", args.image, args.model, args.lora, f"{args.steps} steps")))
    print(experiment.write_page(args.out or Path("output/study", args.command), args.command, about, sections))


if __name__ == "__main__":
    with errors_in_one_line("study"):
        main()
