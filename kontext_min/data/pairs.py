"""Which reference belongs to which target, with which caption: found by relative path, completely, or not at all."""

import difflib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
SHOWN = 20  # of each kind of problem


@dataclass(frozen=True)
class Pair:
    """One training example: the edited picture, what it was made from, and the instruction."""

    target: Path
    references: tuple[Path, ...]
    caption: str


def pictures(folder: Path) -> dict[str, list[Path]]:
    """Pictures under a folder by relative path without extension, hidden files left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; correct instance_data_dir")
    found = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            found[path.relative_to(folder).with_suffix("").as_posix()].append(path)
    return dict(found)


def find_pairs(targets: Path, references: list[Path]) -> list[Pair]:
    """Every target with its partner from every reference folder and its caption (NAME.txt beside it).

    Partners have the same relative path; the extension may differ. Raises ValueError with every problem at once.
    """
    target_files = pictures(targets)
    reference_files = [pictures(folder) for folder in references]
    problems: dict[str, list[str]] = defaultdict(list)
    if not target_files:
        problems["folders without pictures"].append(str(targets))
    for folder, files in zip([targets, *references], [target_files, *reference_files], strict=True):
        check_files(folder, files, problems)
    for folder, files in zip(references, reference_files, strict=True):
        for stem in sorted(target_files.keys() - files.keys()):
            hint = near_miss(stem, files.keys() - target_files.keys())
            problems["targets without a reference"].append(f"{target_files[stem][0]} (nothing in {folder}){hint}")
        for stem in sorted(files.keys() - target_files.keys()):
            problems["references without a target"].append(f"{files[stem][0]}")
    captions = {stem: read_caption(paths[0], problems) for stem, paths in sorted(target_files.items())}
    if problems:
        raise ValueError(report(targets, problems))
    return [
        Pair(paths[0], tuple(files[stem][0] for files in reference_files), captions[stem])
        for stem, paths in sorted(target_files.items())
    ]


def check_files(folder: Path, files: dict[str, list[Path]], problems: dict[str, list[str]]):
    """Ambiguous stems and unreadable pictures of one folder."""
    for paths in files.values():
        if len(paths) > 1:
            problems["pictures that differ only in extension"].append(", ".join(str(path) for path in paths))
        for path in paths:
            try:
                with Image.open(path) as image:
                    image.verify()
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
                problems["unreadable pictures"].append(f"{path} ({error})")


def read_caption(target: Path, problems: dict[str, list[str]]) -> str:
    """The text beside a target."""
    path = target.with_suffix(".txt")
    caption = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not caption:
        problems["targets without a caption"].append(
            f"{target} ({path.name} is {'empty' if path.is_file() else 'missing'})"
        )
    return caption


def near_miss(stem: str, candidates: Iterable[str]) -> str:
    """A hint at what was perhaps meant."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    near = [by_lower[name] for name in difflib.get_close_matches(stem.lower(), by_lower, n=1, cutoff=0.6)]
    return f"; did you mean {near[0]}?" if near else ""


def report(folder: Path, problems: dict[str, list[str]]) -> str:
    """All problems of a set, the first twenty of each kind."""
    lines = [f"the pairs of {folder} are not complete; nothing was started"]
    for kind, entries in problems.items():
        lines.append(f"  {len(entries)} {kind}:")
        lines += [f"    {entry}" for entry in entries[:SHOWN]]
        if len(entries) > SHOWN:
            lines.append(f"    … and {len(entries) - SHOWN} more")
    return "\n".join(lines)
