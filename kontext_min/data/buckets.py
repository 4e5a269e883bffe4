"""Picture sizes, and the one geometric transform: centre-crop to an aspect, then resize. Nothing is stretched."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

LANCZOS = Image.Resampling.LANCZOS
ORIENTATION = 0x0112  # of EXIF: 5 to 8 are turned by a quarter


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    def floored(self, multiple: int) -> "Size":
        """Both sides floored to a multiple, at least one multiple."""
        return Size(*(max(multiple, side // multiple * multiple) for side in self))


def parse_size(text: str) -> Size:
    """'1024x768' -> Size(1024, 768)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"a size is WIDTHxHEIGHT in pixels, such as 1024x768; got {text!r}")
    return Size(int(width), int(height))


def nearest_aspect(size: Size, choices: Sequence[Size]) -> Size:
    """The choice whose width / height is nearest to the exact one; a tie goes to the narrower (BFL's rule)."""
    aspect = size.width / size.height
    return min(choices, key=lambda choice: (abs(aspect - choice.width / choice.height), *choice))


def bucket_size(size: Size, resolution: int, multiple: int) -> Size:
    """The size of about resolution^2 pixels nearest to a picture's aspect, both sides multiples of `multiple`."""
    aspect = size.width / size.height
    width = max(multiple, round(resolution * aspect**0.5 / multiple) * multiple)
    height = max(multiple, round(resolution / aspect**0.5 / multiple) * multiple)
    return Size(width, height)


def crop_box(size: Size, aspect: Size) -> tuple[float, float, float, float]:
    """The largest centred (left, upper, right, lower) of a picture with the aspect of another size, in exact pixels."""
    width = min(size.width, size.height * aspect.width / aspect.height)
    height = min(size.height, size.width * aspect.height / aspect.width)
    left, upper = (size.width - width) / 2, (size.height - height) / 2
    return left, upper, left + width, upper + height


def fit(image: Image.Image, size: Size) -> Image.Image:
    """Centre-crop to the aspect of `size`, then resize to it with LANCZOS; the crop is exact, not rounded to pixels."""
    if image.size == size:
        return image
    return image.resize(size, LANCZOS, box=crop_box(Size(*image.size), size))


def share_cut(size: Size, aspect: Size) -> float:
    """The share of a picture's area that `fit` cuts off, 0 to 1."""
    left, upper, right, lower = crop_box(size, aspect)
    return 1 - (right - left) * (lower - upper) / (size.width * size.height)


def open_image(path: Path) -> Image.Image:
    """A picture as RGB, turned as its EXIF says; transparency is laid on white. One sentence if it cannot be read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        return to_rgb(image)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable picture ({error})") from error


def oriented_size(path: Path) -> Size:
    """The size of a picture as `open_image` would give it, from its header alone."""
    with Image.open(path) as image:
        turned = image.getexif().get(ORIENTATION, 1) >= 5
        return Size(image.height, image.width) if turned else Size(image.width, image.height)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB; 16-bit grey is scaled, transparency laid on white."""
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")
