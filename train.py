"""Train a LoRA on picture pairs: python train.py configs/nano.json [KEY=VALUE …]. The recipe, top to bottom."""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from kontext_min import presets
from kontext_min.adapters.formats import write_lora
from kontext_min.adapters.inject import TARGETS, add_lora, matching_modules, updates
from kontext_min.checkpoints import load
from kontext_min.config import Config, read_config
from kontext_min.data.examples import Example, Examples
from kontext_min.edit import Editor
from kontext_min.memory import apply_checkpointing
from kontext_min.sampler import Sampling
from kontext_min.training.sets import read_sets, text_cache
from kontext_min.training.trainer import train
from kontext_min.training.validate import Validator

LORA_FILE = "pytorch_lora_weights.safetensors"


def check(config: Config) -> tuple[load.Checkpoint, list[Example], list[Example]]:
    """Model and data, before anything slow. Raises ValueError with all problems together."""
    step = presets.named(config.pretrained_model_name_or_path).bucket_step
    problems, sets, checkpoint = [], ([], []), None
    if config.flux_lora_target not in TARGETS:
        problems.append(f"flux_lora_target {config.flux_lora_target!r} is none of {', '.join(TARGETS)}")
    try:
        sets = read_sets(config, step)
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    try:
        checkpoint = load.find(presets.locate(config.pretrained_model_name_or_path), download=not problems)
    except (ValueError, FileNotFoundError) as error:
        problems.insert(0, str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return checkpoint, *sets


def recipe(config: Config, validation: list[Example]) -> dict:
    """What infer.py needs to show this LoRA with no other argument than its file."""
    shown = validation[0]
    return {
        "title": config.output_dir.name,
        "model": config.pretrained_model_name_or_path,
        "prompt": [shown.pair.caption],
        "image": [str(path.resolve()) for path in shown.pair.references],
        "guidance": config.validation_guidance,
        "steps": config.validation_num_inference_steps,
        "trained_steps": config.max_train_steps,
        "lora_rank": config.lora_rank,
        "flux_lora_target": config.flux_lora_target,
    }


def main(argv: list[str]):
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    config = read_config(Path(argv[0]), argv[1:])
    checkpoint, trained_on, validated_on = check(config)
    print(f"{len(trained_on)} pairs to train on, {len(validated_on)} to validate on")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (config.output_dir / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    device = torch.device(
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32

    # data: text and latents, cached by content; the encoders are let go again
    texts = text_cache(config)
    examples = Examples(trained_on, checkpoint, texts, dtype)
    validation = Examples(validated_on, checkpoint, texts, dtype)
    for part in (examples, validation):
        part.encode(device)

    # model: load -> freeze -> adapt -> checkpoint
    flux = load.load_flux(checkpoint, device, dtype).requires_grad_(False)
    torch.manual_seed(config.seed)
    names = matching_modules(flux.config, TARGETS[config.flux_lora_target])
    parameters = add_lora(flux, names, config.lora_rank, config.lora_alpha or config.lora_rank)
    print(f"LoRA of rank {config.lora_rank} on {len(names)} modules: {sum(p.numel() for p in parameters):,} parameters")
    if config.gradient_checkpointing:
        apply_checkpointing(flux)

    # loop
    vae = load.load_vae(checkpoint, device, torch.float32)
    editor = Editor(flux, vae, checkpoint.shift, presets.preset_of(checkpoint.folder))
    sampling = Sampling(config.validation_num_inference_steps, config.validation_guidance, seed=config.validation_seed)
    validator = Validator(editor, validation, sampling, config.output_dir / "validation")
    file = config.output_dir / LORA_FILE

    def each_step(step: int):
        last = step == config.max_train_steps
        if last or (config.validation_steps and step % config.validation_steps == 0):
            write_lora(file, list(updates(flux)), recipe(config, validated_on), dtype)
            tqdm.write(validator.run(step))

    try:
        train(config, flux, parameters, examples, checkpoint.shift, each_step)
    except (KeyboardInterrupt, ValueError):  # nothing is lost: the LoRA as it was before the step that failed
        write_lora(file, list(updates(flux)), recipe(config, validated_on), dtype)
        print(f"stopped; the LoRA so far is in {file}")
        raise
    print(f"{file}\n{validator.folder}/{config.max_train_steps:06d}.png")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
