"""--check: the page fits few and many, misaligned pairs are named, and the numbers are right."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import train
from kontext_min.config import Config
from kontext_min.data.check import WIDTH, contact_sheet, summary
from kontext_min.training.sets import mix_of, read_sets

PHOTOS = Path(__file__).parents[2] / "configs" / "photos" / "reference"
NAMES = sorted(path.stem for path in PHOTOS.glob("*.jpg"))


def photo(name, size=(192, 128)):
    return ImageOps.fit(Image.open(PHOTOS / f"{name}.jpg").convert("RGB"), size)


def window(image, dx=0, dy=0, margin=16):
    """What is seen of a picture through a window; its content is moved right and down by dx, dy."""
    return image.crop((margin - dx, margin - dy, image.width - margin - dx, image.height - margin - dy))


# --------------------------------------------------------------------------------------------------------- page


def dataset(folder, count, moved=(), **entry):
    """Pairs of photographs, inverted; those in `moved` are shifted by 6 and -4 pixels."""
    for i in range(count):
        picture = photo(NAMES[i % len(NAMES)], (152, 112))
        for kind, image in (
            ("reference", window(picture, *((6, -4) if i in moved else ()))),
            ("target", ImageOps.invert(window(picture))),
        ):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            image.save(folder / kind / f"{i:03}.png")
        (folder / "target" / f"{i:03}.txt").write_text(f"invert it, {i % 5}\nmake a negative of it\n")
    reference = {"id": "refs", "instance_data_dir": folder / "reference", "conditioning_type": "reference_strict"}
    target = {"id": "edits", "instance_data_dir": folder / "target", "conditioning_data": ["refs"], "resolution": 96}
    target |= entry
    entries = [target] + [reference] * ("refs" in target["conditioning_data"])
    return Config(data_backend_config=entries, cache_dir=folder / "cache")


def sheet_of(config):
    return contact_sheet(read_sets(config, 16).training, mix_of(config))


@pytest.mark.parametrize("count, tallest", [(1, 500), (8, 1400), (200, 4500)])
def test_pages_fit_few_and_many(tmp_path, count, tallest):
    page, warnings = sheet_of(dataset(tmp_path, count))
    assert 1000 <= page.width <= WIDTH and page.height <= tallest
    assert not warnings


def test_a_misaligned_strict_pair_is_named_and_red(tmp_path):
    page, warnings = sheet_of(dataset(tmp_path, 4, moved=[2]))
    assert len(warnings) == 1
    assert str(tmp_path / "reference/002.png") in warnings[0] and str(tmp_path / "target/002.png") in warnings[0]
    dx, dy = map(float, re.search(r"shifted by (\S+), (\S+) px", warnings[0]).groups())
    assert (dx, dy) == pytest.approx((-6, 4), abs=0.2)  # 120x80 is cut to 112x80, not resized
    red = (np.asarray(page) == (200, 0, 0)).all(-1)
    assert red.any(1).sum() > 100
    plain, _ = sheet_of(dataset(tmp_path / "good", 4))
    assert not (np.asarray(plain) == (200, 0, 0)).all(-1).any()


def test_loose_references_may_lie_anywhere(tmp_path):
    config = dataset(tmp_path, 3, moved=[0, 1, 2])
    target, reference = config.data_backend_config
    loose = reference.model_copy(update={"conditioning_type": "reference_loose", "resolution": 96})
    assert sheet_of(config.model_copy(update={"data_backend_config": [target, loose]}))[1] == []


def test_generated_references_and_text_to_image_have_pages_too(tmp_path):
    for values in (
        {"conditioning": {"type": "jpeg_artifacts", "quality": 5}, "crop": True, "crop_style": "random"},
        {},
    ):
        config = dataset(tmp_path, 2, conditioning_data=[], **values)
        page, warnings = sheet_of(config)
        assert page.width >= 1000 and not warnings
    assert not (tmp_path / "cache").exists()


def test_the_page_shows_the_pixels_that_the_model_sees(tmp_path):
    config = dataset(tmp_path, 1)
    example = read_sets(config, 16).training[0]
    page = np.asarray(sheet_of(config)[0]).reshape(-1, 3)
    for view in example.views():
        colours = {tuple(colour) for colour in np.asarray(view.open()).reshape(-1, 3)}
        assert colours <= set(map(tuple, page))  # enlarged without smoothing


# ------------------------------------------------------------------------------------------------------ summary


def test_the_summary_counts_right(tmp_path):
    lines = summary(read_sets(dataset(tmp_path, 6), 16).training, text=(24, 128, 4))
    assert lines[0] == "training sizes of 6 targets:"
    assert re.match(r" +112x80 +6 #{40}$", lines[1])
    assert lines[2:] == [
        "references: 6 of their target's size",
        "captions: 6 different ones, 2 a picture, such as",
        "  invert it, 0",
        "  make a negative of it",
        # 12 latents of 16 x 10 x 14 numbers of 4 bytes; 6 captions of 24 x 128 of 4 bytes
        f"the caches will take about 0.2 MB: 12 latents {12 * 8960 / 1e6:.1f} MB, 6 captions {6 * 12288 / 1e6:.1f} MB",
    ]


def test_the_summary_does_not_count_what_is_not_kept(tmp_path):
    generators = [{"type": "superresolution"}, {"type": "jpeg_artifacts", "when": "step"}]
    lines = summary(read_sets(dataset(tmp_path, 3, conditioning_data=[], conditioning=generators), 16).training)
    assert "6 latents 0.1 MB, 4 captions 16.8 MB" in lines[-1]  # 512 x 4096 numbers of 2 bytes


def test_pairs_that_are_trained_on_and_validated_on_stand_once_on_the_page(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train, "contact_sheet", lambda examples, mix: (seen.append(examples), contact_sheet(examples, mix))[1]
    )
    config = dataset(tmp_path, 3).model_copy(update={"output_dir": tmp_path / "out"})
    train.report_data(config)
    assert [len(examples) for examples in seen] == [3]
    assert (tmp_path / "out/check-edits.png").is_file()
