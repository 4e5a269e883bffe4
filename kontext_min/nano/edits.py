"""What nano learns: templates and exact results of each edit; `example(split, index, size)` is the whole data set."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from kontext_min.data.buckets import Size
from kontext_min.nano import scenes
from kontext_min.nano.scenes import COLOURS, Picture, draw, heap_of_leaves, pick, random_scene

PHOTOS = Path(__file__).parents[2] / "configs" / "photos"
# never in pretraining, so that a LoRA has something to teach
HELD_OUT = ("invert", "sketch", "sepia", "mosaic", "outline", "hollow", "inset", "deblur", "jpeg clean-up")

# fmt: off
MIX = {  # share of each edit in pretraining
    "recolour": 0.13, "remove": 0.10, "add": 0.15, "move": 0.15, "background": 0.08,
    "resize": 0.02, "reshape": 0.02, "swap": 0.01, "insert": 0.03,
    "grayscale": 0.06, "darker": 0.03, "brighter": 0.03, "flip": 0.06, "border": 0.03, "blur": 0.04,
    "keep": 0.03,
    "text to image": 0.03,
}
TEMPLATES = {
    "recolour": ("make the {thing} {colour}", "change the color of the {thing} to {colour}",
                 "turn the {thing} {colour}", "paint the {thing} {colour}", "recolor the {thing} to {colour}"),
    "remove": ("remove the {thing}", "delete the {thing}", "erase the {thing}", "take away the {thing}"),
    "add": ("add a {thing} in the {place}", "put a {thing} in the {place}", "draw a {thing} in the {place}"),
    "move": ("move the {thing} to the {place}", "shift the {thing} to the {place}"),
    "background": ("make the background {colour}", "change the background to {colour}",
                   "replace the background with plain {colour}"),
    "resize": ("make the {thing} {how}", "draw the {thing} {how}"),
    "reshape": ("turn the {thing} into a {shape}", "replace the {thing} with a {shape}"),
    "swap": ("swap the {thing} and the {other}", "exchange the {thing} and the {other}"),
    "insert": ("put the object of the second picture in the {place}",
               "add the object from the second picture in the {place}"),
    "grayscale": ("make it black and white", "convert the image to grayscale", "turn the picture gray",
                  "remove the colors"),
    "darker": ("make the image darker", "darken the picture", "make it darker"),
    "brighter": ("make the image brighter", "brighten the picture", "make it brighter"),
    "flip": ("flip the image horizontally", "mirror the picture", "flip it left to right"),
    "border": ("add a {colour} border", "put a {colour} frame around the picture"),
    "blur": ("blur the image", "make the picture blurry"),
    "keep": ("keep the image unchanged", "do nothing", "keep it the same"),
    "text to image": ("{things} on a {colour} background",),
}
# fmt: on
PHOTO_SHARE, LEAVES_SHARE = 0.45, 0.15  # of the global edits and of keep; the rest are scenes; leaves only train
SPLITS = {"train": 1, "validation": 2}


@dataclass(frozen=True)
class Example:
    """One editing task with one reference, two (insert) or none (text to image). Pictures are (H, W, 3) in 0..1."""

    edit: str
    prompt: str
    references: tuple[Picture, ...]
    target: Picture
    photograph: bool = False


def instruction(r: np.random.Generator, edit: str, **words: str) -> str:
    """One of the edit's templates, filled in; at times with a capital letter or a full stop, as people write."""
    prompt = pick(r, TEMPLATES[edit]).format(**words)
    prompt = re.sub(r"\ba (?=orange)", "an ", prompt)
    prompt = prompt[0].upper() + prompt[1:] if r.random() < 0.25 else prompt
    return prompt + "." if r.random() < 0.15 else prompt


def gray(picture: Picture) -> Picture:
    """Luma on all three channels."""
    return np.repeat(picture @ np.array([[0.299], [0.587], [0.114]], np.float32), 3, axis=-1)


def to_image(picture: Picture) -> Image.Image:
    """0..1 to an 8-bit PIL image."""
    return Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8))


def from_image(image: Image.Image) -> Picture:
    """An 8-bit PIL image to 0..1."""
    return np.asarray(image.convert("RGB"), np.float32) / 255


def blurred(picture: Picture, share: int = 26) -> Picture:
    """A Gaussian of 1/share of the short side."""
    return from_image(to_image(picture).filter(ImageFilter.GaussianBlur(min(picture.shape[:2]) / share)))


def framed(picture: Picture, colour: str) -> Picture:
    """A frame of 1/14 of the short side, inside the picture."""
    picture, width = picture.copy(), round(min(picture.shape[:2]) / 14)
    for edge in (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:]):
        picture[edge] = COLOURS[colour]
    return picture


PICTURE_EDITS = {
    "grayscale": gray,
    "darker": lambda picture: picture * 0.5,
    "brighter": lambda picture: 1 - (1 - picture) * 0.5,
    "flip": lambda picture: np.ascontiguousarray(picture[:, ::-1]),
    "blur": blurred,
    "keep": lambda picture: picture,
}


@cache
def photographs(split: str) -> list[Image.Image]:
    """All photographs of "train" or "validation", sorted by name."""
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


def example(split: str, index: int, size: Size, edit: str | None = None) -> Example:
    """Example `index` of "train" or "validation", always the same; `edit` is drawn from MIX unless it is given."""
    r = np.random.default_rng([SPLITS[split], index])
    drawn = r.choice(list(MIX), p=list(MIX.values()))
    edit = edit or str(drawn)
    if edit in scenes.EDITS:
        scene = random_scene(r, least=2 if edit == "swap" else 1, most=2 if edit == "text to image" else 3)
        words, drawings = scenes.EDITS[edit](r, scene)
        *references, target = (draw(scene, size) for scene in drawings)
        return Example(edit, instruction(r, edit, **words), tuple(references), target)
    photograph, reference = any_picture(r, split, size)
    colour = pick(r, COLOURS) if edit == "border" else ""
    prompt = instruction(r, edit, colour=colour)
    target = framed(reference, colour) if edit == "border" else PICTURE_EDITS[edit](reference)
    return Example(edit, prompt, (reference,), target, photograph)


def any_picture(r: np.random.Generator, split: str, size: Size) -> tuple[bool, Picture]:
    """A photograph (True), a heap of leaves or a scene."""
    kind = r.random()
    if kind < PHOTO_SHARE:
        return True, photo_crop(r, split, size)
    if split == "train" and kind < PHOTO_SHARE + LEAVES_SHARE:
        return False, heap_of_leaves(r, size)
    return False, draw(random_scene(r), size)
