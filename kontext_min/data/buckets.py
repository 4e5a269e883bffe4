"""Picture sizes, and the one geometric transform: centre-crop to an aspect, then resize. Nothing is stretched."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

LANCZOS = Image.Resampling.LANCZOS
ORIENTATION = 0x0112  # of EXIF: 5 to 8 are turned by a quarter
PNG_TURNED = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where a PNG may say it


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    def floored(self, multiple: int) -> "Size":  # both sides floored to a multiple, at least one multiple
        return Size(*(max(multiple, side // multiple * multiple) for side in self))


def parse_size(text: str) -> Size:  # '1024x768' -> Size(1024, 768)
    if found := re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text.lower(), re.ASCII):
        return Size(*map(int, found.groups()))
    raise ValueError(f"a size is WIDTHxHEIGHT in pixels, such as 1024x768, below 10000; got {text!r}")


def nearest_aspect(size: Size, choices: Sequence[Size]) -> Size:
    """The choice whose width / height is nearest to the exact one; a tie goes to the narrower (BFL's rule)."""
    return min(choices, key=lambda choice: (abs(size.width / size.height - choice.width / choice.height), *choice))


@dataclass(frozen=True)
class Geometry:
    """How the pictures of a set are brought to training size.
    resolution: of `unit` pixel_area (square root of the area, in pixels), pixel (shorter side) or area (megapixels).
    Unless `square`, a picture keeps its aspect, to 2 decimals, and only what the bucket's rounding asks for is cut.
    """

    resolution: float = 1024
    unit: str = "pixel_area"
    step: int = 64  # sides are multiples of it, in pixels
    square: bool = False
    style: str = "center"  # where the cut lies: center, corner (upper left) or random
    downsample: tuple[float, float] | None = None  # pictures above the first size are brought to the second beforehand

    def bucket(self, size: Size) -> Size:
        edge = (self.resolution * 1e6) ** 0.5 if self.unit == "area" else self.resolution
        aspect = 1 if self.square else round(size.width / size.height, 2) or 0.01
        if self.unit == "pixel":
            return rounded(edge * max(1, aspect), edge / min(1, aspect), self.step)
        return bucket_size(aspect, edge, self.step)

    def transform(self, size: Size, draw: tuple[float, float]) -> "Transform":
        """The one transform of a picture and its strict references. draw: two numbers in [0, 1) for style random."""
        bucket, first, large = self.bucket(size), None, extent(size, self.unit)
        box = crop_box(size, bucket, {"center": (0.5, 0.5), "corner": (0.0, 0.0), "random": draw}[self.style])
        if self.downsample and large > self.downsample[0]:
            shrink = (self.downsample[1] / large) ** (0.5 if self.unit == "area" else 1)
            first = Size(*(max(1, round(side * shrink)) for side in size))
        return Transform(bucket, box, first)


@dataclass(frozen=True)
class Transform:
    """Cut out a box of `crop_box` and resize it: the same for any pixel count."""

    size: Size
    box: tuple[float, float, float, float]
    first: Size | None = None  # resize the whole picture to this beforehand

    def __call__(self, image: Image.Image) -> Image.Image:  # apply to an RGB picture
        if self.first is not None:
            image = image.resize(self.first, LANCZOS)
        width, height = image.size
        left, upper, right, lower = self.box
        return image.resize(self.size, LANCZOS, box=(left * width, upper * height, right * width, lower * height))


def extent(size: Size, unit: str) -> float:  # how large a picture is, in the unit of `Geometry.resolution`
    area = size.width * size.height
    return {"pixel": min(size), "area": area / 1e6, "pixel_area": area**0.5}[unit]


def bucket_size(aspect: float, edge: float, step: int) -> Size:
    """The size of about edge^2 pixels nearest to an aspect, both sides multiples of `step`."""
    edge = rounded(edge, edge, step).width
    return rounded(edge * aspect**0.5, edge / aspect**0.5, step)


def rounded(width: float, height: float, step: int) -> Size:  # both sides rounded to multiples of `step`, at least one
    return Size(*(max(step, round(side / step) * step) for side in (width, height)))


def same_aspect(a: Size, b: Size) -> bool:
    """Whether two pictures are one frame at different pixel counts, up to the rounding of a side to whole pixels."""
    small, large = sorted((a, b), key=lambda size: size.width * size.height)
    across, down = large.width / small.width, large.height / small.height
    return abs(small.width - large.width / down) <= 1 or abs(small.height - large.height / across) <= 1


def crop_box(size: Size, aspect: Size, at: tuple[float, float] = (0.5, 0.5)) -> tuple[float, float, float, float]:
    """The largest box of another size's aspect, exact: (left, upper, right, lower) as shares of the picture's sides.
    at: where what is cut off lies, 0 to 1 across and down: all of it right and below, in equal parts, left and above.
    """
    width = min(1.0, size.height * aspect.width / aspect.height / size.width)
    height = min(1.0, size.width * aspect.height / aspect.width / size.height)
    left, upper = at[0] * (1 - width), at[1] * (1 - height)
    return left, upper, left + width, upper + height


def fit(image: Image.Image, size: Size) -> Image.Image:
    """Centre-crop to the aspect of `size`, then resize to it with LANCZOS; the crop is exact, not rounded to pixels."""
    return Transform(size, crop_box(Size(*image.size), size))(image)


def share_cut(size: Size, aspect: Size) -> float:  # the share of a picture's area that `fit` cuts off, 0 to 1
    left, upper, right, lower = crop_box(size, aspect)
    return 1 - (right - left) * (lower - upper)


def open_image(path: Path, ground: str = "white") -> Image.Image:
    """RGB, turned as its EXIF says; 16 bits become 8, transparency `ground`. One sentence if it cannot be read."""
    if not os.path.isfile(path):  # False also for names that no disk could hold
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        image = Image.open(path)
        image.filename = ""  # else Pillow maps an uncompressed TIFF that is to be turned by its other size
        image.getexif()
        for key in ("exif", "Raw profile type exif"):  # what is read may be too broken for Pillow to write it again
            image.info.pop(key, None)
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F"):
            raise ValueError("32 bits a channel; save it with 8 or 16")
        if image.mode.startswith("I;16"):
            image = image.convert("I").point(lambda value: value / 256).convert("L")
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, ground), rgba)
        return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large to be a photograph ({error}); shrink it first") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a readable picture ({str(error) or type(error).__name__})") from error


def oriented_size(path: Path) -> Size:  # the size of a picture as `open_image` would give it, without its pixels
    with Image.open(path) as image:
        upright = ORIENTATION in getattr(image, "tag_v2", ())  # a TIFF, whose size Pillow has turned
        if image.format == "PNG":  # getexif would decode it
            upright = not any(map(path.read_bytes().__contains__, PNG_TURNED))
        return Size(*image.size[:: -1 if not upright and image.getexif().get(ORIENTATION) in (5, 6, 7, 8) else 1])
