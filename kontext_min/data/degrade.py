"""Degraded references: a clean target in, a blurred, noisy or compressed picture of the same size out.

Works on the picture at training size, after crop and resize, so every pixel below is a pixel that the model sees.
Whatever is random comes from the generator that is passed in: the same generator gives the same bytes in any process.
Names and defaults of `superresolution` and `jpeg_artifacts` are SimpleTuner's (its parameters, none of its code).
"""

import difflib
import inspect
import io
import sys
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from PIL import Image, ImageFilter
from PIL.Image import Image as Picture

BILINEAR = Image.Resampling.BILINEAR
GRID = 8  # JPEG's blocks are 8x8 pixels

BLURS = {  # blur_type -> filters in order, each with its share of blur_radius
    "gaussian": [(ImageFilter.GaussianBlur, 1.0)],
    "box": [(ImageFilter.BoxBlur, 1.0)],
    "both": [(ImageFilter.BoxBlur, 0.7), (ImageFilter.GaussianBlur, 0.7)],
}
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
QUALITY_MODES = ("fixed", "range", "random")


# Steps: image, rng and their parameters -> a new image of the same size. The input is never changed.


def blur(image: Picture, rng: np.random.Generator, *, blur_type="gaussian", blur_radius=2.0) -> Picture:
    """Blur by a radius in pixels, a Gaussian's deviation or a box's reach; both: box, then Gaussian, 0.7 of it each."""
    for kind, share in BLURS[blur_type]:
        image = image.filter(kind(share * blur_radius))
    return image


def noise(image: Picture, rng: np.random.Generator, *, noise_level=0.02) -> Picture:
    """Add normal noise to every channel on its own; the level, 0 to 1, is the deviation as a share of full brightness.

    Rounded to the nearest, so the mean stays, save where black or white cuts it.
    """
    return add_normal(image, rng, noise_level, np.ones((1, 1), dtype=bool))


def add_normal(image: Picture, rng: np.random.Generator, level: float, where: np.ndarray) -> Picture:
    """Normal noise where a mask (height, width), or one that spreads to it, is true."""
    values = np.asarray(image, dtype=np.float32)  # (height, width, 3)
    added = rng.standard_normal(values.shape, dtype=np.float32) * np.float32(255 * level)
    return Image.fromarray(np.rint(values + added * where[..., None]).clip(0, 255).astype(np.uint8))


def downscale(image: Picture, rng: np.random.Generator, *, downscale_factor: float) -> Picture:
    """Shrink by a factor of at least 1, sides floored to whole pixels, and enlarge again; both bilinear."""
    small = [max(1, int(side / downscale_factor)) for side in image.size]
    return image.resize(small, BILINEAR).resize(image.size, BILINEAR)


def jpeg(
    image: Picture, rng: np.random.Generator, *, quality=25, quality_range=None, subsampling=None, shift=False
) -> Picture:
    """Compress once at a quality of 1 to 100, or at one drawn from `quality_range`, both ends included.

    `shift` moves the grid of blocks right and down: by 0 to 7 pixels, or true for 1 to 7 drawn for each direction.
    A second compression at the same quality changes little, unless its grid is another one.
    """
    if quality_range is not None:
        quality = rng.integers(*quality_range, endpoint=True)
    across, down = rng.integers(1, GRID, size=2) if shift is True else (int(shift), int(shift))
    padded = np.pad(np.asarray(image), ((down, 0), (across, 0), (0, 0)), mode="edge")
    encoded = compress(Image.fromarray(padded), quality, subsampling)
    return encoded.crop((across, down, across + image.width, down + image.height))


