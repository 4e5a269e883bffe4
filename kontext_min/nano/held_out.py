"""The edits of `edits.HELD_OUT` that are functions of one picture: never in the transformer's pretraining.

The autoencoder may see such pictures (it has no notion of an edit); LoRAs and their evaluation are made of them.
"""

import io

import numpy as np
from PIL import Image, ImageFilter

from kontext_min.nano.edits import from_image, gray, to_image
from kontext_min.nano.scenes import Picture

SEPIA = np.array([[0.393, 0.349, 0.272], [0.769, 0.686, 0.534], [0.189, 0.168, 0.131]], np.float32)


def invert(picture: Picture) -> Picture:
    """The photographic negative."""
    return 1 - picture


def sepia(picture: Picture) -> Picture:
    """Browned, as an old print."""
    return np.clip(picture @ SEPIA, 0, 1)


def sketch(picture: Picture) -> Picture:
    """Dark lines on white: luma divided by its blurred self (line width 1/40 of the short side)."""
    luma = gray(picture)
    soft = from_image(to_image(luma).filter(ImageFilter.GaussianBlur(min(picture.shape[:2]) / 40)))
    return np.clip(luma / (soft + 0.05), 0, 1) ** 3


def mosaic(picture: Picture) -> Picture:
    """Flat squares, twelve along the short side."""
    image = to_image(picture)
    cell = min(image.size) / 12
    small = image.resize((round(image.width / cell), round(image.height / cell)), Image.BOX)
    return from_image(small.resize(image.size, Image.NEAREST))


def soften(picture: Picture) -> Picture:
    """What "deblur" starts from: a Gaussian of 1/40 of the short side."""
    return from_image(to_image(picture).filter(ImageFilter.GaussianBlur(min(picture.shape[:2]) / 40)))


def compress(picture: Picture) -> Picture:
    """What "jpeg clean-up" starts from: quality 12."""
    buffer = io.BytesIO()
    to_image(picture).save(buffer, "JPEG", quality=12)
    return from_image(Image.open(buffer))


# name in HELD_OUT: (prompt, function); the first group makes the target, the second one the reference
TARGETS = {
    "invert": ("invert the colors", invert),
    "sketch": ("turn the picture into a pencil sketch", sketch),
    "sepia": ("give the picture a sepia tone", sepia),
    "mosaic": ("turn the picture into a mosaic", mosaic),
}
DEGRADATIONS = {
    "deblur": ("deblur the picture", soften),
    "jpeg clean-up": ("clean up the jpeg artifacts", compress),
}
