"""Degraded references: a clean target in, a blurred, noisy or compressed picture of the same size out.

Pictures have training size, so every pixel below is one that the model sees. The same generator gives the same bytes.
Every generator is a list of steps. Names and defaults of `superresolution` and `jpeg_artifacts` are SimpleTuner's.
"""

import io
import sys
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageFilter
from PIL.Image import Image as Picture

from kontext_min.data.problems import near_miss

Parameters = SimpleNamespace  # all that DEFAULTS names for one step or generator
GRID = 8  # JPEG's blocks are 8x8 pixels
BLURS = {  # blur_type -> filters in order, each with its share of blur_radius
    "gaussian": [(ImageFilter.GaussianBlur, 1.0)],
    "box": [(ImageFilter.BoxBlur, 1.0)],
    "both": [(ImageFilter.BoxBlur, 0.7), (ImageFilter.GaussianBlur, 0.7)],
}
DEFAULTS = {  # step or generator -> its parameters
    "blur": {"blur_type": "gaussian", "blur_radius": 2.0},
    "noise": {"noise_level": 0.02},
    "block_noise": {"noise_level": 0.02},
    "downscale": {"downscale_factor": 2.0},
    "jpeg": {
        "quality": 25, "quality_range": None, "quality_list": None, "quality_decay": 1.0, "subsampling": None,
        "shift": False,
    },
    "superresolution": {
        "downscale_factor": None, "blur_type": "gaussian", "blur_radius": 2.0, "add_noise": True, "noise_level": 0.02,
        "jpeg_quality": None,
    },
    "jpeg_artifacts": {
        "quality_mode": "fixed", "quality": 25, "quality_range": (10, 50), "quality_list": (10, 20, 30, 40),
        "compression_rounds": 1, "round_quality_decay": 0.9, "subsampling": None,
        "pre_blur": False, "pre_blur_radius": 0.5, "add_noise": False, "noise_level": 0.01,
        "enhance_blocks": False, "block_noise_level": 0.02,
        "optimize": False, "progressive": False,  # they change a file, but not its pixels
    },
    "chain": {"steps": ()},
}  # fmt: skip


def blur(image: Picture, rng: np.random.Generator, p: Parameters) -> Picture:
    """Blur by a radius in pixels, a Gaussian's deviation or a box's reach; both: box, then Gaussian, 0.7 of it each."""
    for kind, share in BLURS[p.blur_type]:
        image = image.filter(kind(share * p.blur_radius))
    return image


def noise(image: Picture, rng: np.random.Generator, p: Parameters, where: np.ndarray | bool = True) -> Picture:
    """Add normal noise to every channel on its own; the level, 0 to 1, is its deviation as a share of full white."""
    values = np.asarray(image, dtype=np.float32)  # (height, width, 3)
    added = rng.standard_normal(values.shape, dtype=np.float32) * np.float32(255 * p.noise_level)
    return Image.fromarray(np.rint(values + added * where).clip(0, 255).astype(np.uint8))


def block_noise(image: Picture, rng: np.random.Generator, p: Parameters) -> Picture:
    """Noise on the first row and column of every block."""
    rows, columns = np.ogrid[: image.height, : image.width]
    return noise(image, rng, p, ((rows % GRID == 0) | (columns % GRID == 0))[..., None])


def downscale(image: Picture, rng: np.random.Generator, p: Parameters) -> Picture:
    """Shrink by a factor of at least 1, sides floored to whole pixels, and enlarge again; both bilinear."""
    small = [max(1, int(side / p.downscale_factor)) for side in image.size]
    return image.resize(small, Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BILINEAR)


