"""Drawn pictures: one to three coloured shapes on a background, what is done to them, and heaps of leaves.

Coordinates: x and y run from -1 to 1 over the picture's width and height; radii are in halves of its short side.
Pictures are float32 arrays (H, W, 3) in 0..1. Every random draw comes from the generator that is passed in.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from kontext_min.data.buckets import Size

Picture = np.ndarray  # (H, W, 3) float32 in 0..1

COLOURS: dict[str, tuple[float, ...]] = {
    "red":   (0.86, 0.12, 0.13), "orange": (0.98, 0.55, 0.08), "yellow": (0.98, 0.88, 0.15),
    "green": (0.13, 0.65, 0.25), "blue":   (0.12, 0.30, 0.85), "purple": (0.58, 0.18, 0.75),
    "white": (0.97, 0.97, 0.97), "black":  (0.06, 0.06, 0.07),
}  # fmt: skip
PLACES = {  # cell (column, row): its name
    (-1, -1): "top left corner", (1, -1): "top right corner", (0, 0): "center",
    (-1, 1): "bottom left corner", (1, 1): "bottom right corner",
}  # fmt: skip
CELL = 0.55  # distance of the corner cells' centres from the middle
RADIUS = 0.38  # of objects that an edit adds; drawn ones vary around it; neighbours do not touch
PATTERNS = ("plain", "plain", "vertical gradient", "horizontal gradient", "stripes", "checker", "dots")
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Object:
    """A shape of one colour, `offset` from its cell's centre. `rgb` may differ a little from the canonical colour."""

    shape: str
    colour: str
    rgb: tuple[float, ...]
    cell: tuple[int, int]
    offset: tuple[float, float] = (0, 0)
    radius: float = RADIUS

    @property
    def name(self) -> str:  # as instructions call it, e.g. "red circle".
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects, the last one on top, before a pattern of `rgb` and a shade of it (radians, radians per unit)."""

    objects: tuple[Object, ...]
    pattern: str
    colour: str
    rgb: tuple[float, ...]
    angle: float = 0.0
    frequency: float = 10.0

    def free_cells(self) -> list[tuple[int, int]]:
        return [cell for cell in PLACES if cell not in {thing.cell for thing in self.objects}]


def pick(r: np.random.Generator, options):
    options = list(options)
    return options[r.integers(len(options))]


def circle_points(count: int, radius: float = 1.0, start: float = 0.0) -> np.ndarray:
    """`count` points on a circle, clockwise from the top. (count, 2)"""
    angles = start + np.arange(count) * (2 * np.pi / count)
    return radius * np.stack([np.sin(angles), -np.cos(angles)], axis=-1)


TURN = np.linspace(0, 2 * np.pi, 48, endpoint=False)
LOBES = -(13 * np.cos(TURN) - 5 * np.cos(2 * TURN) - 2 * np.cos(3 * TURN) - np.cos(4 * TURN)) - 2.5  # y of a heart
CROSS = np.array([(0.34, -1.0), (0.34, -0.34), (1.0, -0.34)])  # a quarter of its corners
SHAPES: dict[str, np.ndarray] = {  # name: polygon inside (about) the unit disc, (points, 2)
    "circle": circle_points(48, 0.95),
    "square": circle_points(4, 1.15, start=np.pi / 4),
    "triangle": circle_points(3, 1.15),
    "star": np.stack([circle_points(5, 1.12), circle_points(5, 0.5, start=np.pi / 5)], 1).reshape(10, 2),
    "heart": np.stack([16 * np.sin(TURN) ** 3, LOBES], axis=-1) / 15.5,
    "cross": np.concatenate([CROSS @ np.linalg.matrix_power([(0, 1), (-1, 0)], turns) for turns in range(4)]),
}


def cover(thing: Object, size: Size) -> Picture:  # how much of each pixel the object covers. (H, W, 1)
    fine = Size(size.width * SUPERSAMPLING, size.height * SUPERSAMPLING)
    middle = (np.array(thing.cell) * CELL + thing.offset + 1) / 2 * fine
    corners = middle + SHAPES[thing.shape] * thing.radius * min(fine) / 2
    mask = Image.new("L", fine)
    ImageDraw.Draw(mask).polygon(corners.flatten().tolist(), fill=255)
    return np.asarray(mask.reduce(SUPERSAMPLING), np.float32)[..., None] / 255


def draw(scene: Scene, size: Size) -> Picture:
    """The whole scene, with antialiased edges. Returns (H, W, 3)."""
    x, y = np.meshgrid(*((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1 for side in size))
    a, f = scene.angle, scene.frequency
    share = {
        "plain": lambda: np.zeros_like(x),
        "vertical gradient": lambda: (y + 1) / 2,
        "horizontal gradient": lambda: (x + 1) / 2,
        "stripes": lambda: np.clip(np.sin((x * np.cos(a) + y * np.sin(a)) * f) * 2 + 0.5, 0, 1),
        "checker": lambda: np.clip(np.sin(x * f) * np.sin(y * f) * 6 + 0.5, 0, 1),
        "dots": lambda: np.clip(2.2 - 8 * np.hypot((x * f / 4) % 1 - 0.5, (y * f / 4) % 1 - 0.5), 0, 1),
    }[scene.pattern]()
    first = np.array(scene.rgb, np.float32)
    second = first * 0.62 if first.mean() > 0.25 else first + 0.22
    picture = first + (second - first) * share[..., None].astype(np.float32)
    for thing in scene.objects:
        share = cover(thing, size)
        picture = picture * (1 - share) + np.array(thing.rgb, np.float32) * share
    return np.clip(picture, 0, 1).astype(np.float32)


def jitter(r: np.random.Generator, colour: str) -> tuple[float, ...]:
    return tuple(np.clip(np.array(COLOURS[colour]) + r.uniform(-0.04, 0.04, 3), 0, 1).tolist())


def random_scene(r: np.random.Generator, least: int = 1, most: int = 3) -> Scene:
    """`least` to `most` objects in different cells, no two alike, none in the background's colour."""
    ground = pick(r, COLOURS)
    pattern, rgb, angle, frequency = pick(r, PATTERNS), jitter(r, ground), r.uniform(0, np.pi), r.uniform(7, 14)
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS if colour != ground]
    cells, count, objects = list(PLACES), int(r.integers(least, most + 1)), []
    for kind, cell in zip(r.permutation(len(kinds))[:count], r.permutation(len(cells))[:count], strict=True):
        offset, radius = tuple(r.uniform(-0.04, 0.04, 2)), RADIUS * r.uniform(0.85, 1.05)
        shape, colour = kinds[kind]
        objects.append(Object(shape, colour, jitter(r, colour), cells[cell], offset, radius))
    return Scene(tuple(objects), pattern, ground, rgb, angle, frequency)


