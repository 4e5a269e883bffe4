"""What nano learns and what is held out: prompts and exact results of every edit, as `example`, and pairs for LoRAs."""

import re
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import json5
import numpy as np
from PIL import Image, ImageFilter

from kontext_min.checkpoints.save import write_json
from kontext_min.data.buckets import Size
from kontext_min.data.degrade import degrade
from kontext_min.nano import scenes
from kontext_min.nano.scenes import COLOURS, Picture, draw, heap_of_leaves, pick, random_scene

PHOTOS = Path(__file__).parents[2] / "configs" / "photos"
MIX = json5.loads(Path(__file__).with_suffix(".json5").read_text(encoding="utf-8"))  # edit: share, its templates
PHOTO_SHARE, LEAVES_SHARE = 0.45, 0.15  # of the global edits and of keep; the rest are scenes; leaves only train
SPLITS = {"train": 1, "validation": 2}
SIZES = (Size(96, 96), Size(112, 80), Size(80, 112), Size(96, 96))  # in turn, of pairs for LoRAs and of held-out cases
SEPIA = np.array([[0.393, 0.349, 0.272], [0.769, 0.686, 0.534], [0.189, 0.168, 0.131]], np.float32)


@dataclass(frozen=True)
class Example:
    """One editing task with one reference, two (insert) or none (text to image). Pictures are (H, W, 3) in 0..1."""

    edit: str
    prompt: str
    references: tuple[Picture, ...]
    target: Picture
    photograph: bool = False


def instruction(r: np.random.Generator, edit: str, **words: str) -> str:
    prompt = pick(r, MIX[edit][1:]).format(**words)
    prompt = re.sub(r"\ba (?=orange)", "an ", prompt)
    prompt = prompt[0].upper() + prompt[1:] if r.random() < 0.25 else prompt
    return prompt + "." if r.random() < 0.15 else prompt


def gray(picture: Picture) -> Picture:
    return np.repeat(picture @ np.array([[0.299], [0.587], [0.114]], np.float32), 3, axis=-1)


def to_image(picture: Picture) -> Image.Image:  # 0..1 to an 8-bit PIL image
    return Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8))


def from_image(image: Image.Image) -> Picture:  # an 8-bit PIL image to 0..1
    return np.asarray(image.convert("RGB"), np.float32) / 255


def blurred(picture: Picture, share: int = 26) -> Picture:
    return from_image(to_image(picture).filter(ImageFilter.GaussianBlur(min(picture.shape[:2]) / share)))


def framed(picture: Picture, colour: str) -> Picture:
    picture, width = picture.copy(), round(min(picture.shape[:2]) / 14)
    for edge in (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:]):
        picture[edge] = COLOURS[colour]
    return picture


def sketch(picture: Picture) -> Picture:
    """Dark lines on white: luma divided by its blurred self (line width 1/40 of the short side)."""
    luma = gray(picture)
    return np.clip((luma + 0.05) / (blurred(luma, 40) + 0.05), 0, 1) ** 3


def mosaic(picture: Picture) -> Picture:
    """Squares of 8 pixels, each of their mean colour."""
    image = to_image(picture)
    small = image.resize((round(image.width / 8), round(image.height / 8)), Image.BOX)
    return from_image(small.resize(image.size, Image.NEAREST))


def outline(picture: Picture) -> Picture:
    """A black line wherever brightness or colour changes abruptly (line width 1/40 of the short side)."""
    wide = max(1, round(min(picture.shape[:2]) / 80))
    edges = sum(np.abs(np.roll(picture, wide, axis) - np.roll(picture, -wide, axis)).sum(-1) for axis in (0, 1))
    return picture * np.clip(1.6 - 2 * edges, 0, 1)[..., None].astype(np.float32)


def silhouette(r: np.random.Generator, size: Size) -> Example:
    scene = random_scene(r)
    gray = tuple(replace(thing, rgb=(0.5, 0.5, 0.5)) for thing in scene.objects)  # none of the colours that it knows
    target = draw(replace(scene, objects=gray), size)
    return Example("silhouette", "turn every object into a gray silhouette", (draw(scene, size),), target)