def jpeg(image: Picture, rng: np.random.Generator, p: Parameters) -> Picture:
    """Compress once, at `quality` or at one drawn from a range (both ends included) or a list, times the decay.

    `shift` moves the grid of blocks right and down: by 0 to 7 pixels, or true for 1 to 7 drawn for each direction.
    """
    quality = p.quality
    if p.quality_range is not None:
        quality = rng.integers(*p.quality_range, endpoint=True)
    elif p.quality_list is not None:
        quality = rng.choice(p.quality_list)
    across, down = rng.integers(1, GRID, size=2) if p.shift is True else (int(p.shift), int(p.shift))
    padded = Image.fromarray(np.pad(np.asarray(image), ((down, 0), (across, 0), (0, 0)), mode="edge"))
    subsampling = p.subsampling or -1  # the encoder's own, 4:2:0
    padded.save(buffer := io.BytesIO(), "JPEG", quality=max(1, int(quality * p.quality_decay)), subsampling=subsampling)
    return Image.open(buffer).convert("RGB").crop((across, down, across + image.width, down + image.height))


def superresolution(p: Parameters) -> list:
    """The steps, of which what is off is None or False: downscale, blur, noise, JPEG."""
    return [
        p.downscale_factor and {"type": "downscale", "downscale_factor": p.downscale_factor},
        {"type": "blur", "blur_type": p.blur_type, "blur_radius": p.blur_radius},
        p.add_noise and {"type": "noise", "noise_level": p.noise_level},
        p.jpeg_quality and {"type": "jpeg", "quality": p.jpeg_quality},
    ]


def jpeg_artifacts(p: Parameters) -> list:
    """Blur, noise, rounds of JPEG, each with a quality of its own by `quality_mode`, noise on the edges of blocks."""
    key = {"fixed": "quality", "range": "quality_range", "random": "quality_list"}[p.quality_mode]
    once = {"type": "jpeg", key: getattr(p, key), "subsampling": p.subsampling}
    return [
        p.pre_blur and {"type": "blur", "blur_radius": p.pre_blur_radius},
        p.add_noise and {"type": "noise", "noise_level": p.noise_level},
        *({**once, "quality_decay": p.round_quality_decay**i} for i in range(p.compression_rounds)),
        p.enhance_blocks and {"type": "block_noise", "noise_level": p.block_noise_level},
    ]


# a chain's steps and other generators are as given: [{"type": "blur", "blur_radius": 1}, {"type": "jpeg"}, …]
STEPS = {"blur": blur, "noise": noise, "block_noise": block_noise, "downscale": downscale, "jpeg": jpeg}
GENERATORS = {"superresolution": superresolution, "jpeg_artifacts": jpeg_artifacts, "chain": lambda p: p.steps}
ALIASES = dict.fromkeys(("super_resolution", "lowres"), "superresolution")
ALIASES |= dict.fromkeys(("jpeg", "compression"), "jpeg_artifacts")


def degrade(image: Picture, name: str, parameters: Mapping, rng: np.random.Generator) -> Picture:
    """An RGB picture through the generator of that name or alias. Raises ValueError as `check` does."""
    assert image.mode == "RGB", image.mode
    check(name, parameters)
    return run(image, rng, {**parameters, "type": ALIASES.get(name, name)})


def run(image: Picture, rng: np.random.Generator, step: Mapping) -> Picture:
    """A picture through a step, or through those of a generator."""
    kind = step["type"]
    p = Parameters(**{**DEFAULTS[kind], **step})
    if kind in STEPS:
        return STEPS[kind](image, rng, p)
    for part in filter(None, GENERATORS[kind](p)):
        image = run(image, rng, part)
    return image


def number(low: float, high=sys.float_info.max, kinds=(int, float)) -> Callable[[object], bool]:
    """A test for a finite number from low to high."""
    return lambda v: isinstance(v, kinds) and not isinstance(v, bool) and low <= v <= high


def several(test: Callable[[object], bool]) -> Callable[[object], bool]:
    """A test for a list of at least one, all of which pass."""
    return lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(map(test, v))