Task = tuple[dict[str, str], list[Scene]]  # the words of an instruction; the references, and last the target


def call(r: np.random.Generator, thing: Object, scene: Scene) -> str:
    alone = [other.shape for other in scene.objects].count(thing.shape) == 1
    return thing.shape if alone and r.random() < 0.15 else thing.name


def exchange(scene: Scene, old: Object, *new: Object) -> Scene:
    return replace(scene, objects=tuple(it for thing in scene.objects for it in (new if thing is old else [thing])))


CHANGES = {  # of one object: every way, as words of the instruction and new values of its fields, None to remove it
    "remove": lambda thing, scene: [({}, None)],
    "recolour": lambda thing, scene: [({"colour": name}, {"colour": name, "rgb": rgb}) for name, rgb in COLOURS.items()
                                      if name not in (thing.colour, scene.colour)],
    "move": lambda thing, scene: [({"place": PLACES[at]}, {"cell": at, "offset": (0, 0)}) for at in scene.free_cells()],
    "resize": lambda thing, scene: [({"how": "smaller"}, {"radius": thing.radius * 0.6}),
                                    ({"how": "bigger"}, {"radius": thing.radius * 1.35})],
    "reshape": lambda thing, scene: [({"shape": name}, {"shape": name}) for name in SHAPES if name != thing.shape],
}  # fmt: skip


def change(r: np.random.Generator, scene: Scene, edit: str) -> Task:
    thing = pick(r, scene.objects)
    words, fields = pick(r, CHANGES[edit](thing, scene))
    new = [] if fields is None else [replace(thing, **fields)]
    return {"thing": call(r, thing, scene), **words}, [scene, exchange(scene, thing, *new)]


