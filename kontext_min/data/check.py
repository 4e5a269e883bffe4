"""What can be said of a data set without weights or GPU: counts, buckets, disk, and one page that shows every pair."""

import math
from collections import Counter

from PIL import Image, ImageChops, ImageDraw
from tqdm import tqdm

from kontext_min.compare import MARGIN, card, page, shift_between
from kontext_min.data.buckets import Size, share_cut
from kontext_min.data.examples import Example, Mix, View, use_of

WIDTH = 2400  # pixels of the page at most
DRAWN, AMPLIFIED = 400, 4  # examples on one page at most (all of them are measured); differences


def contact_sheet(examples: list[Example], mix: Mix) -> tuple[Image.Image, list[str]]:
    """All examples of one set on a page, misaligned ones first and in red -> (page, one warning for each of those)."""
    count = len(examples[0].references)
    columns = next((c for most, c in ((6, 1), (24, 2), (60, 3), (120, 4)) if len(examples) <= most), 6)
    side = min(360, (WIDTH // columns - MARGIN) // (count + 3 if count else 2) - MARGIN)
    flagged, plain, warnings = {}, [], []
    for example in tqdm(examples, desc=f"looking at {examples[0].set_id}", leave=False):
        made, wrong = look(example, mix, side)
        warnings += wrong
        if wrong:
            flagged[example.name] = made
        elif len(plain) < DRAWN:
            plain.append(made)
    cards = [*flagged.values(), *plain][:DRAWN]
    heading = [f"{examples[0].set_id}: {len(examples)} {'pairs' if count else 'pictures without a reference'}"]
    heading += ["as the model sees them in epoch 0; of the whole target, what lies outside the orange line is cut off"]
    if len(cards) < len(examples):
        heading.append(f"{len(cards)} of them are drawn here, all were looked at")
    if flagged:
        heading.append(f"{len(flagged)} misaligned although strict, first and in red: {', '.join(flagged)}")
    return page(cards, columns, heading), warnings


def look(example: Example, mix: Mix, side: int) -> tuple[Image.Image, list[str]]:
    """Open an example's pictures, as epoch 0 shows them, once each -> its card, and what is wrong with its frames."""
    original, cells, warnings = example.target.picture.open(), [], []
    target, compared = example.target.transform(original), None
    size, seen = Size(*original.size), example.target.size
    said = [f"{example.name}   {size} to {seen}, {share_cut(size, seen):.0%} cut off"]
    for view in example.references:
        cells.append(("reference", reference := view.open()))
        if reference.size != target.size:
            said.append(str(view.size))
            continue
        compared, shift = compared or reference, shift_between(reference, target)
        said.append(f"shift {shift}")
        if view.strict and shift.wrong:
            what = f"{view.picture.path} and {example.target.picture.path} show different frames, shifted by {shift}"
            what += f" at {view.size}; align them or use reference_loose"
            warnings.append(f"warning: {example.set_id}: {what}")
    mask = example.mask.open().convert("L") if example.mask else Image.new("L", target.size, 255)
    cells.append(("target", Image.composite(target, target.point(lambda value: value // 4), mask)))  # black is dark
    if example.references:
        difference = ImageChops.difference(compared or target, target).point(lambda value: value * AMPLIFIED)
        cells.append((f"difference x{AMPLIFIED}", difference))
    cells.append(("whole target", framed(original, example.target)))
    caption = use_of(0, example, mix.complete(), 0).caption
    return card(["; ".join(said), caption], cells, side, shrink=True, red=bool(warnings)), warnings


def framed(original: Image.Image, view: View) -> Image.Image:
    small = original.reduce(math.ceil(max(original.size) / 400))
    left, upper, right, lower = view.transform.box
    box = [left * small.width, upper * small.height, right * small.width - 1, lower * small.height - 1]
    mask = Image.new("L", small.size, 90)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    shown = Image.composite(small, Image.new("RGB", small.size, "white"), mask)
    ImageDraw.Draw(shown).rectangle(box, outline=(255, 150, 0), width=max(1, min(small.size) // 80))
    return shown


def summary(examples: list[Example], text: tuple[int, int, int] = (512, 4096, 2)) -> list[str]:
    """Buckets, captions, what the caches will take. text: tokens and width of a caption, bytes of a number."""
    groups = [group for e in examples for group in (e.captions, *e.reference_captions) if group]
    captions = list(dict.fromkeys(caption for group in groups for caption in group))
    counts = sorted({len(group) for group in groups})
    per = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    views = {view for e in examples for view in e.views() if not view.fleeting}
    latents = sum((1 if v.mask else 16) * (v.size.width // 8) * (v.size.height // 8) * 4 for v in views) / 1e6
    texts = len(captions) * math.prod(text) / 1e6
    return [
        *histogram(examples),
        f"captions: {len(captions)} different ones, {per} a picture, such as",
        *(f"  {caption}" for caption in captions[:2]),
        f"the caches will take about {latents + texts:.1f} MB: {len(views)} latents {latents:.1f} MB, "
        f"{len(captions)} captions {texts:.1f} MB",
    ]


def histogram(examples: list[Example]) -> list[str]:
    sizes, lines = Counter(e.target.size for e in examples), [f"training sizes of {len(examples)} targets:"]
    most = max(sizes.values())
    lines += [f"  {size!s:>9} {count:6} {'#' * math.ceil(40 * count / most)}" for size, count in sizes.most_common()]
    own = Counter(v.size for e in examples for v in e.references if v.size != e.target.size)
    same = sum(v.size == e.target.size for e in examples for v in e.references)
    others = [f"{count} of {size}" for size, count in own.most_common()]
    return lines + ["references: " + ", ".join([f"{same} of their target's size"] * (same > 0) + others or ["none"])]