def compress(image: Picture, quality: int, subsampling: str | None) -> Picture:
    """Through JPEG and back; None is the encoder's own subsampling, 4:2:0."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(quality), subsampling=-1 if subsampling is None else subsampling)
    return Image.open(buffer).convert("RGB")


# Generators


def superresolution(  # noqa: PLR0913 (the parameters are the file format)
    image: Picture,
    rng: np.random.Generator,
    *,
    downscale_factor: float | None = None,
    blur_type="gaussian",
    blur_radius=2.0,
    add_noise=True,
    noise_level=0.02,
    jpeg_quality: int | None = None,
) -> Picture:
    """Downscale, blur, noise, JPEG, in this order; None leaves a step out. Units as in the steps above."""
    if downscale_factor is not None:
        image = downscale(image, rng, downscale_factor=downscale_factor)
    image = blur(image, rng, blur_type=blur_type, blur_radius=blur_radius)
    if add_noise:
        image = noise(image, rng, noise_level=noise_level)
    return image if jpeg_quality is None else compress(image, jpeg_quality, None)


def jpeg_artifacts(  # noqa: PLR0913 (the parameters are the file format)
    image: Picture,
    rng: np.random.Generator,
    *,
    quality_mode="fixed",
    quality=25,
    quality_range=(10, 50),
    quality_list=(10, 20, 30, 40),
    compression_rounds=1,
    round_quality_decay=0.9,
    subsampling: str | None = None,
    optimize=False,
    progressive=False,
    pre_blur=False,
    pre_blur_radius=0.5,
    add_noise=False,
    noise_level=0.01,
    enhance_blocks=False,
    block_noise_level=0.02,
) -> Picture:
    """Blur, noise, compression rounds, noise on the first row and column of every block, in this order.

    Every round takes a quality, by `quality_mode`: fixed (`quality`), range (drawn from it, both ends included) or
    random (drawn from the list), times decay^round, floored. `optimize` and `progressive` change a JPEG file but not
    its pixels, so they are accepted and have nothing to do.
    """
    draw = {
        "fixed": lambda: quality,
        "range": lambda: rng.integers(*quality_range, endpoint=True),
        "random": lambda: rng.choice(quality_list),
    }[quality_mode]
    if pre_blur:
        image = blur(image, rng, blur_radius=pre_blur_radius)
    if add_noise:
        image = noise(image, rng, noise_level=noise_level)
    for i in range(compression_rounds):
        image = compress(image, max(1, int(draw() * round_quality_decay**i)), subsampling)
    if enhance_blocks:
        rows, columns = np.ogrid[: image.height, : image.width]
        image = add_normal(image, rng, block_noise_level, (rows % GRID == 0) | (columns % GRID == 0))
    return image


def chain(image: Picture, rng: np.random.Generator, *, steps: Sequence[Mapping]) -> Picture:
    """Any of STEPS, one after another: [{"type": "blur", "blur_radius": 1}, {"type": "jpeg", "shift": true}, …]."""
    for step in steps:
        image = STEPS[step["type"]](image, rng, **without_type(step))
    return image


def without_type(step: Mapping) -> dict:
    """The parameters of a step."""
    return {key: value for key, value in step.items() if key != "type"}


GENERATORS: dict[str, Callable[..., Picture]] = {
    "superresolution": superresolution,
    "jpeg_artifacts": jpeg_artifacts,
    "chain": chain,
}
ALIASES = {
    "super_resolution": "superresolution",
    "lowres": "superresolution",
    "jpeg": "jpeg_artifacts",
    "compression": "jpeg_artifacts",
}
STEPS: dict[str, Callable[..., Picture]] = {  # of a chain; `jpeg` is one compression here
    "blur": blur,
    "noise": noise,
    "downscale": downscale,
    "jpeg": jpeg,
    "superresolution": superresolution,
    "jpeg_artifacts": jpeg_artifacts,
}
REFUSED = {  # SimpleTuner's other types, with their aliases -> why not
    name: reason
    for names, reason in [
        ("random_masks masks inpainting", "Kontext takes a picture to edit, not a mask"),
        ("canny edges", "finding edges needs OpenCV"),
        ("depth depth_map depth_midas", "it needs a depth network"),
        ("segmentation semantic_segmentation", "it needs a segmentation network"),
        ("optical_flow flow", "a still picture has no motion"),
        ("sdr sdr_downsample logc3_sdr hdr_to_sdr", "it is for pictures of high dynamic range, and these have 8 bits"),
        ("i2v_first_frame wan_i2v_first_frame", "it takes the first frame of a video, and these are stills"),
    ]
    for name in names.split()
}


def degrade(image: Picture, name: str, parameters: Mapping, rng: np.random.Generator) -> Picture:
    """An RGB picture through the generator of that name or alias. Raises ValueError as `check` does."""
    assert image.mode == "RGB", image.mode
    check(name, parameters)
    return GENERATORS[ALIASES.get(name, name)](image, rng, **parameters)


# Checks


def number(low: float, high=sys.float_info.max, *, whole=False) -> Callable[[object], bool]:
    """A test for a finite number from low to high."""
    kinds = int if whole else int | float
    return lambda v: isinstance(v, kinds) and not isinstance(v, bool) and low <= v <= high


def several(test: Callable[[object], bool], value: object) -> bool:
    """A list of at least one, all of which pass."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(test, value))


