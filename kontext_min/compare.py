"""Pictures compared: side by side on a page, in dB, and by the shift between two, measured by phase correlation."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

MARGIN, LINE = 8, 16  # pixels
RED = (200, 0, 0)
LOOKED_AT = 512  # pixels of the longer side that a shift is measured on
SMOOTHING = 0.12  # cycles per pixel: finer detail counts less, so that blurred and noisy pictures can be measured
PEAK, LEAD = 20, 2  # of a sure peak, times the rest's root mean square and the next one: measured, see the tests
MISALIGNED = 1.5  # pixels


def card(lines: list[str], cells: list[tuple[str, Image.Image]], side=256, shrink=False, red=False) -> Image.Image:
    """Lines of text above labelled pictures; in red if something is wrong with them.
    Small ones are enlarged without smoothing, by one whole number, to `side` pixels at most; `shrink` shrinks others.
    """
    zoom = max(1, side // max(max(image.size) for _, image in cells))
    images = [ImageOps.scale(image, zoom, Image.Resampling.NEAREST) for _, image in cells]
    if shrink:
        images = [ImageOps.contain(i, (side, side)) if max(i.size) > side else i for i in images]
    size = (max(i.width for i in images) + MARGIN, (len(lines) + 1) * LINE + max(i.height for i in images) + MARGIN)
    made = Image.new("RGB", (size[0] * len(cells) + MARGIN, size[1]), "white")
    pen = ImageDraw.Draw(made)
    for i, line in enumerate(lines):
        write(pen, (MARGIN, i * LINE), line, made.width - 2 * MARGIN, RED if red else "black")
    for i, ((label, _), image) in enumerate(zip(cells, images, strict=True)):
        left = MARGIN + i * size[0]
        write(pen, (left, len(lines) * LINE), label, size[0] - MARGIN, "gray")
        made.paste(image, (left, (len(lines) + 1) * LINE))
    if red:
        pen.rectangle([0, 0, made.width - 3, made.height - 3], outline=RED, width=3)
    return made


def write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, colour, size: int = 13):
    font, text = ImageFont.load_default(size), text[: width + 1]  # no letter is narrower than a pixel
    while font.getlength(text) > width and len(text) > 1:
        text = text[:-2].rstrip() + "…"
    pen.text(place, text, fill=colour, font=font)


def page(cards: list[Image.Image], columns: int = 1, heading: list[str] = ()) -> Image.Image:
    """Cards row by row below a heading, whose first line is large."""
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights, width = [max(made.height for made in row) for row in rows], max(made.width for made in cards)
    top = (len(heading) + 2) * LINE if heading else MARGIN
    whole = Image.new("RGB", (max(1000 if heading else 0, columns * width), top + sum(heights)), "white")
    pen = ImageDraw.Draw(whole)
    for i, line in enumerate(heading):
        write(pen, (MARGIN, i * LINE + (LINE if i else 0)), line, whole.width - 2 * MARGIN, "black", 13 if i else 26)
    for row, height in zip(rows, heights, strict=True):
        for column, made in enumerate(row):
            whole.paste(made, (column * width, top))
        top += height
    return whole


class Shift(NamedTuple):
    """How far the second picture's content lies to the right of and below the first's, in pixels."""

    dx: float
    dy: float
    confidence: float  # of at least 1: it can be believed

    @property
    def wrong(self) -> bool:  # whether the two are surely not one frame
        return self.confidence >= 1 and math.hypot(self.dx, self.dy) >= MISALIGNED

    def __str__(self) -> str:
        if self.confidence < 1:
            return "unknown"
        return "none" if max(abs(self.dx), abs(self.dy)) < 0.25 else f"{self.dx:+.1f}, {self.dy:+.1f} px"


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, in dB; 99 when they are equal, or nearly."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return min(99.0, 10 * math.log10(255**2 / max(error, 1e-9)))


def shift_between(a: Image.Image, b: Image.Image) -> Shift:
    """Measure the shift between two pictures of one size by phase correlation, to a fraction of a pixel.
    Brightness, colours and inversion do not matter. Where an edit left too little of the picture, or it repeats
    itself, the confidence is below 1. Source: Kuglin and Hines 1975, "The phase correlation image alignment method".
    """
    assert a.size == b.size, (a.size, b.size)
    factor = math.ceil(max(a.size) / LOOKED_AT)
    greys = [np.asarray(image.convert("L").reduce(factor), np.float64) for image in (a, b)]
    height, width = greys[0].shape
    window = np.hanning(height)[:, None] * np.hanning(width)[None]  # borders would else be taken for content
    spectra = [np.fft.rfft2((grey - (grey * window).sum() / max(window.sum(), 1)) * window) for grey in greys]
    cross = spectra[0].conj() * spectra[1]
    strength = np.abs(cross)
    if min(height, width) < 3 or not strength.any():  # too thin or a flat picture
        return Shift(0.0, 0.0, 0.0)
    squared = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width)[None] ** 2
    phases = np.where(strength > 1e-6 * strength.max(), cross / np.maximum(strength, 1e-12), 0)
    surface = np.abs(np.fft.irfft2(phases * np.exp(-squared / (2 * SMOOTHING**2)), s=(height, width)))
    y, x = np.unravel_index(surface.argmax(), surface.shape)
    surface = np.roll(surface, (height // 2 - y, width // 2 - x), (0, 1))  # the peak is brought to the middle
    dy = (y + below_pixel(surface[:, width // 2], height // 2) + height / 2) % height - height / 2
    dx = (x + below_pixel(surface[height // 2], width // 2) + width / 2) % width - width / 2
    moved = np.roll(greys[1], (-round(dy), -round(dx)), (0, 1))
    still, shifted = (float(np.mean(np.abs(greys[0] - other) < 4)) for other in (greys[1], moved))
    sure = still <= max(0.5, shifted)  # else most of it has stayed where it was, and a pattern repeats itself
    return Shift(float(dx * factor), float(dy * factor), confidence(surface) * sure)


def below_pixel(line: np.ndarray, at: int) -> float:
    """Where, from -0.5 to 0.5 pixels off, the Gaussian through a peak and its two neighbours is highest."""
    left, peak, right = np.log(np.maximum(line[at - 1 : at + 2], 1e-12))
    curvature = left - 2 * peak + right
    return 0.5 * (left - right) / curvature if curvature < 0 else 0.0


def confidence(surface: np.ndarray) -> float:
    rest = surface.copy()
    (y, x), near = (side // 2 for side in rest.shape), min(6, min(rest.shape) // 4)
    peak = rest[y, x]
    rest[y - near : y + near + 1, x - near : x + near + 1] = 0
    return float(min(peak / math.sqrt(np.mean(rest**2)) / PEAK, peak / rest.max() / LEAD))
