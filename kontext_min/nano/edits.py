"""What nano learns to do: instruction templates and the exact result of each edit, on scenes and on photographs.

`example(split, index, size)` is the whole data set: the same arguments always give the same picture pair.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from kontext_min.data.buckets import Size
from kontext_min.nano.scenes import (
    COLOURS,
    PLACES,
    RADIUS,
    SHAPES,
    Background,
    Object,
    Picture,
    Scene,
    draw,
    heap_of_leaves,
    pick,
    place_of,
    random_scene,
)

PHOTOS = Path(__file__).parents[2] / "configs" / "photos"
# Never in pretraining, so that a LoRA has something to teach: name -> words that would give it away in a prompt.
HELD_OUT = {
    "invert": ("invert", "negative"),
    "sketch": ("sketch", "pencil"),
    "sepia": ("sepia", "vintage"),
    "mosaic": ("mosaic", "pixelate"),
    "outline": ("outline", "contour"),
    "hollow": ("hollow", "ring"),
    "inset": ("inset",),
    "deblur": ("deblur", "sharpen", "resolution"),
    "jpeg clean-up": ("jpeg", "artifact", "restore"),
}

# fmt: off
MIX = {  # share of each edit in pretraining
    "recolour": 0.14, "remove": 0.10, "add": 0.13, "move": 0.13, "background": 0.08,
    "resize": 0.03, "reshape": 0.04, "swap": 0.02, "insert": 0.06,
    "grayscale": 0.04, "darker": 0.03, "brighter": 0.03, "flip": 0.05, "border": 0.03, "blur": 0.02,
    "keep": 0.03,
    "text to image": 0.04,
}
TEMPLATES = {
    "recolour": ("make the {thing} {colour}", "change the color of the {thing} to {colour}", 
                 "turn the {thing} {colour}", "paint the {thing} {colour}", "recolor the {thing} to {colour}"),
    "remove": ("remove the {thing}", "delete the {thing}", "erase the {thing}", "take away the {thing}"),
    "add": ("add a {thing} {place}", "put a {thing} {place}", "draw a {thing} {place}"),
    "move": ("move the {thing} {place}", "shift the {thing} {place}"),
    "background": ("make the background {colour}", "change the background to {colour}",
                   "replace the background with plain {colour}"),
    "resize": ("make the {thing} {how}", "draw the {thing} {how}"),
    "reshape": ("turn the {thing} into a {shape}", "replace the {thing} with a {shape}"),
    "swap": ("swap the {thing} and the {other}", "exchange the {thing} and the {other}"),
    "insert": ("put the object of the second picture {place}", "add the object from the second picture {place}"),
    "grayscale": ("make it black and white", "convert the image to grayscale", "turn the picture gray",
                  "remove the colors"),
    "darker": ("make the image darker", "darken the picture", "make it darker"),
    "brighter": ("make the image brighter", "brighten the picture", "make it brighter"),
    "flip": ("flip the image horizontally", "mirror the picture", "flip it left to right"),
    "border": ("add a {colour} border", "put a {colour} frame around the picture"),
    "blur": ("blur the image", "make the picture blurry"),
    "keep": ("keep the image unchanged", "do nothing", "keep it the same"),
}
# fmt: on
OBJECT_EDITS = ("recolour", "remove", "add", "move", "background")
FURTHER_EDITS = ("resize", "reshape", "swap", "insert")  # tried, without a promise
GLOBAL_EDITS = ("grayscale", "darker", "brighter", "flip", "border", "blur")
PHOTO_SHARE, LEAVES_SHARE = 0.35, 0.3  # of the global edits and of keep; the rest are scenes
SPLITS = {"train": 1, "validation": 2}


@dataclass(frozen=True)
class Example:
    """One editing task with one reference, two (insert) or none (text to image). Pictures are (H, W, 3) in 0..1."""

    edit: str
    prompt: str
    references: tuple[Picture, ...]
    target: Picture
    photograph: bool = False


def say(r: np.random.Generator, edit: str, **words: str) -> str:
    """One of the edit's templates, filled in."""
    return pick(r, TEMPLATES[edit]).format(**words)


