"""Which references belong to which target: found completely, or named as a problem.

Four ways to give pairs: folders with the same relative paths, a JSONL or CSV file, side-by-side pictures, and
`NAME_ref.png` beside `NAME.png`. A picture is known by its relative path without extension.
"""

import csv
import io
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from kontext_min.data.buckets import Size, open_image, oriented_size
from kontext_min.data.problems import Problems, near_miss

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
NOT_READ = {".gif", ".avif", ".heic", ".heif", ".jxl", ".psd", ".svg"}


@dataclass(frozen=True)
class Picture:
    """A file, or the left or right half of one."""

    path: Path
    half: str = ""

    def open(self) -> Image.Image:
        """RGB, turned upright."""
        image = open_image(self.path)
        if not self.half:
            return image
        if image.width < 2:
            raise ValueError(f"{self.path} is too narrow to hold two pictures")
        left = 0 if self.half == "left" else image.width - image.width // 2
        return image.crop((left, 0, left + image.width // 2, image.height))

    def has_alpha(self) -> bool:
        """Whether the file holds transparency, by its header."""
        with Image.open(self.path) as image:
            return image.has_transparency_data

    def size(self) -> Size:
        """Of the opened picture, from the file's header."""
        size = oriented_size(self.path)
        return Size(size.width // 2, size.height) if self.half else size


Pictures = dict[str, Picture]  # by relative path without extension


@dataclass(frozen=True)
class Row:
    """One line of a pairs file."""

    target: Picture
    references: tuple[Picture, ...]
    captions: tuple[str, ...]


def in_folder(folder: Path, problems: Problems) -> Pictures:
    """All pictures under a folder; hidden files are left out, names that only differ in extension are problems."""
    if not os.path.isdir(folder):  # False also where it cannot be looked at
        problems.add("folders that do not exist", f"{folder}; correct instance_data_dir")
        return {}
    found: dict[str, list[Path]] = defaultdict(list)
    locked: list[OSError] = []
    tree = os.walk(folder, onerror=locked.append, followlinks=True)
    for path in sorted(Path(parent, name) for parent, _, names in tree for name in names):
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            found[path.relative_to(folder).with_suffix("").as_posix()].append(path)
        elif path.suffix.lower() in NOT_READ:
            problems.add("pictures of a kind that is not read", f"{path}; save it as .png")
    for error in locked:
        problems.add("folders that cannot be read", f"{error.filename} ({error.strerror}); check its permissions")
    if not found and not locked:
        problems.add("folders without pictures", f"{folder} (looked for {', '.join(sorted(EXTENSIONS))})")
    for paths in found.values():
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            problems.add("names with several pictures", f"{paths[0].parent}: {names}; keep one of them")
    return {name: Picture(paths[0]) for name, paths in found.items()}


def check_readable(pictures: Pictures, problems: Problems) -> Pictures:
    """The same pictures; those that cannot be decoded become problems. Every pixel is read: a header may lie."""
    for picture in pictures.values():
        try:
            picture.open()
            problems.remarks["pictures with an alpha channel are laid on white"] += picture.has_alpha()
        except (ValueError, FileNotFoundError) as error:
            problems.add("unreadable pictures", str(error))
    return pictures


def check_captions(folder: Path, pictures: Pictures, problems: Problems):
    """Caption files that no picture stands beside."""
    for path in sorted(folder.rglob("*.txt")) if folder.is_dir() else []:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name not in pictures and path.name.lower() not in ("readme.txt", "license.txt"):
            problems.add("captions without a picture", f"{path}{near_miss(name, pictures)}")


def match(targets: Pictures, references: Pictures, title: str, problems: Problems):
    """Every target needs a partner among the references and the other way round. title: what the references are."""
    for name in sorted(targets.keys() - references.keys()):
        hint = near_miss(name, references.keys() - targets.keys())
        problems.add("targets without a reference", f"{targets[name].path}: no {name} in {title}{hint}")
    for name in sorted(references.keys() - targets.keys()):
        hint = near_miss(name, targets.keys() - references.keys())
        problems.add("references without a target", f"{references[name].path}{hint}")


def by_suffix(pictures: Pictures, suffix: str) -> tuple[Pictures, Pictures]:
    """One folder's pictures -> (targets NAME, references NAME + suffix, known as NAME)."""
    references = {name.removesuffix(suffix): picture for name, picture in pictures.items() if name.endswith(suffix)}
    return {name: picture for name, picture in pictures.items() if not name.endswith(suffix)}, references


def side_by_side(pictures: Pictures, reference: str) -> tuple[Pictures, Pictures]:
    """Pictures holding both -> (targets, references). reference: the half, left or right, that is the reference."""
    target = {"left": "right", "right": "left"}[reference]
    return (
        {name: Picture(picture.path, target) for name, picture in pictures.items()},
        {name: Picture(picture.path, reference) for name, picture in pictures.items()},
    )


def from_file(file: Path, problems: Problems) -> dict[str, Row]:
    """A JSONL or CSV file with target, reference or references, caption; paths are relative to the file's folder."""
    rows: dict[str, Row] = {}
    for number, record in records(file, problems):
        where = f"{file}, line {number}"
        wrong = malformed(record)
        if wrong:
            problems.add("malformed lines", f"{where}: {wrong}")
            continue
        references = record.get("references") or record.get("reference") or []
        references = [references] if isinstance(references, str) else references
        if any(Path(path).is_absolute() or ".." in Path(path).parts for path in (record["target"], *references)):
            problems.add("paths that leave the folder", f"{where}: paths must be relative to {file.parent}, without ..")
            continue
        name = Path(record["target"]).with_suffix("").as_posix()
        if name in rows:
            problems.add("names with several pictures", f"{where}: {record['target']} stands twice")
        captions = tuple(line.strip() for line in (record.get("caption") or "").splitlines() if line.strip())
        if not captions:
            problems.add("pictures without a caption", f"{where}: {record['target']}")
        pictures = tuple(Picture(file.parent / path) for path in references)
        rows[name] = Row(Picture(file.parent / record["target"]), pictures, captions)
    counts = {len(row.references) for row in rows.values()}
    if len(counts) > 1:
        problems.add("malformed lines", f"{file}: lines have {sorted(counts)} references; every line needs as many")
    return rows


KEYS = ("target", "reference", "references", "caption")  # of a line


def malformed(record: dict) -> str:
    """What is wrong with a line's keys and values, or nothing."""
    unknown = [str(key) for key in record if key not in KEYS]
    if unknown:
        return f"unknown {', '.join(unknown)}; a line has {', '.join(KEYS)}"
    if not isinstance(record.get("target"), str) or not record["target"]:
        return "no target"
    if record.get("reference") and record.get("references"):
        return "both reference and references; give one of them"
    references = record.get("references") or []
    several = (
        isinstance(references, str) or isinstance(references, list) and all(isinstance(r, str) for r in references)
    )
    one = all(isinstance(record.get(key) or "", str) for key in ("reference", "caption"))
    return "" if one and several else "reference and caption should be texts, references a list of texts"


def records(file: Path, problems: Problems) -> list[tuple[int, dict]]:
    """The lines of a JSONL or CSV file as mappings, with their numbers."""
    if not file.is_file():
        problems.add("files that do not exist", f"{file}; correct pairs_file")
        return []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        problems.add("malformed lines", f"{file} is not UTF-8")
        return []
    if file.suffix.lower() == ".csv":
        return csv_records(file, text, problems)
    parsed = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                record = json.loads(line)
                assert isinstance(record, dict)
            except (ValueError, AssertionError):
                problems.add("malformed lines", f'{file}, line {number} is not one JSON object {{"target": …}}')
            else:
                parsed.append((number, record))
    return parsed


def csv_records(file: Path, text: str, problems: Problems) -> list[tuple[int, dict]]:
    """The lines of a CSV file, whose first names the columns."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or []
    if "target" not in columns or set(columns) - set(KEYS):
        problems.add(
            "malformed lines", f"{file}, line 1 names the columns {columns}; it needs target, and may have {KEYS[1:]}"
        )
        return []
    rows = []
    for row in reader:
        if None in row:
            hint = "quote a caption that holds a comma"
            problems.add("malformed lines", f"{file}, line {reader.line_num} has more fields than line 1; {hint}")
        else:
            rows.append((reader.line_num, {key: value for key, value in row.items() if value}))
    return rows