PERCENT, BLUR_TYPES = number(1, 100, int), tuple(BLURS)
QUALITY_MODES, SUBSAMPLINGS = ("fixed", "range", "random"), ("4:4:4", "4:2:2", "4:2:0")
SWITCH = (lambda v: isinstance(v, bool)), "true or false"
RULES = {key: rule for keys, *rule in (  # parameters, test, and what passes it in words; all others are switches
    ("blur_type", BLUR_TYPES.__contains__, f"one of {', '.join(BLUR_TYPES)}"),
    ("blur_radius pre_blur_radius", number(0), "a number of at least 0, in pixels"),
    ("noise_level block_noise_level", number(0, 1), "a number from 0 to 1, a share of full brightness"),
    ("downscale_factor", number(1), "a number of at least 1"),
    ("compression_rounds", number(1, kinds=int), "a whole number of at least 1"),
    ("round_quality_decay quality_decay", number(sys.float_info.min, 1), "a number above 0, at most 1"),
    ("quality jpeg_quality", PERCENT, "a whole number from 1 to 100"),
    ("quality_mode", QUALITY_MODES.__contains__, f"one of {', '.join(QUALITY_MODES)}"),
    ("quality_range", lambda v: several(PERCENT)(v) and len(v) == 2 and v[0] <= v[1],
     "[lowest, highest], two whole numbers from 1 to 100"),
    ("quality_list", several(PERCENT), "a list of whole numbers from 1 to 100"),
    ("subsampling", SUBSAMPLINGS.__contains__, f"one of {', '.join(SUBSAMPLINGS)}"),
    ("shift", lambda v: isinstance(v, bool) or number(0, GRID - 1, int)(v),
     "true, false or a whole number from 0 to 7, in pixels"),
    ("steps", several(lambda v: isinstance(v, Mapping)), 'a list of at least one step such as {"type": "blur"}'),
) for key in keys.split()}  # fmt: skip
SWITCHED_BY = {  # of jpeg_artifacts: without the second, the first has no effect
    "quality_range": "quality_mode", "quality_list": "quality_mode", "pre_blur_radius": "pre_blur",
    "noise_level": "add_noise", "block_noise_level": "enhance_blocks",
}  # fmt: skip
REFUSED = {  # SimpleTuner's other types, with their aliases -> why not
    "random_masks masks inpainting": "Kontext takes a picture to edit, not a mask",
    "canny edges": "finding edges needs OpenCV",
    "depth depth_map depth_midas": "it needs a depth network",
    "segmentation semantic_segmentation": "it needs a segmentation network",
    "optical_flow flow": "a still picture has no motion",
    "sdr sdr_downsample logc3_sdr hdr_to_sdr": "it is for pictures of high dynamic range, and these have 8 bits",
    "i2v_first_frame wan_i2v_first_frame": "it takes the first frame of a video, and these are stills",
}


def check(name: str, parameters: Mapping):
    """Whether `degrade` would take these. Raises ValueError: what was given, and what is allowed."""
    for names, why in REFUSED.items():
        if name in names.split():
            remedy = "make those pictures yourself and name their dataset in conditioning_data"
            raise ValueError(f"type {name!r} is not generated here: {why}; {remedy}")
    if name not in (*GENERATORS, *ALIASES):
        raise ValueError(f"type is {name!r}; {known(name, (*GENERATORS, *ALIASES))}")
    check_parameters(name, ALIASES.get(name, name), parameters)


def check_parameters(where: str, kind: str, given: Mapping):
    """Every parameter of a step or generator is known and allowed, and so are those of a chain's steps."""
    defaults = DEFAULTS[kind]
    for key, value in {**defaults, **given}.items():
        if key not in defaults:
            raise ValueError(f"{where} has no parameter {key!r}; {known(key, defaults)}")
        test, allowed = RULES.get(key, SWITCH)
        if not test(value) and not (value is None and defaults[key] is None):
            raise ValueError(f"{where}: {key} is {value!r}; it should be {allowed}")
        if kind == "jpeg_artifacts" and key in given and SWITCHED_BY.get(key, key) not in given:
            raise ValueError(f"{where}: {key} does nothing unless {SWITCHED_BY[key]} is given too")
    for i, step in enumerate(given.get("steps", ()), 1):
        rest = dict(step)
        kind = rest.pop("type", None)
        if kind not in tuple(DEFAULTS):
            raise ValueError(f"step {i} of {where}: type is {kind!r}; {known(kind, DEFAULTS)}")
        check_parameters(f"step {i} of {where}, {kind}", kind, rest)


def known(given: object, names: Collection[str]) -> str:
    """All that could have been meant, and what perhaps was."""
    return f"known are {', '.join(names)}{near_miss(str(given or ''), names)}"
