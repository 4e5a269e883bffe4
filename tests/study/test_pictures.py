"""Heat maps are dark where the values are large, overlays bright; a page shows what lies beside it."""

import numpy as np
import torch
from PIL import Image

from kontext_min.study.experiment import DARK, PALE, heat_map, overlay, rows_of, write_page


def test_an_overlay_is_brightest_at_the_largest_value():
    values = torch.zeros(3, 4)
    values[2, 1] = 0.25
    image = overlay(Image.new("RGB", (64, 48), "gray"), values)
    light = np.asarray(image.convert("L"), float)
    y, x = np.unravel_index(light.argmax(), light.shape)
    assert image.size == (64, 48) and (y // 16, x // 16) == (2, 1)


def cell_colours(image: Image.Image) -> set[tuple[int, ...]]:
    """Those of areas, not of letters."""
    return {colour for count, colour in image.getcolors(1 << 24) if count > 200} - {(255, 255, 255), (128, 128, 128)}


def test_a_heat_map_goes_from_pale_to_dark_over_all_or_by_row():
    table = {"first": {"a": 0.0, "b": 1.0}, "second": {"b": 9.0, "a much longer name": 10.0}}
    colours = cell_colours(heat_map(table))
    assert len(colours) == 4 and {PALE, DARK} <= colours
    assert cell_colours(heat_map(table, by_row=True)) == {PALE, DARK}
    assert cell_colours(heat_map({"one": {"a": 3.0, "b": 3.0}})) == {PALE}


def test_large_pictures_are_shown_small():
    assert rows_of({"": {"a": Image.new("RGB", (2000, 1000)), "b": Image.new("RGB", (192, 96))}}).height < 192


def test_a_page_shows_the_pictures_beside_it_and_no_markup_of_others(tmp_path):
    picture = Image.new("RGB", (5, 4), "red")
    page = write_page(tmp_path / "new" / "page", "<b>", 'a & "b"', [("one", "1 < 2", picture)]).read_text(
        encoding="utf-8"
    )
    assert "<b>" not in page and "1 &lt; 2" in page and "a &amp; " in page
    shown = Image.open(tmp_path / "new" / "page" / page.split("<img src='")[1].split("'")[0])
    assert shown.size == (5, 4) and shown.getpixel((0, 0)) == (255, 0, 0)