RADIUS = number(0), "a number of at least 0, in pixels"
LEVEL = number(0, 1), "a number from 0 to 1, a share of full brightness"
QUALITY = number(1, 100, whole=True), "a whole number from 1 to 100"
RULES: dict[str, tuple[Callable[[object], bool], str]] = {  # parameter -> test, and what passes it in words
    "downscale_factor":    (number(1), "a number of at least 1"),
    "blur_radius":         RADIUS,
    "pre_blur_radius":     RADIUS,
    "noise_level":         LEVEL,
    "block_noise_level":   LEVEL,
    "quality":             QUALITY,
    "jpeg_quality":        QUALITY,
    "quality_range":       (lambda v: several(QUALITY[0], v) and len(v) == 2 and v[0] <= v[1],
                            "[lowest, highest], two whole numbers from 1 to 100"),
    "quality_list":        (lambda v: several(QUALITY[0], v), "a list of whole numbers from 1 to 100"),
    "compression_rounds":  (number(1, whole=True), "a whole number of at least 1"),
    "round_quality_decay": (lambda v: LEVEL[0](v) and v > 0, "a number above 0, at most 1"),
    "shift":               (lambda v: isinstance(v, bool) or number(0, GRID - 1, whole=True)(v),
                            "true, false or a whole number from 0 to 7, in pixels"),
    "steps":               (lambda v: several(lambda step: isinstance(step, Mapping), v),
                            'a list of at least one step such as {"type": "blur"}'),
}  # fmt: skip
SWITCH = (lambda v: isinstance(v, bool)), "true or false"  # the rule of every other parameter
CHOICES = {"blur_type": BLURS, "quality_mode": QUALITY_MODES, "subsampling": SUBSAMPLINGS}
SWITCHED_BY = {  # of jpeg_artifacts: by default the second leaves the first without effect
    "quality_range": "quality_mode",
    "quality_list": "quality_mode",
    "pre_blur_radius": "pre_blur",
    "noise_level": "add_noise",
    "block_noise_level": "enhance_blocks",
}


def check(name: str, parameters: Mapping) -> None:
    """Whether `degrade` would take these. Raises ValueError: what was given, and what is allowed."""
    if isinstance(name, str) and name in REFUSED:
        raise ValueError(
            f"type {name!r} is not generated here: {REFUSED[name]}; make those pictures yourself and name their dataset"
            " in conditioning_data"
        )
    check_choice("type", name, [*GENERATORS, *ALIASES])
    function = GENERATORS[ALIASES.get(name, name)]
    check_parameters(name, function, parameters)
    if function is not chain:
        return
    for i, step in enumerate(parameters["steps"], 1):
        check_choice(f"step {i} of {name}: type", step.get("type"), STEPS)
        check_parameters(f"step {i} of {name}, {step['type']}", STEPS[step["type"]], without_type(step))


def check_parameters(where: str, function: Callable, parameters: Mapping):
    """Every parameter is known, allowed and used, and none that is needed is missing."""
    known = {key: p for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for key, value in parameters.items():
        if key not in known:
            raise ValueError(f"{where} has no parameter {key!r}; {nearest(key, known)}")
        if value is None and known[key].default is None:
            continue
        if key in CHOICES:
            check_choice(f"{where}: {key}", value, CHOICES[key])
            continue
        test, allowed = RULES.get(key, SWITCH)
        if not test(value):
            raise ValueError(f"{where}: {key} is {value!r}; it should be {allowed}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in parameters:
            raise ValueError(f"{where} needs {key}: {RULES[key][1]}")
    check_used(where, function, parameters)


def check_used(where: str, function: Callable, parameters: Mapping):
    """No parameter is given that another one makes useless."""
    if function is jpeg and "quality" in parameters and parameters.get("quality_range") is not None:
        raise ValueError(f"{where}: give quality or quality_range, not both")
    for key, switch in SWITCHED_BY.items() if function is jpeg_artifacts else ():
        if key in parameters and switch not in parameters:
            raise ValueError(f"{where}: {key} does nothing unless {switch} is given too")


def check_choice(what: str, value: object, allowed: Collection[str]):
    """One of some names."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{what} is {value!r}; {nearest(value, allowed)}")


def nearest(given: object, known: Collection[str]) -> str:
    """All that could have been meant, and what perhaps was."""
    near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.6)
    return f"known are {', '.join(known)}" + "".join(f"; did you mean {name}?" for name in near)
