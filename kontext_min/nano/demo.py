"""The pairs of configs/nano.json: `python -m kontext_min.nano.demo SKIMAGE_DATA_FOLDER` writes configs/photos again.

The photographs are cropped from pictures of the scikit-image package; the targets are one held-out edit of them.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from kontext_min.nano.held_out import TARGETS
from kontext_min.nano.photos import PHOTOS, TRAIN, VALIDATION

SHORT_SIDE = 176
DEMO = "sepia"  # the held-out edit that configs/nano.json teaches


def write_reference(source: Path, box: tuple[int, int, int, int], file: Path) -> None:
    """Crop one source picture and scale its short side to SHORT_SIDE."""
    crop = Image.open(source).convert("RGB").crop(box)
    scale = SHORT_SIDE / min(crop.size)
    file.parent.mkdir(parents=True, exist_ok=True)
    crop.resize((round(crop.width * scale), round(crop.height * scale)), Image.LANCZOS).save(file, quality=88)


def write_target(reference: Path, file: Path, prompt: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """The edited picture of a stored reference, with its caption beside it."""
    picture = edit(np.asarray(Image.open(reference), np.float32) / 255)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(file, quality=88)
    file.with_suffix(".txt").write_text(prompt + "\n")


def main() -> None:
    """Write every pair from the scikit-image data folder named on the command line."""
    folder = Path(sys.argv[1])
    for table, prefix in ((TRAIN, ""), (VALIDATION, "validation_")):
        for name, (source, box) in table.items():
            reference = PHOTOS / f"{prefix}reference" / f"{name}.jpg"
            write_reference(folder / source, box, reference)
            write_target(reference, PHOTOS / f"{prefix}target" / reference.name, *TARGETS[DEMO])


if __name__ == "__main__":
    main()
