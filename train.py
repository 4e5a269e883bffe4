"""Train a LoRA on picture pairs: python train.py configs/nano.json [KEY=VALUE …]. The recipe, top to bottom.

--explain      print every key in force, where it comes from and what it means
--check        say all about the data, without weights or a GPU, and draw a contact sheet of every set
--prune-cache  remove from this config's caches what its data no longer uses, and stop
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from kontext_min import presets, report
from kontext_min.adapters.inject import TARGETS, add_lora, matching_modules
from kontext_min.checkpoints import load
from kontext_min.config import Config, explain, read_config
from kontext_min.data.check import contact_sheet, summary
from kontext_min.data.examples import Example, Examples, make_all
from kontext_min.edit import Editor
from kontext_min.memory import apply_checkpointing
from kontext_min.sampler import Sampling
from kontext_min.training import state, track
from kontext_min.training.optim import make_optimizer
from kontext_min.training.run import Run
from kontext_min.training.sets import Sets, mix_of, read_sets, text_cache
from kontext_min.training.start import screen
from kontext_min.training.validate import Validator

OPTIONS = ("--explain", "--check", "--prune-cache")
NO_PATH = str.maketrans("/\\:", "___")  # an id in a file name


def make_folder(folder: Path):
    """The run's folder, or one sentence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be made ({error.strerror}); choose another") from error


def check_data(config: Config) -> Sets:
    """What can be told without the model's files. Raises ValueError with all problems together."""
    problems, sets = [], None
    if isinstance(config.flux_lora_target, str) and config.flux_lora_target not in TARGETS:
        problems.append(f"flux_lora_target {config.flux_lora_target!r} is none of {', '.join(TARGETS)}")
    problems += track.missing(config)
    try:
        sets = read_sets(config, presets.named(config.pretrained_model_name_or_path).bucket_step)
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return sets


def check(config: Config) -> tuple[load.Checkpoint, Sets]:
    """Model and data, before anything slow. Raises ValueError with all problems together."""
    problems, sets, checkpoint = [], None, None
    try:
        sets = check_data(config)
    except ValueError as error:
        problems.append(str(error))
    try:
        checkpoint = load.find(presets.locate(config.pretrained_model_name_or_path), download=not problems)
    except (ValueError, FileNotFoundError) as error:
        problems.insert(0, str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return checkpoint, sets


def report_data(config: Config):
    """--check: all that can be said of the data without weights or a GPU; a contact sheet per set in output_dir."""
    sets = check_data(config)
    tokens, channels = presets.named(config.pretrained_model_name_or_path).text_shape
    text = (tokens, channels, 2 if config.mixed_precision == "bf16" else 4)
    print(*sets.notes, *summary(sets.training, text), sep="\n")
    make_folder(config.output_dir)
    by_set: dict[str, dict[str, Example]] = {}
    for example in (*sets.training, *sets.validation):  # pairs of both stand once
        by_set.setdefault(example.set_id, {})[example.name] = example
    for set_id, examples in by_set.items():
        page, warnings = contact_sheet(list(examples.values()), mix_of(config))
        file = config.output_dir / f"check-{set_id.translate(NO_PATH)}.png"
        page.save(file)
        print(*warnings, f"look at {file}", sep="\n")


def encode(config: Config, sets: Sets, checkpoint: load.Checkpoint, place: tuple) -> tuple[Examples, Examples]:
    """Make what is made once, then text and latents, cached by content; the encoders are let go again."""
    make_all([view for e in (*sets.training, *sets.validation) for view in e.views()])
    device, dtype = place
    mix, texts = mix_of(config), text_cache(config)
    examples = Examples(sets.training, checkpoint, texts, dtype, mix)
    validation = Examples(
        sets.validation, checkpoint, texts, dtype, replace(mix, caption_dropout=0, reference_dropout=0)
    )
    captions, pictures = (sum(made) for made in zip(examples.encode(device), validation.encode(device), strict=True))
    print(f"encoded {captions} captions and {pictures} pictures; all else was cached")
    return examples, validation


def main(argv: list[str]):
    options = [a for a in argv if a.startswith("-") and "=" not in a]
    files, overrides = [a for a in argv if "=" not in a and a not in options], [a for a in argv if "=" in a]
    if not argv or {"-h", "--help"} & set(options):
        return print(__doc__.strip())
    unknown = [option for option in options if option not in OPTIONS]
    if unknown or len(files) != 1:
        raise ValueError(f"{unknown[0]} is no option" if unknown else f"one config file is needed, got {files}")
    config = read_config(Path(files[0]), overrides)
    if "--explain" in options:
        return print(*explain(config), sep="\n")
    if "--check" in options:
        return report_data(config)
    checkpoint, sets = check(config)
    print(*(f"{key} is ignored: {why}" for key, why in config.ignored.items()), *sets.notes, sep="\n")
    make_folder(config.output_dir)
    name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device, dtype = torch.device(name), torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    examples, validation = encode(config, sets, checkpoint, (device, dtype))
    if "--prune-cache" in options:
        return print(examples.prune(validation))
    if state.chosen(config) is None and (aside := state.set_aside(config.output_dir)):
        print(f"what an earlier run left in {config.output_dir} was moved to {aside}")

    # model: load -> freeze -> adapt -> checkpoint
    flux = load.load_flux(checkpoint, device, dtype).requires_grad_(False)
    torch.manual_seed(config.seed)
    target = config.flux_lora_target
    names = matching_modules(flux.config, TARGETS[target] if isinstance(target, str) else target)
    if not names:
        raise ValueError(f"flux_lora_target {target} matches no module of this model")
    parameters = add_lora(flux, names, config.lora_rank, config.lora_alpha or config.lora_rank)
    if config.gradient_checkpointing:
        apply_checkpointing(flux)

    # loop
    vae = examples.vae = load.load_vae(checkpoint, device, torch.float32)
    editor = Editor(flux, vae, checkpoint.shift, presets.preset_of(checkpoint.folder))
    print(*screen(config, editor, examples), sep="\n")
    sampling = Sampling(config.validation_num_inference_steps, config.validation_guidance, seed=config.validation_seed)
    validator = Validator(editor, validation, sampling, config.output_dir / "validation")
    betas = (config.adam_beta1, config.adam_beta2)
    settings = (config.learning_rate, betas, config.adam_weight_decay, config.adam_epsilon)
    optimizer = make_optimizer(config.optimizer, parameters, *settings)
    print(Run(config, flux, examples, validator).go(optimizer, checkpoint.shift))
    print(report.write(config.output_dir))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
