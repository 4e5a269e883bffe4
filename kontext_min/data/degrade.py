"""Degraded references: a clean target in, a blurred, noisy or compressed picture of the same size out.

Pictures have training size, so every pixel below is one that the model sees. The same generator gives the same bytes.
Every generator is a list of steps. Names and defaults of `superresolution` and `jpeg_artifacts` are SimpleTuner's.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Union

import json5
import numpy as np
from PIL import Image, ImageFilter
from PIL.Image import Image as Picture
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from kontext_min.data.pairs import near_miss
from kontext_min.foreign import TABLES

GRID = 8  # JPEG's blocks are 8x8 pixels
BLURS = {  # blur_type -> filters in order, each with its share of blur_radius
    "gaussian": [(ImageFilter.GaussianBlur, 1.0)],
    "box": [(ImageFilter.BoxBlur, 1.0)],
    "both": [(ImageFilter.BoxBlur, 0.7), (ImageFilter.GaussianBlur, 0.7)],
}


def ascending(ends: tuple[int, int]) -> tuple[int, int]:  # the ends of a range as they are
    if ends[0] > ends[1]:
        raise ValueError("it should be [lowest, highest]")
    return ends


Radius, Share = Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0, le=1)]  # in pixels; of full brightness
Quality = Annotated[int, Field(ge=1, le=100)]
TYPES = {  # parameter -> what it may be; all others are switches
    "blur_type": Literal[*BLURS], "blur_radius": Radius, "pre_blur_radius": Radius,
    "noise_level": Share, "block_noise_level": Share, "downscale_factor": Annotated[float, Field(ge=1)],
    "quality_mode": Literal["fixed", "range", "random"], "quality": Quality, "jpeg_quality": Quality,
    "quality_range": Annotated[tuple[Quality, Quality], AfterValidator(ascending)],
    "quality_list": Annotated[list[Quality], Field(min_length=1)],
    "compression_rounds": Annotated[int, Field(ge=1)], "round_quality_decay": Share, "quality_decay": Share,
    "subsampling": Literal["4:4:4", "4:2:2", "4:2:0"], "shift": Annotated[int, Field(ge=0, lt=GRID)] | bool,
}  # fmt: skip
# step or generator -> its parameters
DEFAULTS = json5.loads(Path(__file__).with_suffix(".json5").read_text(encoding="utf-8"))


def blur(image: Picture, rng: np.random.Generator, p: BaseModel) -> Picture:
    """Blur by a radius in pixels, a Gaussian's deviation or a box's reach; both: box, then Gaussian, 0.7 of it each."""
    for kind, share in BLURS[p.blur_type]:
        image = image.filter(kind(share * p.blur_radius))
    return image


def noise(image: Picture, rng: np.random.Generator, p: BaseModel, where: np.ndarray | bool = True) -> Picture:
    """Add normal noise to every channel on its own; the level, 0 to 1, is its deviation as a share of full white."""
    values = np.asarray(image, dtype=np.float32)  # (height, width, 3)
    added = rng.standard_normal(values.shape, dtype=np.float32) * np.float32(255 * p.noise_level)
    return Image.fromarray(np.rint(values + added * where).clip(0, 255).astype(np.uint8))


def block_noise(image: Picture, rng: np.random.Generator, p: BaseModel) -> Picture:
    rows, columns = np.ogrid[: image.height, : image.width]
    return noise(image, rng, p, ((rows % GRID == 0) | (columns % GRID == 0))[..., None])


def downscale(image: Picture, rng: np.random.Generator, p: BaseModel) -> Picture:
    """Shrink by a factor of at least 1, sides floored to whole pixels, and enlarge again; both bilinear."""
    small = [max(1, int(side / p.downscale_factor)) for side in image.size]
    return image.resize(small, Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BILINEAR)


def jpeg(image: Picture, rng: np.random.Generator, p: BaseModel) -> Picture:
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


def superresolution(p: BaseModel) -> list:  # steps, of which what is off is None or False: downscale, blur, noise, JPEG
    return [
        p.downscale_factor and {"type": "downscale", "downscale_factor": p.downscale_factor},
        {"type": "blur", "blur_type": p.blur_type, "blur_radius": p.blur_radius},
        p.add_noise and {"type": "noise", "noise_level": p.noise_level},
        p.jpeg_quality and {"type": "jpeg", "quality": p.jpeg_quality},
    ]


def jpeg_artifacts(p: BaseModel) -> list:
    key = {"fixed": "quality", "range": "quality_range", "random": "quality_list"}[p.quality_mode]
    once = {"type": "jpeg", key: getattr(p, key), "subsampling": p.subsampling}
    return [
        p.pre_blur and {"type": "blur", "blur_radius": p.pre_blur_radius},
        p.add_noise and {"type": "noise", "noise_level": p.noise_level},
        *({**once, "quality_decay": p.round_quality_decay**i} for i in range(p.compression_rounds)),
        p.enhance_blocks and {"type": "block_noise", "noise_level": p.block_noise_level},
    ]


STEPS = {"blur": blur, "noise": noise, "block_noise": block_noise, "downscale": downscale, "jpeg": jpeg}
GENERATORS = {"superresolution": superresolution, "jpeg_artifacts": jpeg_artifacts, "chain": lambda p: p.steps}
ALIASES, REFUSED = TABLES["GENERATOR_ALIASES"], TABLES["GENERATORS_REFUSED"]


def model(kind: str, defaults: dict, types: dict = TYPES) -> type[BaseModel]:
    """The parameters of a step or generator: name -> default; None is allowed where it is the default."""
    fields = {key: (types.get(key, bool), default) for key, default in defaults.items()}
    fields = {key: (of | None if default is None else of, default) for key, (of, default) in fields.items()}
    strict = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
    return create_model(kind, __config__=strict, type=(Literal[kind], kind), **fields)


MODELS = {kind: model(kind, defaults) for kind, defaults in DEFAULTS.items()}
STEP = Annotated[Union[*MODELS.values()], Field(discriminator="type")]  # {"type": "blur", "blur_radius": 1}
MODELS["chain"] = model("chain", {"steps": ...}, {"steps": Annotated[list[STEP], Field(min_length=1)]})


def degrade(image: Picture, name: str, parameters: Mapping, rng: np.random.Generator) -> Picture:
    """An RGB picture through the generator of that name or alias. Raises ValueError as `check` does."""
    assert image.mode == "RGB", image.mode
    return run(image, rng, check(name, parameters))


def run(image: Picture, rng: np.random.Generator, p: BaseModel) -> Picture:
    if p.type in STEPS:
        return STEPS[p.type](image, rng, p)
    for part in filter(None, GENERATORS[p.type](p)):
        image = run(image, rng, part if isinstance(part, BaseModel) else MODELS[part["type"]](**part))
    return image


def check(name: str, parameters: Mapping) -> BaseModel:
    """What `degrade` takes, complete. Raises ValueError: what was given, and what is allowed."""
    if name in REFUSED:
        remedy = "make those pictures yourself and name their dataset in conditioning_data"
        raise ValueError(f"type {name!r} is not generated here: {REFUSED[name]}; {remedy}")
    if name not in (known := (*GENERATORS, *ALIASES)):
        raise ValueError(f"type is {name!r}; known are {', '.join(known)}{near_miss(name, known)}")
    try:
        return MODELS[ALIASES.get(name, name)](**parameters)
    except ValidationError as error:
        first = error.errors()[0]
        where, names = ".".join(map(str, (name, *first["loc"]))), {key for kind in DEFAULTS.values() for key in kind}
        hint = near_miss(first["loc"][-1], names) if first["type"] == "extra_forbidden" else ""
        said = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where} is {first['input']!r}; {said[0].lower()}{said[1:]}{hint}") from error
