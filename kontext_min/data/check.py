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

WIDTH, MARGIN, GAP, LINE = 2400, 16, 4, 20  # pixels of the page
DRAWN, AMPLIFIED = 400, 4  # examples on one page at most (all of them are measured); differences
NEAREST, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BICUBIC
RED, GREY, PALE, BLACK = (200, 0, 0), (110, 110, 110), (236, 236, 236), (0, 0, 0)


@dataclass(frozen=True)
class Layout:
    """Cards side by side; every card is a row of equal cells above two lines of text."""

    columns: int
    cell: Size
    card: Size  # with the space to the next

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Layout":
        """Large cells for few examples, small ones for many; as tall as the middle one of the targets."""
        references = len(examples[0].references)
        cells = references + (3 if references else 2)  # target, difference, frame
        columns = next((c for most, c in ((6, 1), (24, 2), (60, 3), (120, 4)) if len(examples) <= most), 6)
        width = min(360, ((WIDTH - 2 * MARGIN) // columns - MARGIN) // cells - GAP)
        shapes = sorted(e.target.size.height / e.target.size.width for e in examples)
        height = round(width * min(1.25, max(0.5, shapes[len(shapes) // 2])))
        return cls(columns, Size(width, height), Size(cells * (width + GAP) + MARGIN, height + 2 * LINE + MARGIN))


def contact_sheet(examples: list[Example], mix: Mix) -> tuple[Image.Image, list[str]]:
    """All examples of one set on a page, misaligned ones first and in red -> (page, one warning for each of those)."""
    layout = Layout.of(examples)
    flagged, plain, warnings = {}, [], []
    for example in tqdm(examples, desc=f"looking at {examples[0].set_id}", leave=False):
        card, wrong = look(example, mix, layout)
        warnings += wrong
        if wrong:
            flagged[example.name] = card
        elif len(plain) < DRAWN:
            plain.append(card)
    cards = [*flagged.values(), *plain][:DRAWN]
    head = heading(examples, len(cards), list(flagged))
    top = 2 * MARGIN + LINE * (len(head) + 2)
    columns, rows = layout.columns, math.ceil(len(cards) / layout.columns)
    size = Size(max(1000, 2 * MARGIN + columns * layout.card.width), top + rows * layout.card.height)
    pen = ImageDraw.Draw(page := Image.new("RGB", size, "white"))
    what = "pairs" if examples[0].references else "pictures without a reference"
    write(pen, (MARGIN, MARGIN), f"{examples[0].set_id}: {len(examples)} {what}", size.width, BLACK, 28)
    for i, (line, colour) in enumerate(head):
        write(pen, (MARGIN, MARGIN + LINE * (i + 2)), line, size.width - 2 * MARGIN, colour)
    for i, card in enumerate(cards):
        page.paste(card, (MARGIN + i % columns * layout.card.width, top + i // columns * layout.card.height))
    return page, warnings


def heading(examples: list[Example], drawn: int, flagged: list[str]) -> list[tuple[str, tuple]]:
    """The lines at the top, with their colours."""
    count = len(examples[0].references)
    cells = [f"reference {i + 1}" for i in range(count)] if count > 1 else ["reference"] * count
    cells += ["target", f"difference x{AMPLIFIED}"] if count else ["target"]
    shown = f"{', '.join(cells)} and the whole target, of which what lies outside the orange line is cut off"
    lines = [(f"from left to right, as the model sees them in epoch 0: {shown}", GREY)]
    if drawn < len(examples):
        lines.append((f"{drawn} of them are drawn here, all were looked at", BLACK))
    if flagged:
        lines.append((f"{len(flagged)} misaligned although strict, first and in red: {', '.join(flagged)}", RED))
    return lines


def look(example: Example, mix: Mix, layout: Layout) -> tuple[Image.Image, list[str]]:
    """Open an example's pictures, as epoch 0 shows them, once each -> its card, and what is wrong with its frames."""
    original = example.target.picture.open()
    target = example.target.transform(original)
    references = [view.open() for view in example.references]
    shifts = [shift_between(r, target) if r.size == target.size else None for r in references]
    warnings = misaligned(example, shifts)
    measured = zip(example.references, shifts, strict=True)
    left, upper, right, lower = example.target.transform.box
    cut = f"{1 - (right - left) * (lower - upper):.0%} cut off"
    texts = (
        f"{example.name}   {Size(*original.size)} to {example.target.size}, {cut}",
        "; ".join(str(view.size) if shift is None else f"shift {shift}" for view, shift in measured),
        use_of(0, example, mix.complete(), 0).caption,
    )
    cells = cells_of(example, original, target, references)
    return draw_card(cells, texts, layout, RED if warnings else GREY), warnings


def misaligned(example: Example, shifts: list[Shift | None]) -> list[str]:
    """A warning for every reference that must show the target's frame, and surely does not."""
    return [
        f"warning: {example.set_id}: {view.picture.path} and {example.target.picture.path} show different frames, "
        f"shifted by {shift} at {view.size}; align them or use reference_loose"
        for view, shift in zip(example.references, shifts, strict=True)
        if view.strict and shift is not None and shift.wrong
    ]


def cells_of(
    example: Example, original: Image.Image, target: Image.Image, references: list[Image.Image]
) -> list[Image.Image]:
    """References, target, difference from the first of its size, and the whole target with a line around its crop."""
    compared = next((r for r in references if r.size == target.size), None)
    difference = Image.new("RGB", target.size, PALE)
    if compared is not None:
        difference = ImageChops.difference(compared, target).point(lambda value: value * AMPLIFIED)
    if example.mask:  # what does not count is dark
        target = Image.composite(target, target.point(lambda value: value // 4), example.mask.open().convert("L"))
    return [*references, target, *([difference] if references else []), framed(original, example.target)]


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


def draw_card(cells: list[Image.Image], texts: tuple[str, str, str], layout: Layout, colour: tuple) -> Image.Image:
    """Cells, and below them a line with a text on the left and one on the right, and the caption."""
    cell, width = layout.cell, layout.card.width - MARGIN
    pen = ImageDraw.Draw(card := Image.new("RGB", layout.card, "white"))
    for i, image in enumerate(cells):
        x = i * (cell.width + GAP)
        pen.rectangle([x, 0, x + cell.width - 1, cell.height - 1], fill=PALE)
        scale = min(cell.width / image.width, cell.height / image.height)
        size = Size(max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, NEAREST if scale >= 2 else BICUBIC)  # pixels stay visible
        card.paste(image, (x + (cell.width - size.width) // 2, (cell.height - size.height) // 2))
    left, right, caption = texts
    used = write(pen, (width - 2 * GAP, cell.height), right, width // 2, colour, anchor="ra")
    write(pen, (GAP, cell.height), left, width - used - 4 * GAP, GREY)
    write(pen, (GAP, cell.height + LINE), caption, width - 3 * GAP, BLACK)
    if colour == RED:
        pen.rectangle([0, 0, width - GAP - 1, layout.card.height - MARGIN + 2], outline=RED, width=3)
    return card


def write(pen, place: tuple[int, int], text: str, width: int, colour: tuple, size: int = 15, anchor: str = "la") -> int:
    """A line, shortened to a width; place: its upper left corner, or its right one with anchor ra. -> its width."""
    font = ImageFont.load_default(size)
    while font.getlength(text) > width and len(text) > 1:
        text = text[:-2].rstrip() + "…"
    pen.text(place, text, fill=colour, font=font, anchor=anchor)
    return int(font.getlength(text))


def summary(examples: list[Example], text: tuple[int, int, int] = (512, 4096, 2)) -> list[str]:
    """Buckets, captions and what the caches will take on disk, latents at 16 channels of 4 bytes per 8x8 pixels.

    text: of an encoded caption, tokens, width and bytes of a number; the default is Kontext's T5 in bf16.
    """
    groups = [group for e in examples for group in (e.captions, *e.reference_captions) if group]
    captions = list(dict.fromkeys(caption for group in groups for caption in group))
    counts = sorted({len(group) for group in groups})
    per = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    views = {view for e in examples for view in e.views() if not view.fleeting}
    latents = sum(16 * (v.size.width // 8) * (v.size.height // 8) * 4 for v in views) / 1e6
    texts = len(captions) * math.prod(text) / 1e6
    return [
        *histogram(examples),
        f"captions: {len(captions)} different ones, {per} a picture, such as",
        *(f"  {caption}" for caption in captions[:2]),
        f"the caches will take about {latents + texts:.1f} MB: {len(views)} latents {latents:.1f} MB, "
        f"{len(captions)} captions {texts:.1f} MB",
    ]


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
