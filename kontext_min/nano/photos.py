"""The photographs beside configs/: small crops of CC0 and public-domain pictures out of the scikit-image package.

`python -m kontext_min.nano.photos SKIMAGE_DATA_FOLDER` writes configs/photos again:
reference/ and target/ (training pairs of the demo, also the photographs of nano's pretraining),
validation_reference/ and validation_target/ (source pictures that no training ever sees).
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = Path(__file__).parents[2] / "configs" / "photos"
SHORT_SIDE = 176
DEMO = "sepia"  # the held-out edit that configs/nano.json teaches

# fmt: off
# name: (source file, crop box in source pixels)
TRAIN = {
    "astronaut":      ("astronaut.png",         (0, 0, 512, 512)),
    "astronaut-face": ("astronaut.png",         (110, 0, 330, 220)),
    "astronaut-suit": ("astronaut.png",         (0, 170, 260, 512)),
    "shuttle":        ("astronaut.png",         (320, 0, 512, 270)),
    "helmet":         ("astronaut.png",         (250, 300, 512, 512)),
    "coffee":         ("coffee.png",            (0, 0, 600, 400)),
    "cup":            ("coffee.png",            (150, 0, 430, 280)),
    "spoon":          ("coffee.png",            (260, 100, 560, 400)),
    "launch-pad":     ("rocket.jpg",            (0, 0, 640, 427)),
    "rocket":         ("rocket.jpg",            (210, 100, 450, 427)),
    "galaxies":       ("hubble_deep_field.jpg", (200, 100, 700, 500)),
    "retina":         ("retina.jpg",            (60, 160, 1160, 1260)),
    "brick":          ("brick.png",             (0, 100, 300, 300)),
    "grass":          ("grass.png",             (0, 0, 240, 240)),
    "gravel":         ("gravel.png",            (0, 0, 200, 200)),
}
VALIDATION = {
    "cat":            ("chelsea.png",           (0, 0, 451, 300)),
    "cat-face":       ("chelsea.png",           (70, 0, 370, 300)),
    "photographer":   ("camera.png",            (0, 0, 512, 512)),
    "tripod":         ("camera.png",            (230, 60, 512, 480)),
}
# fmt: on


def load_photos(split: str) -> list[np.ndarray]:
    """All photographs of "train" or "validation", sorted by name: float32 (H, W, 3) in 0..1."""
    folder = PHOTOS / {"train": "reference", "validation": "validation_reference"}[split]
    files = sorted(folder.glob("*.jpg"))
    if not files:
        raise FileNotFoundError(f"no photographs in {folder}; make them with `python -m kontext_min.nano.photos`")
    return [np.asarray(Image.open(file).convert("RGB"), np.float32) / 255 for file in files]


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
    from kontext_min.nano.held_out import TARGETS  # which needs the photographs of this module itself

    folder = Path(sys.argv[1])
    for table, prefix in ((TRAIN, ""), (VALIDATION, "validation_")):
        for name, (source, box) in table.items():
            reference = PHOTOS / f"{prefix}reference" / f"{name}.jpg"
            write_reference(folder / source, box, reference)
            write_target(reference, PHOTOS / f"{prefix}target" / reference.name, *TARGETS[DEMO])


if __name__ == "__main__":
    main()
