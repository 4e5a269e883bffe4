"""What can be said of a data set before anything is trained: counts, buckets, disk, and one page that shows every pair.

Nothing here needs weights or a GPU, and nothing is written.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFont
from tqdm import tqdm

from kontext_min.data.align import Shift, shift_between
from kontext_min.data.buckets import Size
from kontext_min.data.examples import Example, Mix, View, use_of

WIDTH, MARGIN, GAP, LINE = 2400, 16, 4, 26  # pixels of the page
DRAWN, AMPLIFIED = 400, 4  # examples on one page at most (all of them are measured); differences
RED, GREY, PALE, BLACK = (200, 0, 0), (110, 110, 110), (236, 236, 236), (0, 0, 0)


@dataclass(frozen=True)
class Layout:
    """Cards side by side; every card is a row of equal cells with text below."""

    columns: int
    cell: Size
    references: int  # cells per card: the references, target, difference where there are references, frame
    font: int
    lines: int  # of a caption

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Layout":
        """Large cells for few examples, small ones for many; as tall as the middle one of the targets."""
        references = len(examples[0].references)
        columns = next((c for most, c in ((6, 1), (24, 2), (60, 3), (120, 4)) if len(examples) <= most), 6)
        cells = references + (3 if references else 2)
        width = min(360, ((WIDTH - 2 * MARGIN) // columns - 3 * MARGIN // 2) // cells - GAP)
        shapes = sorted(e.target.size.height / e.target.size.width for e in examples)
        height = round(width * min(1.25, max(0.5, shapes[len(shapes) // 2])))
        return cls(columns, Size(width, height), references, 17 if columns <= 2 else 14, 2 if columns <= 4 else 1)

    @property
    def titles(self) -> list[str]:
        """Of the cells."""
        names = [f"reference {i + 1}" for i in range(self.references)] if self.references > 1 else ["reference"]
        last = ["target", f"difference x{AMPLIFIED}", "frame"] if self.references else ["target", "frame"]
        return names[: self.references] + last

    @property
    def card(self) -> Size:
        """With text and the space to the next."""
        width = len(self.titles) * (self.cell.width + GAP) + 3 * MARGIN // 2
        return Size(width, self.cell.height + (1 + self.lines) * (self.font + 4) + MARGIN)


@dataclass(frozen=True)
class Card:
    """One example, looked at."""

    example: Example
    original: Size  # of the target's file
    caption: str
    cells: list[Image.Image]
    shifts: list[Shift | None]  # as the references; None where the sizes differ

    def misaligned(self) -> list[int]:
        """Which references must show the target's frame, and surely do not."""
        views = self.example.references
        return [i for i, s in enumerate(self.shifts) if s is not None and views[i].strict and s.wrong]


