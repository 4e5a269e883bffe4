"""Contact sheets: cards, each a row of pictures below lines of text, laid out in columns on one page."""

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.Image import Image as Picture

MARGIN, LINE = 8, 16  # pixels
RED = (200, 0, 0)


def card(lines: list[str], cells: list[tuple[str, Picture]], side=256, shrink=False, red=False) -> Picture:
    """Lines of text above labelled pictures; in red if something is wrong with them.

    Small ones are enlarged without smoothing, by one whole number, to `side` pixels at most; `shrink` shrinks others.
    """
    zoom = max(1, side // max(max(image.size) for _, image in cells))
    images = [ImageOps.scale(image, zoom, Image.Resampling.NEAREST) for _, image in cells]
    if shrink:
        images = [ImageOps.contain(i, (side, side)) if max(i.size) > side else i for i in images]
    size = (max(i.width for i in images) + MARGIN, (len(lines) + 1) * LINE + max(i.height for i in images) + MARGIN)
    made = Image.new("RGB", (size[0] * len(cells) + MARGIN, size[1]), "white")
    pen = ImageDraw.Draw(made)
    for i, line in enumerate(lines):
        write(pen, (MARGIN, i * LINE), line, made.width - 2 * MARGIN, RED if red else "black")
    for i, ((label, _), image) in enumerate(zip(cells, images, strict=True)):
        left = MARGIN + i * size[0]
        write(pen, (left, len(lines) * LINE), label, size[0] - MARGIN, "gray")
        made.paste(image, (left, (len(lines) + 1) * LINE))
    if red:
        pen.rectangle([0, 0, made.width - 3, made.height - 3], outline=RED, width=3)
    return made


def write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, colour, size: int = 13):
    """A line from its upper left corner, shortened to a width."""
    font = ImageFont.load_default(size)
    while font.getlength(text) > width and len(text) > 1:
        text = text[:-2].rstrip() + "…"
    pen.text(place, text, fill=colour, font=font)


def page(cards: list[Image.Image], columns: int = 1, heading: list[str] = ()) -> Image.Image:
    """Cards row by row below a heading, whose first line is large."""
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights, width = [max(made.height for made in row) for row in rows], max(made.width for made in cards)
    top = (len(heading) + 2) * LINE if heading else MARGIN
    whole = Image.new("RGB", (max(1000 if heading else 0, columns * width), top + sum(heights)), "white")
    pen = ImageDraw.Draw(whole)
    for i, line in enumerate(heading):
        write(pen, (MARGIN, i * LINE + (LINE if i else 0)), line, whole.width - 2 * MARGIN, "black", 13 if i else 26)
    for row, height in zip(rows, heights, strict=True):
        for column, made in enumerate(row):
            whole.paste(made, (column * width, top))
        top += height
    return whole
