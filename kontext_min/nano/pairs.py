"""Training pairs for a LoRA: pictures on disk as anybody's own would be, with the data list that train.py reads."""

from pathlib import Path

import numpy as np

from kontext_min.checkpoints.save import write_json
from kontext_min.data.buckets import Size
from kontext_min.nano.edits import HELD_OUT, example, to_image
from kontext_min.nano.held_out import held_out_example

SIZE = Size(96, 96)


def write_pairs(edit: str, folder: Path, count: int, replay: float = 0.0) -> str:
    """`count` training examples of an edit, a share of them replaced by `replay`, under `folder`. -> what to do next

    reference-1/ and so on, target/ with the captions, and data.json, the data list; replayed pairs have sets of their
    own. Raises ValueError if the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder")
    r, data, make = np.random.default_rng([6, len(edit)]), {}, held_out_example if edit in HELD_OUT else example
    for i in range(count):
        if r.random() < replay:
            task, prefix = example("train", 2 * 10**6 + i, SIZE), "replay-"
            if len(task.references) != 1:
                task = example("train", 2 * 10**6 + i, SIZE, "keep")
        else:
            task, prefix = make("train", 3 * 10**6 + i, SIZE, edit), ""
        target, ids = f"{prefix}target", [f"{prefix}reference-{k}" for k in range(1, len(task.references) + 1)]
        for part, picture in zip([target, *ids], [task.target, *task.references], strict=True):
            (folder / part).mkdir(parents=True, exist_ok=True)
            to_image(picture).save(folder / part / f"{i:04d}.jpg", quality=95, subsampling=0)
            data[part] = {"id": part, "instance_data_dir": str(folder / part), "conditioning_type": "reference_strict"}
        (folder / target / f"{i:04d}.txt").write_text(task.prompt + "\n")
        data[target] = {
            "id": target, "conditioning_data": ids, "instance_data_dir": str(folder / target),
            "resolution": SIZE.width, "resolution_type": "pixel",
        }  # fmt: skip
    write_json(folder / "data.json", list(data.values()))
    return f"{count} pairs; train with data_backend_config={folder / 'data.json'}"