def add(r: np.random.Generator, scene: Scene) -> Task:  # a new object of the canonical colour and radius in a free cell
    cell, taken = pick(r, scene.free_cells()), {thing.name for thing in scene.objects}
    shape, colour = pick(r, [(s, c) for s in SHAPES for c in COLOURS if c != scene.colour and f"{c} {s}" not in taken])
    new = Object(shape, colour, COLOURS[colour], cell)
    return {"thing": new.name, "place": PLACES[cell]}, [scene, replace(scene, objects=(*scene.objects, new))]


def background(r: np.random.Generator, scene: Scene) -> Task:
    taken = {scene.colour, *(thing.colour for thing in scene.objects)}
    colour = pick(r, [name for name in COLOURS if name not in taken])
    return {"colour": colour}, [scene, Scene(scene.objects, "plain", colour, COLOURS[colour])]


def swap(r: np.random.Generator, scene: Scene) -> Task:
    one, two = (scene.objects[i] for i in r.permutation(len(scene.objects))[:2])
    half = exchange(scene, one, replace(one, cell=two.cell, offset=two.offset))
    changed = exchange(half, two, replace(two, cell=one.cell, offset=one.offset))
    return {"thing": call(r, one, scene), "other": call(r, two, scene)}, [scene, changed]


def insert(r: np.random.Generator, scene: Scene) -> Task:
    other = random_scene(r, most=1)
    cell = pick(r, scene.free_cells())
    new = replace(other.objects[0], cell=cell, offset=(0, 0), radius=RADIUS)
    return {"place": PLACES[cell]}, [scene, other, replace(scene, objects=(*scene.objects, new))]


def text_to_image(r: np.random.Generator, scene: Scene) -> Task:
    objects = tuple(Object(thing.shape, thing.colour, COLOURS[thing.colour], thing.cell) for thing in scene.objects)
    things = " and ".join(f"a {thing.name} in the {PLACES[thing.cell]}" for thing in objects)
    return {"things": things, "colour": scene.colour}, [Scene(objects, "plain", scene.colour, COLOURS[scene.colour])]


EDITS = {edit.__name__.replace("_", " "): edit for edit in (add, background, swap, insert, text_to_image)}
EDITS |= {name: partial(change, edit=name) for name in CHANGES}


def heap_of_leaves(r: np.random.Generator, size: Size) -> Picture:
    """Like a photograph to a small model: shards, their sizes by a power law (Lee, Mumford, Huang 2001). (H, W, 3)"""
    fine = Size(size.width * 2, size.height * 2)
    palette = np.clip(r.uniform(0.1, 0.9) + r.normal(0, 0.22, (8, 1)) + r.normal(0, r.uniform(0, 0.2), (8, 3)), 0, 1)
    image = Image.new("RGB", fine, rgb8(palette[0]))
    pen = ImageDraw.Draw(image)
    radii = 0.05 / r.uniform(0.03, 1, int(r.integers(20, 120))) ** 0.9
    for radius in -np.sort(-radii * r.uniform(0.6, 1.6, len(radii))):
        corners = circle_points(pick(r, (3, 4, 5, 24)), start=r.uniform(0, 2 * np.pi)) * r.uniform(0.4, 1.2, 2)
        corners = (r.uniform(-1, 1, 2) + 1) / 2 * fine + corners * radius * min(fine) / 2
        pen.polygon(corners.flatten().tolist(), fill=rgb8(pick(r, palette) + r.normal(0, 0.05, 3)))
    picture = np.asarray(image.reduce(2), np.float32) / 255
    light = 0
    for cells in (2, 4, 9, 20):  # smooth random values with cells x cells bumps
        bumps = Image.fromarray(r.normal(0, 1, (cells, cells)).astype(np.float32)).resize(size, Image.BICUBIC)
        light = light + np.asarray(bumps)[..., None] * r.uniform(0, 0.25) / cells**0.5
    return np.clip(picture * (1 + light) + light / 4, 0, 1).astype(np.float32)


def rgb8(colour: np.ndarray) -> tuple[int, ...]:
    return tuple((np.clip(colour, 0, 1) * 255).astype(int).tolist())
