"""The edits of `edits.HELD_OUT`, which only the autoencoder sees in pretraining, and pairs of any edit for LoRAs."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from kontext_min.checkpoints.save import write_json
from kontext_min.data.buckets import Size
from kontext_min.nano.edits import HELD_OUT, SPLITS, Example, any_picture, blurred, example, from_image, gray, to_image
from kontext_min.nano.scenes import Picture, cover, draw, exchange, pick, random_scene

SIZE = Size(96, 96)  # of pairs
SEPIA = np.array([[0.393, 0.349, 0.272], [0.769, 0.686, 0.534], [0.189, 0.168, 0.131]], np.float32)


def sketch(picture: Picture) -> Picture:
    """Dark lines on white: luma divided by its blurred self (line width 1/40 of the short side)."""
    luma = gray(picture)
    return np.clip((luma + 0.05) / (blurred(luma, 40) + 0.05), 0, 1) ** 3


def mosaic(picture: Picture) -> Picture:
    """Flat squares, twelve along the short side."""
    image = to_image(picture)
    cell = min(image.size) / 12
    small = image.resize((round(image.width / cell), round(image.height / cell)), Image.BOX)
    return from_image(small.resize(image.size, Image.NEAREST))


def outline(picture: Picture) -> Picture:
    """A black line wherever brightness or colour changes abruptly (line width 1/40 of the short side)."""
    wide = max(1, round(min(picture.shape[:2]) / 80))
    edges = sum(np.abs(np.roll(picture, wide, axis) - np.roll(picture, -wide, axis)).sum(-1) for axis in (0, 1))
    return picture * np.clip(1.6 - 2 * edges, 0, 1)[..., None].astype(np.float32)


def hollow(r: np.random.Generator, size: Size) -> tuple[str, Picture, Picture]:
    """One object of a scene becomes a ring through which one sees what is behind. -> prompt, reference, target"""
    scene = random_scene(r)
    thing = pick(r, scene.objects)
    hole = cover(replace(thing, radius=0.62 * thing.radius), size)
    reference, behind = draw(scene, size), draw(exchange(scene, thing), size)
    return f"hollow out the {thing.name}", reference, reference * (1 - hole) + behind * hole


def inset(picture: Picture, second: Picture) -> Picture:
    """The second picture at half its size in the lower right corner of the first."""
    height, width = picture.shape[:2]
    result, small = picture.copy(), to_image(second).resize((width // 2, height // 2), Image.BOX)
    result[height - height // 2 :, width - width // 2 :] = from_image(small)
    return result


def compress(picture: Picture) -> Picture:
    """What "jpeg clean-up" starts from: quality 12."""
    buffer = io.BytesIO()
    to_image(picture).save(buffer, "JPEG", quality=12)
    return from_image(Image.open(buffer))


# name in HELD_OUT: (prompt, function); the first group makes the target of one picture, the second one its reference
TARGETS = {
    "invert": ("invert the colors", lambda picture: 1 - picture),
    "sketch": ("turn the picture into a pencil sketch", sketch),
    "sepia": ("give the picture a sepia tone", lambda picture: np.clip(picture @ SEPIA, 0, 1)),
    "mosaic": ("turn the picture into a mosaic", mosaic),
    "outline": ("outline everything in black", outline),
}
DEGRADATIONS = {
    "deblur": ("deblur the picture", lambda picture: blurred(picture, 40)),
    "jpeg clean-up": ("clean up the jpeg artifacts", compress),
}


def held_out_example(split: str, index: int, size: Size, edit: str) -> Example:
    """Example number `index` of "train" or "validation" of one of HELD_OUT."""
    r = np.random.default_rng([SPLITS[split], 5, index])
    if edit == "hollow":
        prompt, reference, target = hollow(r, size)
        return Example(edit, prompt, (reference,), target)
    photograph, picture = any_picture(r, split, size)
    if edit == "inset":
        _, second = any_picture(r, split, size)
        return Example(edit, "inset the second picture", (picture, second), inset(picture, second), photograph)
    prompt, change = (TARGETS | DEGRADATIONS)[edit]
    changed = change(picture).astype(np.float32)
    reference, target = (changed, picture) if edit in DEGRADATIONS else (picture, changed)
    return Example(edit, prompt, (reference,), target, photograph)


def write_pairs(edit: str, folder: Path, count: int, replay: float = 0.0) -> str:
    """`count` training examples of an edit, a share replaced by known edits, with data.json. -> what to do next"""
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
