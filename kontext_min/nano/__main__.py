"""nano: make weights/nano again, measure it, or write pairs for a LoRA.

python -m kontext_min.nano [pretrain]        all stages, each going on from its own file in --work; all is seeded
python -m kontext_min.nano evaluate          a table of all edits, metrics.json, sheet.jpg; of a LoRA with --lora FILE
python -m kontext_min.nano pairs EDIT FOLDER training pairs of one edit, held out or not, for train.py
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from kontext_min.nano.edits import HELD_OUT, MIX, SIZES, write_pairs
from kontext_min.nano.evaluate import evaluate, report, report_lora
from kontext_min.nano.model import write_clip, write_t5
from kontext_min.nano.pretrain import DISTIL_STEPS, PHASES, VAE_STEPS, pretrain_flux, pretrain_vae
from kontext_min.parallel import errors_in_one_line
from kontext_min.presets import WEIGHTS

EDITS = (*HELD_OUT, *MIX)
SMOKE = {"examples": 64, "steps": 3, "batch": 4, "falling": 1}  # of a phase


def main() -> None:  # one command
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--folder", type=Path, default=WEIGHTS / "nano", help="the model folder")
    shared.add_argument("--cases", type=int, default=200, help="held-out cases of each edit")
    shared.add_argument("--threads", type=int, default=1, help="results depend on it in the last bits")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m kontext_min.nano", description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(dest="command", metavar="pretrain | evaluate | pairs")
    command = commands.add_parser("pretrain", parents=[shared])
    command.add_argument("--work", type=Path, default=Path("output/nano-pretrain"), help="where its checkpoints are")
    command.add_argument("--bf16", action="store_true", help="its products in bf16, where the CPU multiplies in it")
    command.add_argument("--smoke", action="store_true", help="a few steps of everything, in WORK/smoke")
    command = commands.add_parser("evaluate", parents=[shared])
    command.add_argument("--lora", type=Path, help="what this LoRA does, beside the base")
    command.add_argument("--edits", nargs="+", choices=EDITS, default=EDITS, metavar="EDIT", help="only these, printed")
    command = commands.add_parser("pairs")
    command.add_argument("edit", choices=EDITS, metavar="EDIT", help=", ".join(EDITS))
    command.add_argument("output", type=Path, help="a folder that is new or empty")
    command.add_argument("--count", type=int, default=160)
    command.add_argument("--replay", type=float, default=0.0, help="share of pairs of the edits that nano knows")
    command.add_argument("--square", action="store_true", help="all of 96 x 96: of a few pairs it is the better use")
    args = parser.parse_args(sys.argv[1:] or ["pretrain"])
    if args.command == "pairs":
        print(write_pairs(args.edit, args.output, args.count, args.replay, SIZES[:1] if args.square else SIZES))
        return
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.command == "pretrain":
        if args.smoke:
            args.work /= "smoke"
            args.folder = args.work / "nano" if args.folder == WEIGHTS / "nano" else args.folder
        args.work.mkdir(parents=True, exist_ok=True)
        write_t5(args.folder / "tokenizer_2")
        write_clip(args.folder / "tokenizer")
        phases = [replace(phase, **SMOKE) for phase in PHASES] if args.smoke else PHASES
        vae = pretrain_vae(args.work, 4 if args.smoke else VAE_STEPS)
        pretrain_flux(args.work, vae, args.folder, phases, 3 if args.smoke else DISTIL_STEPS, args.bf16)
        report(args.folder, 4 if args.smoke else args.cases)
    elif args.lora:
        report_lora(args.folder, args.lora, args.edits, args.cases)
    elif args.edits is not EDITS:
        evaluate(args.folder, args.edits, args.cases)
    else:
        report(args.folder, args.cases)


if __name__ == "__main__":
    with errors_in_one_line("nano"):
        main()
