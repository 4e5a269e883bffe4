"""The pairs of configs/nano.json: `python -m kontext_min.nano.demo SKIMAGE_DATA_FOLDER` writes configs/photos again.

The photographs are small crops of CC0 and public-domain pictures out of the scikit-image package, those in
validation_reference/ never trained on; the targets are one held-out edit of them.
"""

import sys
from pathlib import Path

from PIL import Image

from kontext_min.nano.edits import PHOTOS, from_image, to_image
from kontext_min.nano.held_out import TARGETS

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


def write_pair(source: Path, box: tuple[int, int, int, int], prefix: str, name: str) -> None:
    """A crop of one source picture with its short side at SHORT_SIDE, the edited picture of it, and the caption."""
    crop = Image.open(source).convert("RGB").crop(box)
    scale, (prompt, edit) = SHORT_SIDE / min(crop.size), TARGETS[DEMO]
    reference, target = (PHOTOS / f"{prefix}{part}" / f"{name}.jpg" for part in ("reference", "target"))
    for file in (reference, target):
        file.parent.mkdir(parents=True, exist_ok=True)
    size = (round(crop.width * scale), round(crop.height * scale))
    crop.resize(size, Image.Resampling.LANCZOS).save(reference, quality=88)
    to_image(edit(from_image(Image.open(reference)))).save(target, quality=88)
    target.with_suffix(".txt").write_text(prompt + "\n")


def main() -> None:
    """Write every pair from the scikit-image data folder named on the command line."""
    for table, prefix in ((TRAIN, ""), (VALIDATION, "validation_")):
        for name, (source, box) in table.items():
            write_pair(Path(sys.argv[1]) / source, box, prefix, name)


if __name__ == "__main__":
    main()
