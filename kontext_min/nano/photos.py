"""The photographs beside configs/: small crops of CC0 and public-domain pictures out of the scikit-image package.

reference/ holds the photographs that may be trained on, validation_reference/ those that no training ever sees.
"""

from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = Path(__file__).parents[2] / "configs" / "photos"

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
        raise FileNotFoundError(f"no photographs in {folder}; make them with `python -m kontext_min.nano.demo`")
    return [np.asarray(Image.open(file).convert("RGB"), np.float32) / 255 for file in files]