def look(example: Example, mix: Mix, layout: Layout) -> Card:
    """Open an example's pictures, as epoch 0 shows them, once each."""
    original = example.target.picture.open()
    target = example.target.transform(original)
    references = [v.degraded(target) if v.degradation else v.open() for v in example.references]
    shifts = [shift_between(r, target) if r.size == target.size else None for r in references]
    compared = next((r for r in references if r.size == target.size), None)
    difference = Image.new("RGB", target.size, PALE)
    if compared is not None:
        difference = ImageChops.difference(compared, target).point(lambda value: value * AMPLIFIED)
    if example.mask:  # what does not count is dark
        target = Image.composite(target, target.point(lambda value: value // 4), example.mask.open().convert("L"))
    cells = [*references, target, *([difference] if references else []), framed(original, example.target)]
    caption = use_of(0, example, mix.complete(), 0).caption
    return Card(example, Size(*original.size), caption, [fitted(cell, layout.cell) for cell in cells], shifts)


def framed(original: Image.Image, view: View) -> Image.Image:
    """The whole picture with what is cut off dimmed, and a line around what is used."""
    small = original.reduce(math.ceil(max(original.size) / 400))
    left, upper, right, lower = view.transform.box
    box = [left * small.width, upper * small.height, right * small.width - 1, lower * small.height - 1]
    mask = Image.new("L", small.size, 90)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    shown = Image.composite(small, Image.new("RGB", small.size, "white"), mask)
    ImageDraw.Draw(shown).rectangle(box, outline=(255, 150, 0), width=max(1, min(small.size) // 80))
    return shown


def fitted(image: Image.Image, cell: Size) -> Image.Image:
    """As large as the cell allows; pixels stay visible when a picture is enlarged much."""
    scale = min(cell.width / image.width, cell.height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC)


def contact_sheet(examples: list[Example], mix: Mix) -> tuple[Image.Image, list[str]]:
    """All examples of one set on a page, misaligned ones first and in red -> (page, one warning for each of those)."""
    layout = Layout.of(examples)
    flagged, plain = [], []
    for example in tqdm(examples, desc=f"looking at {examples[0].set_id}", leave=False):
        card = look(example, mix, layout)
        if card.misaligned() or len(plain) < DRAWN:
            (flagged if card.misaligned() else plain).append(card)
    cards = [*flagged, *plain][:DRAWN]
    head = heading(layout, examples, len(cards), [card.example.name for card in flagged])
    top = MARGIN + LINE * (len(head) + 2)
    rows = math.ceil(len(cards) / layout.columns)
    size = (max(1000, 2 * MARGIN + layout.columns * layout.card.width), top + rows * layout.card.height)
    pen = ImageDraw.Draw(page := Image.new("RGB", size, "white"))
    for i, (line, colour) in enumerate(head):
        place = (MARGIN, MARGIN + LINE * i + (10 if i else 0))  # the title is larger
        write(pen, place, line, (size[0] - 2 * MARGIN, 17 if i else 28), colour)
    for i in range(min(layout.columns, len(cards))):
        for k, title in enumerate(layout.titles):
            left = MARGIN + i * layout.card.width + k * (layout.cell.width + GAP)
            write(pen, (left, top - 22), title, (layout.cell.width, 14), GREY)
    for i, card in enumerate(cards):
        row, column = divmod(i, layout.columns)
        draw_card(page, card, layout, (MARGIN + column * layout.card.width, top + row * layout.card.height))
    return page, [warning(card, i) for card in flagged for i in card.misaligned()]


def heading(layout: Layout, examples: list[Example], drawn: int, flagged: list[str]) -> list[tuple[str, tuple]]:
    """The lines at the top, with their colours."""
    what = "pairs" if layout.references else "pictures without a reference"
    lines = [(f"{examples[0].set_id}: {len(examples)} {what}", BLACK)]
    if drawn < len(examples):
        lines.append((f"{drawn} of them are drawn here, all were looked at", BLACK))
    if layout.references:
        lines.append(("pictures as the model sees them in epoch 0; shift: of the target against the reference", GREY))
    lines.append(("frame: the whole target picture; what lies outside the orange line is cut off", GREY))
    if flagged:
        lines.append((f"{len(flagged)} misaligned although strict, first and in red: {', '.join(flagged)}", RED))
    return lines


def warning(card: Card, i: int) -> str:
    """One misaligned reference in a sentence."""
    view = card.example.references[i]
    return (
        f"warning: {card.example.set_id}: {view.picture.path} and {card.example.target.picture.path} show different "
        f"frames, shifted by {card.shifts[i]} at {view.size}; align them or use reference_loose"
    )


def draw_card(page: Image.Image, card: Card, layout: Layout, corner: tuple[int, int]):
    """Cells, and below them name, sizes, shift and caption."""
    pen, (left, top), cell = ImageDraw.Draw(page), corner, layout.cell
    width, wrong = len(layout.titles) * (cell.width + GAP) - GAP, card.misaligned()
    for i, image in enumerate(card.cells):
        x = left + i * (cell.width + GAP)
        pen.rectangle([x, top, x + cell.width - 1, top + cell.height - 1], fill=PALE)
        page.paste(image, (x + (cell.width - image.width) // 2, top + (cell.height - image.height) // 2))
    if wrong:
        pen.rectangle(
            [left - 4, top - 4, left + width + 3, top + layout.card.height - MARGIN + 4], outline=RED, width=3
        )
    box, views = card.example.target.transform.box, card.example.references
    cut = 1 - (box[2] - box[0]) * (box[3] - box[1])
    sizes = f"{card.original} to " * (layout.lines > 1) + f"{card.example.target.size}"
    sizes += f", {cut:.0%} cut off" * (cut > 0.005)
    shifts = "; ".join(str(v.size) if s is None else f"shift {s}" for v, s in zip(views, card.shifts, strict=True))
    y, step = top + cell.height + 2, layout.font + 4
    used = write(pen, (left + width, y), shifts, (width // 2, layout.font), RED if wrong else GREY, right=True)
    write(pen, (left, y), f"{card.example.name}   {sizes}", (width - used - 8, layout.font), GREY)
    for i, line in enumerate(wrapped(card.caption, (width, layout.font), layout.lines)):
        write(pen, (left, y + (i + 1) * step), line, (width, layout.font), BLACK)


def write(pen, place: tuple[int, int], text: str, space: tuple[int, int], colour, right: bool = False) -> int:
    """One line, shortened to the space (width, font size); place: its upper left, or right, corner. -> its width."""
    font = ImageFont.load_default(space[1])
    while text and font.getlength(text) > space[0]:
        text = text.removesuffix("…")[:-1] and text.removesuffix("…")[:-1].rstrip() + "…"
    pen.text(place, text, fill=colour, font=font, anchor="ra" if right else "la")
    return int(font.getlength(text))


def wrapped(text: str, space: tuple[int, int], most: int) -> list[str]:
    """Text in at most so many lines of a width; the last holds all that is left."""
    font, lines, words = ImageFont.load_default(space[1]), [], text.split()
    while words and len(lines) < most - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= space[0]:
            count += 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    return [*lines, " ".join(words)] if words else lines


def summary(examples: list[Example], text: tuple[int, int, int] = (512, 4096, 2)) -> list[str]:
    """Buckets, reference shapes, captions, what is generated and disk. text: of a caption, tokens, width and bytes of a
    number; the default is Kontext's T5 in bf16.
    """
    return [*histogram(examples), *caption_lines(examples), *generated_lines(examples), disk_line(examples, text)]


def histogram(examples: list[Example]) -> list[str]:
    """How many targets every training size has, and which sizes the references have."""
    sizes = Counter(e.target.size for e in examples)
    most = max(sizes.values())
    lines = [f"training sizes of {len(examples)} targets:"]
    lines += [f"  {size!s:>9} {count:6} {'#' * math.ceil(40 * count / most)}" for size, count in sizes.most_common()]
    own = Counter(v.size for e in examples for v in e.references if v.size != e.target.size)
    same = sum(v.size == e.target.size for e in examples for v in e.references)
    others = [f"{count} of {size}" for size, count in own.most_common()]
    return lines + ["references: " + ", ".join([f"{same} of their target's size"] * (same > 0) + others or ["none"])]


def caption_lines(examples: list[Example]) -> list[str]:
    """How many captions there are, and two of them."""
    groups = [group for e in examples for group in (e.captions, *e.reference_captions) if group]
    counts = sorted({len(group) for group in groups})
    different = list(dict.fromkeys(c for group in groups for c in group))
    per = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return [f"captions: {len(different)} different ones, {per} a picture, such as"] + [f"  {c}" for c in different[:2]]


def generated_lines(examples: list[Example]) -> list[str]:
    """What is made by degrading targets, and when."""
    made = Counter((e.set_id, v.degradation.name, v.fleeting) for e in examples for v in e.references if v.degradation)
    return [
        f"{set_id}: {count} references by {name}, "
        + ("anew at every use" if fleeting else "made once, before training")
        for (set_id, name, fleeting), count in made.items()
    ]


def disk_line(examples: list[Example], text: tuple[int, int, int]) -> str:
    """What the caches will take. Latents: 16 channels of 4 bytes per 8x8 pixels."""
    tokens, width, size = text
    views = {view for e in examples for view in e.views() if not view.fleeting}
    latents = sum(16 * (v.size.width // 8) * (v.size.height // 8) * 4 for v in views)
    captions = {c for e in examples for group in (e.captions, *e.reference_captions) for c in group}
    texts = len(captions) * tokens * width * size
    return (
        f"the caches will take about {(latents + texts) / 1e6:.1f} MB: {len(views)} latents {latents / 1e6:.1f} MB, "
        f"{len(captions)} captions {texts / 1e6:.1f} MB"
    )
