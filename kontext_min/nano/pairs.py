"""Training pairs for a LoRA: pictures on disk as anybody's own would be, with the data list that train.py reads."""

import json
from pathlib import Path

import numpy as np

from kontext_min.data.buckets import Size
from kontext_min.nano.edits import HELD_OUT, Example, example, to_image
from kontext_min.nano.held_out import held_out_example

SIZE = Size(96, 96)


def write_pairs(edit: str, folder: Path, count: int, replay: float = 0.0) -> str:
    """`count` training examples of an edit, a share of them replaced by `replay`, under `folder`. -> what to do next

    References are in reference-1/ and so on, targets and captions in target/, the data list is data.json; replayed
    pairs have sets of their own. Raises ValueError if the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder")
    r = np.random.default_rng([6, len(edit)])
    make = held_out_example if edit in HELD_OUT else example
    sets: dict[int, str] = {}
    for i in range(count):
        if r.random() < replay:
            task, prefix = example("train", 2 * 10**6 + i, SIZE), "replay-"
            if len(task.references) != 1:
                task = example("train", 2 * 10**6 + i, SIZE, "keep")
        else:
            task, prefix = make("train", 3 * 10**6 + i, SIZE, edit), ""
        write_pair(task, folder, prefix, f"{i:04d}")
        sets[prefix] = len(task.references)
    data = [entry for prefix, references in sets.items() for entry in entries(folder, prefix, references)]
    (folder / "data.json").write_text(json.dumps(data, indent=2) + "\n")
    return f"{count} pairs; train with data_backend_config={folder / 'data.json'}"


def write_pair(task: Example, folder: Path, prefix: str, name: str) -> None:
    """One example's pictures (JPEG of high quality) and caption."""
    named = {f"{prefix}reference-{k}": picture for k, picture in enumerate(task.references, start=1)}
    for part, picture in {**named, f"{prefix}target": task.target}.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        to_image(picture).save(folder / part / f"{name}.jpg", quality=95, subsampling=0)
    (folder / f"{prefix}target" / f"{name}.txt").write_text(task.prompt + "\n")


def entries(folder: Path, prefix: str, references: int) -> list[dict]:
    """The data list's entries of one set of targets and its references."""
    ids = [f"{prefix}reference-{k}" for k in range(1, references + 1)]
    target = {"id": f"{prefix}target", "conditioning_data": ids}
    shared = {"resolution": SIZE.width, "resolution_type": "pixel"}
    return [
        {**target, "instance_data_dir": str(folder / f"{prefix}target"), **shared},
        *({"id": i, "instance_data_dir": str(folder / i), "conditioning_type": "reference_strict"} for i in ids),
    ]
