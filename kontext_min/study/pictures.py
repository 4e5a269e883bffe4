"""Heat maps, rows of pictures, and a page of them without network."""

import base64
import html
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from kontext_min.sheet import card, page

HEAT = {"black": "#1b0c41", "mid": "#d44842", "white": "#f9f871"}  # of an overlay: from 0 to the largest
PALE, DARK = (250, 247, 238), (226, 122, 63)  # of a table's cells
STYLE = "body{margin:32px;font:16px/1.5 sans-serif;color:#222}p{color:#555;margin:4px 0 8px}h2{margin:40px 0 0}"


def overlay(image: Image.Image, values: Tensor) -> Image.Image:
    """Values of 0 or more, (rows, columns), as colours over a greyed picture; the brightest is the largest of them."""
    scaled = (values.float() / values.max() * 255).round().byte().cpu().numpy()
    heat = ImageOps.colorize(Image.fromarray(scaled).resize(image.size, Image.Resampling.BICUBIC), **HEAT)
    return Image.blend(image.convert("L").convert("RGB"), heat, 0.6)


def rows_of(pictures: dict[str, dict[str, Image.Image]]) -> Image.Image:
    """Row -> label -> picture as a sheet; large ones are shown small."""
    return page([card([row], list(cells.items()), side=200, shrink=True) for row, cells in pictures.items()])


def heat_map(values: dict[str, dict[str, float]], form: str = "{:.2f}", by_row: bool = False) -> Image.Image:
    """Row -> column -> value as a table, a cell the darker the larger its value among all (or in its row)."""
    font, columns = ImageFont.load_default(13), list(dict.fromkeys(name for row in values.values() for name in row))
    left, *widths = (int(max(map(font.getlength, names))) + 14 for names in (values, *((c, "00.00") for c in columns)))
    places = dict(zip(columns, accumulate([left, *widths[:-1]]), strict=True))
    made = Image.new("RGB", (left + sum(widths) + 8, 24 * len(values) + 32), "white")
    pen = ImageDraw.Draw(made)
    for name, width in zip(columns, widths, strict=True):
        pen.text((places[name] + width / 2, 14), name, "gray", font, anchor="mm")
    for i, (row, cells) in enumerate(values.items()):
        pen.text((left - 8, 38 + 24 * i), row, "gray", font, anchor="rm")
        among = [v for line in ([cells] if by_row else values.values()) for v in line.values()]
        for name, value in cells.items():
            x, y, width = places[name], 26 + 24 * i, widths[columns.index(name)]
            share = (value - min(among)) / ((max(among) - min(among)) or 1)
            colour = tuple(round(a + (b - a) * share) for a, b in zip(PALE, DARK, strict=True))
            pen.rectangle((x, y, x + width - 2, y + 22), colour)
            pen.text((x + width / 2, y + 12), form.format(value), "black", font, anchor="mm")
    return made


def write_page(folder: Path, title: str, about: str, sections: list[tuple[str, str, Image.Image]]) -> Path:
    """Sections (name, caption, picture) -> NAME.png of each, and index.html with all of them in it."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"]
    parts += [f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>"]
    for name, caption, picture in sections:
        picture.save(file := folder / f"{name}.png")
        parts.append(f"<h2>{html.escape(name)}</h2><p>{html.escape(caption)}</p>")
        parts.append(f"<img src='data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}'>")
    (folder / "index.html").write_text("\n".join(parts), encoding="utf-8")
    return folder / "index.html"
