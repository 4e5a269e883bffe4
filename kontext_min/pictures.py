"""Pictures of pictures: how near two are, and sheets of them with captions."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

MARGIN, LINE = 8, 18  # pixels of a sheet
SHOWN = 256  # small pictures are enlarged to about this on a sheet


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, in dB; 99 when they are equal, or nearly."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return min(99.0, 10 * math.log10(255**2 / max(error, 1e-9)))


def sheet(rows: list[tuple[str, list[tuple[str, Image.Image]]]]) -> Image.Image:
    """A contact sheet: rows one below the other."""
    strips = [strip(title, cells) for title, cells in rows]
    page = Image.new("RGB", (max(row.width for row in strips), sum(row.height for row in strips) + MARGIN), "white")
    top = MARGIN
    for row in strips:
        page.paste(row, (0, top))
        top += row.height
    return page


def strip(title: str, cells: list[tuple[str, Image.Image]]) -> Image.Image:
    """A row of a sheet: a title above captioned pictures, small ones enlarged without smoothing."""
    zoom = max(1, SHOWN // max(max(image.size) for _, image in cells))
    cells = [(label, ImageOps.scale(image, zoom, Image.Resampling.NEAREST)) for label, image in cells]
    width, height = sum(image.width + MARGIN for _, image in cells), max(image.height for _, image in cells)
    row = Image.new("RGB", (width + MARGIN, height + 2 * LINE + MARGIN), "white")
    pen, font, left = ImageDraw.Draw(row), ImageFont.load_default(13), MARGIN
    pen.text((left, 0), title, fill="black", font=font)
    for label, image in cells:
        pen.text((left, LINE), label, fill="gray", font=font)
        row.paste(image, (left, 2 * LINE))
        left += image.width + MARGIN
    return row
