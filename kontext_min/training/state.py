"""Checkpoints: everything that a run needs to go on as if it had never stopped, bit for bit.

Noise, times, dropout and the order of the data are functions of (seed, step), so a checkpoint is the adapter, the
states of optimizer and EMA, and the step. `checkpoint-N/` appears whole or not at all, and old ones are removed only
after a new one is whole.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kontext_min.adapters.inject import updates
from kontext_min.config import Config
from kontext_min.data.cache import checksum
from kontext_min.data.examples import Examples
from kontext_min.models.flux import Flux

ADAPTER, PARTS, STATE = "adapter.safetensors", "optimizer.pt", "state.json"
FREE = (  # keys that begin so may change between a checkpoint and the run that goes on from it
    "max_train_steps", "output_dir", "cache_dir", "checkpoint", "resume_from_checkpoint", "allow_changed_resume",
    "validation", "eval_", "num_eval_", "user_prompt_library", "ema_validation", "skip_nonfinite_steps",
    "report_to", "tracker_", "logging_dir",
    # the data's fingerprint tells of these
    "data_backend_config", "resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size",
    "caption_strategy",
)  # fmt: skip
FIXED = (  # nothing goes on without them
    "lora_type", "lora_rank", "lora_rank_pattern", "use_dora", "lycoris_config", "flux_lora_target", "optimizer",
    "use_ema", "weights",
)  # fmt: skip


def identity(config: Config, examples: Examples) -> dict:
    """What must be the same for a run to go on: the settings that shape the training, and the data's content."""
    values = {key: value for key, value in config.model_dump(mode="json").items() if not key.startswith(FREE)}
    if not config.lr_scheduler.startswith("constant"):
        values["max_train_steps"] = config.max_train_steps
    return {**values, "data": examples.fingerprint(), "weights": examples.weights_of("transformer")}


def adapter_of(flux: Flux) -> dict[str, torch.Tensor]:
    """Every update's parameters by name, on the CPU, as they are."""
    return {f"{u.name}.{name}": value.detach().cpu() for u in updates(flux) for name, value in u.named_parameters()}


def save(folder: Path, step: int, flux: Flux, parts: dict[str, Any], identity: dict, limit: int) -> Path:
    """Write folder/checkpoint-STEP and remove the oldest beyond `limit`. OSError keeps the old ones and says so.

    parts: what has a state_dict beside the adapter, by name: the optimizer, the EMA.
    """
    final, temporary = folder / f"checkpoint-{step}", folder / f"checkpoint-{step}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        adapter = adapter_of(flux)
        save_file(adapter, temporary / ADAPTER, metadata={"checksum": checksum(adapter)})
        torch.save({name: part.state_dict() for name, part in parts.items()}, temporary / PARTS)
        state = {"step": step, "adapter": checksum(adapter), "identity": identity}
        (temporary / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = checkpoints(folder)
        last = f"the last whole one is {kept[-1]}" if kept else "there is none before it"
        raise OSError(f"checkpoint {step} could not be written ({error}); {last}") from error
    for old in checkpoints(folder)[:-limit]:
        shutil.rmtree(old)
    return final


def sync(path: Path):
    """Have the operating system write a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    numbered = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(numbered, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def chosen(config: Config) -> Path | None:
    """The checkpoint to go on from; None starts a new run. `latest` with nothing there is a new run."""
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "latest":
        return next(reversed(checkpoints(config.output_dir)), None)
    path = Path(config.resume_from_checkpoint)
    if not path.is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint {path} is no folder; give one checkpoint-N, or latest")
    return path


def restore(path: Path, flux: Flux, parts: dict[str, Any], identity: dict, allow_changes: bool) -> int:
    """Bring the adapter and all parts to the state of a checkpoint. -> its step.

    Raises ValueError listing what changed since, or naming the checkpoint before a damaged one.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        adapter = load_file(path / ADAPTER)
        if checksum(adapter) != state["adapter"]:
            raise ValueError("the adapter's checksum differs")
        saved = torch.load(path / PARTS, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError) as error:
        before = [p for p in checkpoints(path.parent) if p != path]
        remedy = f"go on with resume_from_checkpoint={before[-1]}" if before else "start anew"
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    changed = [key for key in identity | state["identity"] if identity.get(key) != state["identity"].get(key)]
    if changed and not (allow_changes and not set(changed) & set(FIXED)):
        lines = [f"  {key}: {state['identity'].get(key)!r} -> {identity.get(key)!r}" for key in changed]
        remedy = "undo that, or start anew in another output_dir"
        remedy += "" if set(changed) & set(FIXED) else ", or set allow_changed_resume=true"
        raise ValueError("\n".join([f"{path} was made with other settings; {remedy}:", *lines]))
    for update in updates(flux):
        for name, value in update.named_parameters():
            value.data.copy_(adapter[f"{update.name}.{name}"])
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return state["step"]