def as_written(r: np.random.Generator, prompt: str) -> str:
    """ "an" before a vowel; and people write a capital letter or a full stop at times."""
    prompt = re.sub(r"\ba (?=orange)", "an ", prompt)
    prompt = prompt[0].upper() + prompt[1:] if r.random() < 0.25 else prompt
    return prompt + "." if r.random() < 0.15 else prompt


def call(r: np.random.Generator, thing: Object, scene: Scene) -> str:
    """An object's name; at times only its shape, if no other object has it."""
    same_shape = [other for other in scene.objects if other.shape == thing.shape]
    return thing.shape if len(same_shape) == 1 and r.random() < 0.15 else thing.name


def exchange(scene: Scene, old: Object, new: Object) -> Scene:
    """The scene with one object replaced."""
    return replace(scene, objects=tuple(new if thing is old else thing for thing in scene.objects))


def recolour(r: np.random.Generator, scene: Scene) -> tuple[str, Scene]:
    """Another colour for one object, not its own and not the background's."""
    thing = pick(r, scene.objects)
    colour = pick(r, [name for name in COLOURS if name not in (thing.colour, scene.background.colour)])
    new = replace(thing, colour=colour, rgb=COLOURS[colour])
    return say(r, "recolour", thing=call(r, thing, scene), colour=colour), exchange(scene, thing, new)


def remove(r: np.random.Generator, scene: Scene) -> tuple[str, Scene]:
    """One object less."""
    thing = pick(r, scene.objects)
    rest = tuple(other for other in scene.objects if other is not thing)
    return say(r, "remove", thing=call(r, thing, scene)), replace(scene, objects=rest)


def add(r: np.random.Generator, scene: Scene) -> tuple[str, Scene]:
    """A new object of the canonical colour and radius in a free cell."""
    cell = pick(r, scene.free_cells())
    taken = {thing.name for thing in scene.objects}
    kinds = [(s, c) for s in SHAPES for c in COLOURS if c != scene.background.colour and f"{c} {s}" not in taken]
    shape, colour = pick(r, kinds)
    new = Object(shape, colour, COLOURS[colour], cell, place_of(cell), RADIUS)
    prompt = say(r, "add", thing=new.name, place=f"in the {PLACES[cell]}")
    return prompt, replace(scene, objects=(*scene.objects, new))


def move(r: np.random.Generator, scene: Scene) -> tuple[str, Scene]:
    """One object goes to the centre of a free cell."""
    thing, cell = pick(r, scene.objects), pick(r, scene.free_cells())
    new = replace(thing, cell=cell, centre=place_of(cell))
    prompt = say(r, "move", thing=call(r, thing, scene), place=f"to the {PLACES[cell]}")
    return prompt, exchange(scene, thing, new)


def background(r: np.random.Generator, scene: Scene) -> tuple[str, Scene]:
    """A plain background of a colour that nothing in the scene has."""
    taken = {scene.background.colour, *(thing.colour for thing in scene.objects)}
    colour = pick(r, [name for name in COLOURS if name not in taken])
    return say(r, "background", colour=colour), replace(scene, background=Background("plain", colour, COLOURS[colour]))


def resize(r: np.random.Generator, scene: Scene) -> tuple[str, Scene]:
    """One object 0.6 or 1.35 times as large."""
    thing = pick(r, scene.objects)
    how, factor = pick(r, (("smaller", 0.6), ("bigger", 1.35)))
    new = replace(thing, radius=thing.radius * factor)
    return say(r, "resize", thing=call(r, thing, scene), how=how), exchange(scene, thing, new)


def reshape(r: np.random.Generator, scene: Scene) -> tuple[str, Scene]:
    """Another shape in place of one object."""
    thing = pick(r, scene.objects)
    shape = pick(r, [name for name in SHAPES if name != thing.shape])
    prompt = say(r, "reshape", thing=call(r, thing, scene), shape=shape)
    return prompt, exchange(scene, thing, replace(thing, shape=shape))


