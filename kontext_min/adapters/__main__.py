"""Adapter files on the command line.

python -m kontext_min.adapters inspect FILE                       what a file is, and where it changes the model
python -m kontext_min.adapters convert IN OUT --to FORMAT         the same change in another program's format
python -m kontext_min.adapters merge A B:0.5 OUT                  several adapters as one, their ranks added
python -m kontext_min.adapters merge --base MODEL A B:0.5 OUT     the base model with the adapters in its transformer

Every adapter written is read back and compared. --rank R makes LoRAs of rank R at most, also of LoKr, by SVD.
"""

import argparse
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

from kontext_min.adapters.inject import at_strength
from kontext_min.adapters.merge import merge_into, reduced
from kontext_min.adapters.read import read_adapter, split_lora
from kontext_min.adapters.rows import by_linear
from kontext_min.adapters.write import WRITTEN, write_adapter
from kontext_min.parallel import errors_in_one_line
from kontext_min.presets import locate

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def write(args: argparse.Namespace):
    """One adapter in another format, or several in one, or in the base's weights."""
    sources = [(read_adapter(file, args.transformer_only), times) for file, times in map(split_lora, args.loras)]
    for source, strength in sources:
        print(f"{source.path}: {source.title}, at strength {strength:g}")
    updates = [at_strength(update, strength) for source, strength in sources for update in source.updates]
    if args.base and (args.rank or args.to):
        raise ValueError("--rank and --to are of adapters; with --base the weights themselves are written")
    if args.base:
        lost = merge_into(args.base, updates, args.out, DTYPES[args.dtype])
        return print(f"{args.out}: {args.base} with the change, rounded to {args.dtype}: {lost:.2%} of it is lost")
    form, recipe = args.to or "diffusers", sources[0][0].recipe
    if len(sources) > 1 or sources[0][1] != 1:
        if any(update.magnitude is not None for update in updates):
            raise ValueError("DoRA cannot be added to others or weakened in one file; use --base, or infer.py with all")
        recipe = {}
    table, *_, note = WRITTEN[form]
    if args.rank:
        updates, lost = reduced(updates, args.rank, table.names == "bfl")
        print(f"rank {args.rank} at most, by SVD: {lost:.3%} of the change is lost")
    error = write_adapter(args.out, updates, recipe, DTYPES[args.dtype], form)
    print(f"{args.out}: {form}; read back, every change of a weight is the same to {error:.1e} of its size")
    print(f"note: {note}")


def inspect(args: argparse.Namespace):
    """A page about a file, 80 columns wide."""
    file = read_adapter(args.file)
    print(f"{file.path}\n{file.title}, {file.path.stat().st_size / 1e6:.1f} MB")
    said = {"rank": lambda u: u.rank, "alpha": lambda u: u.scale * u.rank, "alpha / rank": lambda u: u.scale}
    for what, of in said.items():
        print(f"{what}: {', '.join(f'{value:.4g}' for value in sorted(set(map(of, file.updates))))}")
    squares = Counter()
    for whole, (_, here) in by_linear(file.updates).items():
        block = ".".join(whole.name.split(".")[:2]) if "blocks" in whole.name else "outside"
        squares[block] += sum(float(update.delta().double().square().sum()) for update in here)
    largest = max(squares.values()) ** 0.5 or 1.0
    print("\nsize of the change, |delta W|, by block")
    for block, square in squares.items():
        print(f"  {block:18}{square**0.5:10.4f} {'#' * round(48 * square**0.5 / largest)}".rstrip())
    print("\nheader")
    for key, value in sorted(file.header.items()):
        lines = [f"  {key}: {value}"]
        with suppress(ValueError, TypeError):
            inner = dict(json.loads(value)).items()
            lines = [f"  {key}:", *(f"    {k}: {v}" for k, v in inner)] if inner else lines
        print("\n".join(line if len(line) <= 80 else line[:78] + " …" for line in lines))


@torch.no_grad()
def main(argv: list[str] | None = None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m kontext_min.adapters", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="inspect | convert | merge")
    shown, converted, merged = (commands.add_parser(name) for name in ("inspect", "convert", "merge"))
    shown.add_argument("file", type=Path)
    shown.set_defaults(work=inspect, out=None, rank=None)
    converted.add_argument("loras", nargs=1, metavar="IN")
    converted.set_defaults(base=None)
    merged.add_argument("loras", nargs="+", metavar="LORA[:STRENGTH]")
    what = "a model, folder or single file: write it with its transformer changed"
    merged.add_argument("--base", type=lambda name: Path(locate(name)), help=what)
    for command in (converted, merged):
        command.set_defaults(work=write)
        command.add_argument("out", type=Path, metavar="OUT")
        command.add_argument("--to", choices=WRITTEN, required=command is converted, help="the format")
        command.add_argument("--dtype", choices=DTYPES, default="bf16", help="of what is written; default bf16")
        command.add_argument("--rank", type=int, metavar="R", help="make LoRAs of at most this rank, by SVD")
        command.add_argument("--transformer-only", action="store_true", help="leave out what changes a text encoder")
        command.add_argument("--force", action="store_true", help="replace OUT if it is there")
    args = parser.parse_args(argv)
    if args.out and args.out.exists() and not args.force:
        raise ValueError(f"{args.out} is there already; give another name, or --force to replace it")
    if args.rank is not None and args.rank < 1:
        raise ValueError(f"--rank {args.rank}: a rank is at least 1")
    args.work(args)


if __name__ == "__main__":
    with errors_in_one_line("kontext_min.adapters"):
        main()
