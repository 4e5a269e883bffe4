"""Shifts are measured; edits and different pictures are not mistaken for them."""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from kontext_min.compare import card, shift_between
from kontext_min.data.degrade import degrade

PHOTOS = Path(__file__).parents[1] / "configs" / "photos" / "reference"
NAMES = sorted(path.stem for path in PHOTOS.glob("*.jpg"))


def photo(name, size=(192, 128)):
    return ImageOps.fit(Image.open(PHOTOS / f"{name}.jpg").convert("RGB"), size)


def window(image, dx=0, dy=0, margin=16):
    """What is seen of a picture through a window; its content is moved right and down by dx, dy."""
    return image.crop((margin - dx, margin - dy, image.width - margin - dx, image.height - margin - dy))


def noise(seed, size=(128, 96)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [(3, -2), (0, 0), (-7, 5)])
def test_a_known_shift_is_recovered(name, shift):
    found = shift_between(window(photo(name)), window(photo(name), *shift))
    assert found[:2] == pytest.approx(shift, abs=0.2) and found.confidence >= 1  # shuttle is mostly black
    assert found.wrong is (shift != (0, 0))


def test_shifts_are_measured_to_a_fraction_of_a_pixel_and_at_any_size():
    large = photo("gravel", (1600, 1200)).filter(ImageFilter.GaussianBlur(2))
    a, b = window(large, margin=40), window(large, 5, -10, margin=40)  # 1520x1120: measured on a third of it
    assert shift_between(a, b)[:2] == pytest.approx((5, -10), abs=0.5)
    quarter = [image.resize((380, 280), Image.Resampling.BOX) for image in (a, b)]
    assert shift_between(*quarter)[:2] == pytest.approx((1.25, -2.5), abs=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_edits_in_place_are_not_taken_for_shifts(name):
    clean = photo(name)
    recoloured = clean.copy()
    recoloured.paste((150, 20, 200), (70, 40, 120, 90))
    rng = np.random.default_rng(0)
    edits = {
        "inverted": ImageOps.invert(clean),
        "grey": ImageOps.grayscale(clean).convert("RGB"),
        "recoloured": recoloured,
        "blurred": degrade(clean, "superresolution", {"downscale_factor": 3}, rng),
        "compressed": degrade(clean, "jpeg_artifacts", {"quality": 10}, rng),
    }
    for kind, edited in edits.items():
        assert not shift_between(clean, edited).wrong, (kind, shift_between(clean, edited))


@pytest.mark.parametrize("kind", ["inverted", "blurred"])
def test_shifts_are_found_under_edits(kind):
    a, b = window(photo("astronaut")), window(photo("astronaut"), 4, 3)
    b = ImageOps.invert(b) if kind == "inverted" else b.filter(ImageFilter.GaussianBlur(1.5))
    found = shift_between(a, b)
    assert found[:2] == pytest.approx((4, 3), abs=0.2) and found.wrong


def test_pictures_without_a_common_frame_have_no_sure_shift():
    pairs = [(noise(i), noise(i + 100)) for i in range(10)]
    pairs += [(photo(a), photo(b)) for a, b in zip(NAMES, NAMES[5:] + NAMES[:5], strict=True)]
    pairs += [(Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue"))]
    pairs += [(photo(NAMES[0]).resize(size), photo(NAMES[1]).resize(size)) for size in ((512, 2), (2, 96), (1, 64))]
    assert all(shift_between(a, b).confidence < 1 for a, b in pairs if a is not b)


def test_what_stays_where_it_is_has_not_moved_by_a_period_of_its_pattern():
    """configs/insets/reference-1/0004.jpg, of stripes: a picture in its lower right quarter is not a shift."""
    insets = PHOTOS.parents[1] / "insets"
    a, b = (Image.open(insets / part / "0004.jpg").convert("RGB") for part in ("reference-1", "target"))
    assert not shift_between(a, b).wrong
    large = Image.open(insets / "reference-1" / "0004.jpg").convert("RGB").resize((256, 256))
    found = shift_between(window(large), window(large, 6, 4))  # but what has moved has
    assert found[:2] == pytest.approx((6, 4), abs=0.3)


def test_what_is_too_long_for_a_card_is_cut_in_no_time():
    begun = time.process_time()
    cut = card(["x" * 200_000], [("y" * 200_000, noise(0))])
    assert time.process_time() - begun < 5  # hours, before
    assert np.array_equal(np.asarray(cut), np.asarray(card(["x" * 1000], [("y" * 1000, noise(0))])))