def inset(picture: Picture, second: Picture) -> Picture:
    height, width = picture.shape[:2]
    result, small = picture.copy(), to_image(second).resize((width // 2, height // 2), Image.BOX)
    result[height - height // 2 :, width - width // 2 :] = from_image(small)
    return result


def from_middle(picture: Picture) -> Picture:  # how far each pixel lies from the middle, 1 at the middle of an edge
    return np.hypot(*np.ogrid[-1 : 1 : picture.shape[0] * 1j, -1 : 1 : picture.shape[1] * 1j])[..., None]


def zoomed(picture: Picture) -> Picture:
    height, width = picture.shape[:2]
    box = (width / 6, height / 6, width * 5 / 6, height * 5 / 6)
    return from_image(to_image(picture).resize((width, height), Image.BICUBIC, box))


PICTURE_EDITS = {
    "grayscale": gray,
    "darker": lambda picture: picture * 0.5,
    "brighter": lambda picture: 1 - (1 - picture) * 0.5,
    "flip": lambda picture: np.ascontiguousarray(picture[:, ::-1]),
    "blur": blurred,
    "keep": lambda picture: picture,
    "contrast": lambda picture: np.clip((picture - 0.5) * 1.7 + 0.5, 0, 1),
    "vivid": lambda picture: np.clip(gray(picture) + 2 * (picture - gray(picture)), 0, 1),
    "warmer": lambda picture: np.clip(picture * np.float32([1.2, 1, 0.6]), 0, 1),
    "cooler": lambda picture: np.clip(picture * np.float32([0.6, 1, 1.2]), 0, 1),
    "posterize": lambda picture: np.round(picture * 3) / 3,
    "red and blue": lambda picture: np.ascontiguousarray(picture[..., ::-1]),
    "upside down": lambda picture: np.ascontiguousarray(picture[::-1]),
    "zoom": zoomed,
    "corners": lambda picture: picture * np.exp(-0.7 * from_middle(picture) ** 4),
    "glow": lambda picture: 1 - (1 - picture) * (1 - 0.6 * blurred(picture, 16)),
}
# held-out edit: (prompt, function); the first group makes the target of one picture, the second one its reference
TARGETS = {
    "invert": ("invert the colors", lambda picture: 1 - picture),
    "sketch": ("turn the picture into a pencil sketch", sketch),
    "sepia": ("give the picture a sepia tone", lambda picture: np.clip(picture @ SEPIA, 0, 1)),
    "mosaic": ("turn the picture into a mosaic", mosaic),
    "outline": ("outline everything in black", outline),
}
DEGRADATIONS = {
    "deblur": ("deblur the picture", lambda picture: blurred(picture, 40)),
    "jpeg clean-up": (
        "clean up the jpeg artifacts",
        lambda picture: from_image(degrade(to_image(picture), "jpeg", {"quality": 12}, np.random.default_rng(0))),
    ),
}
HELD_OUT = (*TARGETS, "silhouette", "inset", *DEGRADATIONS)  # never in pretraining, so that LoRAs have work to do


@cache
def photographs(split: str) -> list[Image.Image]:  # all photographs of "train" or "validation", sorted by name
    folder = PHOTOS / {"train": "reference", "validation": "validation_reference"}[split]
    return [Image.open(file).convert("RGB") for file in sorted(folder.glob("*.jpg"))]


def photo_crop(r: np.random.Generator, split: str, size: Size) -> Picture:
    """A random window of a random photograph; in training its channels are at times permuted or gamma-corrected."""
    photo = pick(r, photographs(split))
    scale = min(photo.width / size.width, photo.height / size.height) * r.uniform(0.45, 1.0)
    width, height = size.width * scale, size.height * scale
    left, top = r.uniform(0, photo.width - width), r.uniform(0, photo.height - height)
    picture = from_image(photo.resize(size, Image.LANCZOS, box=(left, top, left + width, top + height)))
    if r.random() < 0.5:
        picture = np.ascontiguousarray(picture[:, ::-1])
    if split == "train" and r.random() < 0.25:
        picture = np.ascontiguousarray(picture[..., r.permutation(3)])
    if split == "train" and r.random() < 0.4:
        picture = picture ** np.float32(np.exp(r.uniform(-0.5, 0.5)))
    return picture


def any_picture(r: np.random.Generator, split: str, size: Size) -> tuple[bool, Picture]:
    """A photograph (True), a heap of leaves or a scene."""
    kind = r.random()
    if kind < PHOTO_SHARE:
        return True, photo_crop(r, split, size)
    if split == "train" and kind < PHOTO_SHARE + LEAVES_SHARE:
        return False, heap_of_leaves(r, size)
    return False, draw(random_scene(r), size)


def example(split: str, index: int, size: Size, edit: str | None = None) -> Example:
    """Example `index` of "train" or "validation", always the same; `edit` is drawn from MIX unless it is given."""
    r = np.random.default_rng([SPLITS[split], 5, index] if edit in HELD_OUT else [SPLITS[split], index])
    if edit not in HELD_OUT:
        drawn = r.choice(list(MIX), p=[share for share, *_ in MIX.values()])
        edit = edit or str(drawn)
    if edit in scenes.EDITS:
        scene = random_scene(r, least=2 if edit == "swap" else 1, most=2 if edit == "text to image" else 3)
        words, drawings = scenes.EDITS[edit](r, scene)
        *references, target = (draw(scene, size) for scene in drawings)
        return Example(edit, instruction(r, edit, **words), tuple(references), target)
    if edit == "silhouette":
        return silhouette(r, size)
    photograph, picture = any_picture(r, split, size)
    if edit == "inset":
        _, second = any_picture(r, split, size)
        return Example(edit, "inset the second picture", (picture, second), inset(picture, second), photograph)
    if edit in HELD_OUT:
        prompt, change = (TARGETS | DEGRADATIONS)[edit]
    else:
        colour = pick(r, COLOURS) if edit == "border" else ""
        prompt, change = instruction(r, edit, colour=colour), PICTURE_EDITS.get(edit, partial(framed, colour=colour))
    changed = change(picture).astype(np.float32)
    reference, target = (changed, picture) if edit in DEGRADATIONS else (picture, changed)
    return Example(edit, prompt, (reference,), target, photograph)


def write_pairs(edit: str, folder: Path, count: int, replay: float = 0.0, sizes: tuple[Size, ...] = SIZES) -> str:
    """`count` pairs of an edit with their data.json; a share are known edits, to be kept. -> what to do next"""
    if count < 1 or not 0 <= replay <= 1:
        raise ValueError("pairs takes --count 1 or more, and --replay from 0 to 1")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder")
    r, data = np.random.default_rng([6, len(edit)]), {}
    for i in range(count):
        prefix, index = ("replay-", 2 * 10**6 + i) if r.random() < replay else ("", 3 * 10**6 + i)
        size = sizes[i % len(sizes)]
        task = example("train", index, size, None if prefix else edit)
        if prefix and len(task.references) != 1:
            task = example("train", index, size, "keep")
        target, ids = f"{prefix}target", [f"{prefix}reference-{k}" for k in range(1, len(task.references) + 1)]
        for part, picture in zip([target, *ids], [task.target, *task.references], strict=True):
            (folder / part).mkdir(parents=True, exist_ok=True)
            to_image(picture).save(folder / part / f"{i:04d}.jpg", quality=95, subsampling=0)
            data[part] = {"id": part, "instance_data_dir": str(folder / part), "conditioning_type": "reference_strict"}
        (folder / target / f"{i:04d}.txt").write_text(task.prompt + "\n")
        data[target] = {
            "id": target, "conditioning_data": ids, "instance_data_dir": str(folder / target),
            "resolution": SIZES[0].width, "resolution_type": "pixel_area", "is_regularisation_data": bool(prefix),
        }  # fmt: skip
    write_json(folder / "data.json", list(data.values()))
    return f"{count} pairs; train with data_backend_config={folder / 'data.json'}"
