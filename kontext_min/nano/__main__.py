"""nano: make weights/nano again, measure it, or write pairs for a LoRA.

python -m kontext_min.nano [pretrain] all stages, each going on from its own file in --work: tokenizers, autoencoder,
                                      transformer with text encoders, guidance; the model folder is written at every
                                      checkpoint; everything is seeded and counted in steps, not minutes
python -m kontext_min.nano evaluate   a table of all edits, metrics.json and sheet.jpg; of a LoRA with --lora FILE
python -m kontext_min.nano pairs EDIT a folder of training pairs of one edit, held out or not, for train.py
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from kontext_min.nano.edits import HELD_OUT, MIX
from kontext_min.nano.evaluate import EDITS, report, report_lora
from kontext_min.nano.model import export
from kontext_min.nano.pairs import write_pairs
from kontext_min.nano.pretrain_flux import DISTIL_STEPS, PHASES, pretrain_flux
from kontext_min.nano.pretrain_vae import pretrain_vae
from kontext_min.nano.vocabulary import write_clip, write_t5
from kontext_min.presets import WEIGHTS

VAE_STEPS = 3600
ALL_EDITS = (*HELD_OUT, *MIX)


def pretrain(folder: Path, work: Path, smoke: bool) -> None:
    """All stages; `smoke` takes a handful of steps of each."""
    work.mkdir(parents=True, exist_ok=True)
    write_t5(folder / "tokenizer_2")
    write_clip(folder / "tokenizer")
    vae = pretrain_vae(work, 4 if smoke else VAE_STEPS)
    phases = tuple(replace(phase, examples=64, steps=3, batch=4) for phase in PHASES) if smoke else PHASES
    distil = 3 if smoke else DISTIL_STEPS
    nano = pretrain_flux(work, vae, folder, phases, distil, report=lambda nano: export(folder, nano, vae))
    export(folder, nano, vae)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kontext_min.nano", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="pretrain | evaluate | pairs")
    for name in ("pretrain", "evaluate"):
        command = commands.add_parser(name)
        command.add_argument("--folder", type=Path, default=WEIGHTS / "nano", help="the model folder")
        command.add_argument("--cases", type=int, default=200, help="held-out cases of each edit")
        command.add_argument("--threads", type=int, default=1, help="results depend on it in the last bits")
        if name == "pretrain":
            work = Path("output/nano-pretrain")
            command.add_argument("--work", type=Path, default=work, help="where its checkpoints are")
            command.add_argument("--smoke", action="store_true", help="a few steps of everything, in seconds")
        else:
            command.add_argument("--lora", type=Path, help="what this LoRA does, beside the base")
            command.add_argument("--edits", nargs="+", choices=ALL_EDITS, metavar="EDIT", help="only these")
    pairs = commands.add_parser("pairs")
    pairs.add_argument("edit", choices=ALL_EDITS, metavar="EDIT", help=", ".join(ALL_EDITS))
    pairs.add_argument("output", type=Path, help="a folder that is new or empty")
    pairs.add_argument("--count", type=int, default=160)
    pairs.add_argument("--replay", type=float, default=0.0, help="share of pairs of the edits that nano knows")
    return parser.parse_args(sys.argv[1:] or ["pretrain"])


def main() -> None:
    """One command."""
    args = arguments()
    if args.command == "pairs":
        print(write_pairs(args.edit, args.output, args.count, args.replay))
        return
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.command == "pretrain":
        pretrain(args.folder, args.work, args.smoke)
        report(args.folder, 4 if args.smoke else args.cases)
    elif args.lora is not None:
        report_lora(args.folder, args.lora, args.edits or (*HELD_OUT, *EDITS), args.cases)
    else:
        report(args.folder, args.cases)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"nano: {error}")
