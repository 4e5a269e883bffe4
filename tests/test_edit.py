"""From a picture's size to the model's: preferred sizes, and what is cut."""

import pytest
from PIL import Image

from kontext_min.data.buckets import Size, nearest_aspect
from kontext_min.edit import output_size, prepare_reference
from kontext_min.presets import KONTEXT_DEV, KONTEXT_SIZES, NANO

BFL = [(672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
       (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
       (1568, 672)]  # fmt: skip


def test_the_17_preferred_sizes_are_bfls():  # trap 15
    assert list(KONTEXT_SIZES) == BFL


NEAREST = {  # BFL takes the exact aspect; diffusers floors to 16 first and differs in the first two
    (1080, 1350): (944, 1104), (972, 1041): (1024, 1024), (1024, 1024): (1024, 1024), (512, 512): (1024, 1024),
    (1920, 1080): (1392, 752), (1080, 1920): (752, 1392), (4000, 3000): (1184, 880), (3000, 2000): (1248, 832),
    (100, 1000): (672, 1568), (1000, 100): (1568, 672),
}  # fmt: skip


@pytest.mark.parametrize("size", NEAREST)
def test_a_reference_goes_to_the_nearest_exact_aspect(size):  # trap 15
    assert nearest_aspect(Size(*size), KONTEXT_SIZES) == NEAREST[size]


@pytest.mark.parametrize("size", [(1080, 1350), (31, 17), (4032, 3024), (999, 1001), (333, 1000)])
def test_the_rule_is_bfls_formula(size):  # trap 15
    width, height = size
    expected = min((abs(width / height - w / h), w, h) for w, h in BFL)[1:]
    assert nearest_aspect(Size(*size), KONTEXT_SIZES) == expected


@pytest.mark.parametrize("preset", [KONTEXT_DEV, NANO], ids=lambda preset: preset.name)
def test_every_preferred_size_is_its_own_and_whole_in_tokens(preset):
    for size in preset.sizes:
        assert nearest_aspect(size, preset.sizes) == size and size == size.floored(16)


RULES = {  # picture, --size, --reference-size -> output, reference as the model sees it
    "auto": ((1920, 1080), "auto", "auto", (1392, 752), (1392, 752)),
    "keep": ((75, 50), "auto", "keep", (64, 48), (64, 48)),
    "match": ((1920, 1080), "640x480", "match", (640, 480), (640, 480)),
    "match, auto": ((1920, 1080), "auto", "match", (1392, 752), (1392, 752)),
    "reference size": ((1920, 1080), "auto", "512x512", (512, 512), (512, 512)),
    "both": ((1920, 1080), "100x50", "200x300", (96, 48), (192, 288)),
    "size alone": ((1920, 1080), "256x256", "auto", (256, 256), (1392, 752)),
    "size and keep": ((75, 50), "256x256", "keep", (256, 256), (64, 48)),
    "smaller than a token": ((9, 40), "auto", "keep", (16, 32), (16, 32)),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_sizes_are_as_asked(case):  # trap 15
    picture, size, rule, output, reference = RULES[case]
    made = output_size([Size(*picture)], size, rule, KONTEXT_DEV)
    assert made == output
    assert prepare_reference(Image.new("RGB", picture), made, rule, KONTEXT_DEV).size == reference


def test_without_a_reference_the_output_is_the_presets():
    assert output_size([], "auto", "keep", KONTEXT_DEV) == (1024, 1024)
    assert output_size([], "70x50", "auto", KONTEXT_DEV) == (64, 48)


def test_the_first_reference_decides():
    assert output_size([Size(100, 50), Size(50, 100)], "auto", "keep", KONTEXT_DEV) == (96, 48)
