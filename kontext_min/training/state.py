"""Checkpoints: everything that a run needs to go on as if it had never stopped, bit for bit.

Noise, times, dropout and the order of the data are functions of (seed, step), so a checkpoint is the states of adapter,
optimizer and EMA, and the step. It appears whole or not at all, and old ones are removed only after a new one is whole.
All ranks call `save` and `restore`; they may be more or fewer when a run goes on, if a step still has as many batches.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint import CheckpointException

from kontext_min import parallel
from kontext_min.config import Config
from kontext_min.data.examples import Examples
from kontext_min.run_folder import checkpoints

STATE = "state.json"
FREE = (  # keys that begin so may change between a checkpoint and the run that goes on from it
    "max_train_steps", "output_dir", "cache_dir", "checkpoint", "resume_from_checkpoint", "allow_changed_resume",
    "validation", "eval_", "num_eval_", "user_prompt_library", "ema_validation", "skip_nonfinite_steps",
    "report_to", "tracker_", "logging_dir", "fsdp_", "distributed_timeout", "recompute", "gradient_checkpointing",
    "memory", "modulation_on_cpu", "offload_activations", "stream_blocks", "torch_compile",
    "data_backend_config", "resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size",
    "caption_strategy",  # the data's fingerprint tells of these
)  # fmt: skip
FIXED = {  # nothing goes on without them
    "lora_type", "lora_rank", "lora_rank_pattern", "use_dora", "lycoris_config", "flux_lora_target", "optimizer",
    "use_ema", "weights", "model_type",
}  # fmt: skip


def identity(config: Config, examples: Examples) -> dict:
    values = {key: value for key, value in config.model_dump(mode="json").items() if not key.startswith(FREE)}
    if not config.lr_scheduler.startswith("constant"):
        values["max_train_steps"] = config.max_train_steps
    values["gradient_accumulation_steps"] *= parallel.world()  # what counts is how many batches a step has
    return {**values, "data": examples.fingerprint(), "weights": examples.weights_of("transformer")}


class Parts(dict):
    """Name -> what has a state_dict, whole and alike on every rank: the adapter, the optimizer, the EMA."""

    @parallel.by_first
    def save(self, folder: Path):
        torch.save({name: part.state_dict() for name, part in self.items()}, folder / "tensors.pt")

    def load(self, folder: Path):
        saved = torch.load(folder / "tensors.pt", map_location="cpu", weights_only=True)
        for name, part in self.items():
            part.load_state_dict(saved[name])


def checksum(folder: Path) -> str:  # of all files' names and bytes but the state's own
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.name != STATE):
        with open(file, "rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def save(folder: Path, step: int, kept: Parts | parallel.Shards, identity: dict, limit: int):
    """Write folder/checkpoint-STEP and remove the oldest beyond `limit`. OSError keeps the old ones."""
    final, temporary = folder / f"checkpoint-{step}", folder / f"checkpoint-{step}.tmp"
    try:
        parallel.by_first(shutil.rmtree)(temporary, ignore_errors=True)
        parallel.by_first(temporary.mkdir)(parents=True)
        parallel.wait()
        kept.save(temporary)
        parallel.wait()
        finish(temporary, final, {"step": step, "identity": identity}, limit)
    except (OSError, RuntimeError, CheckpointException) as error:  # on a full disk torch raises the last two
        if isinstance(error, RuntimeError) and parallel.lost(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"checkpoint {step} could not be written ({error})") from error


@parallel.by_first
def finish(temporary: Path, final: Path, state: dict, limit: int):
    (temporary / STATE).write_text(json.dumps({**state, "checksum": checksum(temporary)}, indent=2), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync(final.parent)
    for old in checkpoints(final.parent)[:-limit]:
        shutil.rmtree(old)


def sync(path: Path):  # have the operating system write a file or a folder's entries to the disk
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def last(folder: Path) -> str:
    kept = checkpoints(folder)
    return f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"


def chosen(config: Config) -> Path | None:
    """The checkpoint to go on from; None starts a new run. `latest` with nothing there is a new run."""
    wanted = config.resume_from_checkpoint
    if wanted in (None, "", "latest"):
        return next(reversed(checkpoints(config.output_dir) if wanted else []), None)
    if found := next(filter(Path.is_dir, (Path(wanted), config.output_dir / wanted)), None):
        return found
    raise FileNotFoundError(f"resume_from_checkpoint {wanted} is no folder; give one checkpoint-N, or latest")


def restore(path: Path, kept: Parts | parallel.Shards, identity: dict, allow_changes: bool) -> int:
    """Bring a run to the state of a checkpoint. -> its step.
    Raises ValueError listing what changed since, or naming the checkpoint before a damaged one.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if parallel.rank() == 0 and checksum(path) != state["checksum"]:
            raise ValueError("its checksum differs")
    except (OSError, ValueError, KeyError) as error:
        before = [p for p in checkpoints(path.parent) if p != path]
        remedy = f"go on with resume_from_checkpoint={before[-1]}" if before else "start anew"
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    old = state["identity"]
    changed = [key for key in identity | old if identity.get(key) != old.get(key)]
    fixed = FIXED & set(changed)
    if fixed or (changed and not allow_changes):
        remedy = "undo that, or start anew in another output_dir" + ", or set allow_changed_resume=true" * (not fixed)
        lines = [f"  {key}: {old.get(key)!r} -> {identity.get(key)!r}" for key in changed]
        raise ValueError("\n".join([f"{path} was made with other settings; {remedy}:", *lines]))
    kept.load(path)
    return state["step"]