def swap(r: np.random.Generator, scene: Scene) -> tuple[str, Scene]:
    """Two objects exchange their places."""
    one, two = (scene.objects[i] for i in r.permutation(len(scene.objects))[:2])
    moved = {one: replace(one, cell=two.cell, centre=two.centre), two: replace(two, cell=one.cell, centre=one.centre)}
    prompt = say(r, "swap", thing=call(r, one, scene), other=call(r, two, scene))
    return prompt, replace(scene, objects=tuple(moved.get(thing, thing) for thing in scene.objects))


def gray(picture: Picture) -> Picture:
    """Luma on all three channels."""
    luma = picture @ np.array((0.299, 0.587, 0.114), np.float32)
    return np.repeat(luma[..., None], 3, axis=-1)


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


SCENE_EDITS = {edit.__name__: edit for edit in (recolour, remove, add, move, background, resize, reshape, swap)}
PICTURE_EDITS: dict[str, Callable[[Picture], Picture]] = {
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
    files = sorted((PHOTOS / {"train": "reference", "validation": "validation_reference"}[split]).glob("*.jpg"))
    if not files:
        raise FileNotFoundError(f"no photographs in {PHOTOS}; run this in a clone of the repository")
    return [Image.open(file).convert("RGB") for file in files]


def photo_crop(r: np.random.Generator, split: str, size: Size) -> Picture:
    """A random window of a random photograph; in training its channels are at times permuted or gamma-corrected."""
    photo = pick(r, photographs(split))
    largest = min(photo.width / size.width, photo.height / size.height)
    scale = largest * r.uniform(0.45, 1.0)
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


def text_to_image(r: np.random.Generator, size: Size) -> Example:
    """A caption and its picture: one or two canonical objects on a plain background."""
    scene = random_scene(r, most=2)
    objects = [Object(t.shape, t.colour, COLOURS[t.colour], t.cell, place_of(t.cell), RADIUS) for t in scene.objects]
    colour = scene.background.colour
    scene = Scene(Background("plain", colour, COLOURS[colour]), tuple(objects))
    things = " and ".join(f"a {thing.name} in the {PLACES[thing.cell]}" for thing in objects)
    return Example("text to image", as_written(r, f"{things} on a {colour} background"), (), draw(scene, size))


def insert(r: np.random.Generator, size: Size) -> Example:
    """The one object of a second picture goes into the first, in its own colour and the canonical radius."""
    scene, other = random_scene(r), random_scene(r, most=1)
    cell = pick(r, scene.free_cells())
    new = replace(other.objects[0], cell=cell, centre=place_of(cell), radius=RADIUS)
    target = replace(scene, objects=(*scene.objects, new))
    prompt = as_written(r, say(r, "insert", place=f"in the {PLACES[cell]}"))
    return Example("insert", prompt, (draw(scene, size), draw(other, size)), draw(target, size))


def example(split: str, index: int, size: Size, edit: str | None = None) -> Example:
    """Example number `index` of "train" or "validation" at `size`; `edit` is drawn from MIX unless it is given."""
    r = np.random.default_rng([SPLITS[split], index])
    drawn = r.choice(list(MIX), p=list(MIX.values()))
    edit = edit or str(drawn)
    if edit in ("text to image", "insert"):
        return (insert if edit == "insert" else text_to_image)(r, size)
    if edit in SCENE_EDITS:
        scene = random_scene(r, least=2 if edit == "swap" else 1)
        prompt, changed = SCENE_EDITS[edit](r, scene)
        return Example(edit, as_written(r, prompt), (draw(scene, size),), draw(changed, size))
    photograph, reference = any_picture(r, split, size)
    colour = pick(r, COLOURS) if edit == "border" else ""
    prompt = say(r, edit, colour=colour)
    target = framed(reference, colour) if edit == "border" else PICTURE_EDITS[edit](reference)
    return Example(edit, as_written(r, prompt), (reference,), target, photograph)


def any_picture(r: np.random.Generator, split: str, size: Size) -> tuple[bool, Picture]:
    """A photograph (True), a heap of leaves or a scene."""
    kind = r.random()
    if kind < PHOTO_SHARE:
        return True, photo_crop(r, split, size)
    if kind < PHOTO_SHARE + LEAVES_SHARE:
        return False, heap_of_leaves(r, size)
    return False, draw(random_scene(r), size)
