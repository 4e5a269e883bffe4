"""Make weights/nano again, or measure it: `python -m kontext_min.nano [pretrain | evaluate]`.

Pretraining runs in stages that each go on from their own file in --work: tokenizers, autoencoder, then transformer and
text encoders; the model folder is written at every checkpoint. Everything is seeded and counted in steps, not minutes.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from kontext_min.nano.evaluate import report
from kontext_min.nano.model import Tokenizers, export
from kontext_min.nano.pretrain_flux import PHASES, pretrain_flux
from kontext_min.nano.pretrain_vae import pretrain_vae
from kontext_min.nano.vocabulary import write_clip, write_t5
from kontext_min.presets import WEIGHTS

VAE_STEPS = 3200


def pretrain(folder: Path, work: Path, smoke: bool) -> None:
    """All stages; `smoke` takes a handful of steps of each."""
    work.mkdir(parents=True, exist_ok=True)
    write_t5(folder / "tokenizer_2")
    write_clip(folder / "tokenizer")
    tokenizers = Tokenizers.read(folder)
    vae = pretrain_vae(work, 4 if smoke else VAE_STEPS)
    phases = tuple(replace(phase, examples=60, steps=3, batch=4) for phase in PHASES) if smoke else PHASES
    nano = pretrain_flux(work, vae, tokenizers, phases, report=lambda nano, step: export(folder, nano, vae))
    export(folder, nano, vae)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kontext_min.nano", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("pretrain", "evaluate"), default="pretrain")
    parser.add_argument("--folder", type=Path, default=WEIGHTS / "nano", help="the model folder")
    parser.add_argument("--work", type=Path, default=Path("output/nano-pretrain"), help="checkpoints of pretraining")
    parser.add_argument("--cases", type=int, default=100, help="evaluate: held-out cases of each edit")
    parser.add_argument("--threads", type=int, default=1, help="results depend on it in the last bits")
    parser.add_argument("--smoke", action="store_true", help="pretrain: a few steps of everything, in seconds")
    return parser.parse_args()


def main() -> None:
    """Pretrain and evaluate, or only evaluate."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.command == "pretrain":
        pretrain(args.folder, args.work, args.smoke)
    report(args.folder, 4 if args.smoke else args.cases)


if __name__ == "__main__":
    main()
