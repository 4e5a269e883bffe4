"""Which references belong to which target: found completely, or named as a problem.

By the same relative path in two folders, which is a picture's name; by a JSONL or CSV file; as halves; or by a suffix.
"""

import csv
import difflib
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from kontext_min.data.buckets import Size, open_image, oriented_size

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
NOT_READ = {".gif", ".avif", ".heic", ".heif", ".jxl", ".psd", ".svg"}
SHOWN = 20  # of each kind of problem


class Problems:
    """Findings by kind. `raise_any` turns them into one ValueError, the first twenty of each kind."""

    def __init__(self):
        self.found: dict[str, list[str]] = defaultdict(list)
        self.facts: list[str] = []  # what else was found, said with the problems or without

    def add(self, kind: str, text: str, name: str = "", candidates: Iterable[str] = ()):  # if shown, with a guess
        self.found[kind].append(text + (near_miss(name, candidates) if len(self.found[kind]) < SHOWN else ""))

    def count(self) -> int:
        return sum(len(entries) for entries in self.found.values())

    def raise_any(self):  # ValueError listing all of them, if there are any
        lines = ["the data cannot be used as it is; nothing was started", *(f"  {fact}" for fact in self.facts)]
        for kind, found in self.found.items():
            entries = list(dict.fromkeys(found))  # a set that two others name was looked at twice
            shown = entries[:SHOWN] + [f"… and {len(entries) - SHOWN} more"] * (len(entries) > SHOWN)
            lines += [f"  {len(entries)} {kind}:", *(f"    {entry}" for entry in shown)]
        if self.found:
            raise ValueError("\n".join(lines))


def near_miss(name: str, candidates: Iterable[str]) -> str:
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""


@dataclass(frozen=True)
class Picture:
    """A file, or the left or right half of one."""

    path: Path
    half: str = ""

    def open(self, ground: str = "white") -> Image.Image:  # RGB, turned upright, laid on `ground`
        image = open_image(self.path, ground)
        if self.half and image.width < 2:
            raise ValueError(f"{self.path} is too narrow to hold two pictures")
        width = image.width // 2
        left = image.width - width if self.half == "right" else 0
        return image.crop((left, 0, left + width, image.height)) if self.half else image

    def size(self) -> Size:  # of the opened picture, which is not decoded
        size = oriented_size(self.path)
        return Size(size.width // 2, size.height) if self.half else size


Pictures, Captions = dict[str, Picture], dict[str, tuple[str, ...]]  # by relative path without extension


def files_under(folder: Path, locked: list[OSError]) -> Iterator[Path]:  # no link is followed back to where it lies
    for parent, inner, names in os.walk(folder, onerror=locked.append, followlinks=True):
        if os.path.realpath(parent) in map(os.path.realpath, Path(parent).parents):
            inner.clear()
        else:
            yield from (Path(parent, name) for name in names)


def in_folder(folder: Path, problems: Problems) -> Pictures:
    """All pictures under a folder, but hidden files and folders; names that only differ in extension are problems."""
    found, locked = defaultdict(list), []
    for path in sorted(files_under(folder, locked)):
        name = path.relative_to(folder).with_suffix("").as_posix()
        kind = "" if "/." in f"/{name}" else path.suffix.lower()
        if kind in EXTENSIONS:
            found[name].append(path)
            if "\\udc" in ascii(name):
                problems.add("names that are no UTF-8", f"{ascii(str(path))}; rename it")
        elif kind in NOT_READ:
            problems.add("pictures of a kind that is not read", f"{path}; save it as .png")
    for error in locked:
        problems.add("folders that cannot be read", f"{error.filename} ({error.strerror}); correct instance_data_dir")
    if not found and not locked:
        problems.add("folders without pictures", f"{folder} (looked for {', '.join(sorted(EXTENSIONS))})")
    for first, *others in found.values():
        for other in others:
            problems.add("names with several pictures", f"{first}, {other.name}; keep one of them")
    return {name: Picture(paths[0]) for name, paths in found.items()}


def check_readable(sets: list[Pictures], problems: Problems):
    """Pictures that cannot be decoded become problems. Every pixel of every file is read: a header may lie."""
    different, alpha = {picture.path: picture for pictures in sets for picture in pictures.values()}, 0
    for path, picture in different.items():
        try:
            picture.open()
            alpha += Image.open(path).has_transparency_data
        except (ValueError, FileNotFoundError) as error:
            problems.add("unreadable pictures", str(error))
    problems.facts += [f"{alpha} pictures with an alpha channel are laid on white, masks on black"] if alpha else []


def check_captions(folder: Path, pictures: Pictures, problems: Problems):
    for path in sorted(folder.rglob("*.txt")) if folder.is_dir() else []:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name not in pictures and "/." not in f"/{name}" and path.name.lower() not in ("readme.txt", "license.txt"):
            problems.add("captions without a picture", str(path), name, pictures)


def captions_of(path: Path, strategy: str | None, prompts: tuple[str, ...], problems: Problems) -> tuple[str, ...]:
    """The captions of a picture, of which one is drawn at every use; () for strategy None.
    textfile: NAME.txt, one caption a line · filename: NAME, blanks for underscores · instanceprompt: the set's prompts
    """
    if strategy in ("instanceprompt", None):
        return prompts if strategy else ()
    file, text, why = path.with_suffix(".txt"), path.stem.replace("_", " "), "its name says nothing"
    if strategy == "textfile":
        try:
            text, why = file.read_text(encoding="utf-8-sig"), f"{file.name} is empty"
        except FileNotFoundError:
            text, why = "", f"{file.name} is missing"
        except (OSError, UnicodeDecodeError) as error:
            text, why = "", f"{file.name} is no readable UTF-8: {error}"
    captions = tuple(line.strip() for line in text.split("\n") if line.strip())
    if not captions:
        problems.add("pictures without a caption", f"{path} ({why})")
    return captions


def match(targets: Pictures, references: Pictures, title: str, problems: Problems):
    alone, unused = targets.keys() - references.keys(), references.keys() - targets.keys()
    for name in sorted(alone):
        problems.add("targets without a reference", f"{targets[name].path}: no {name} in {title}", name, unused)
    for name in sorted(unused):
        problems.add("references without a target", str(references[name].path), name, alone)


def by_suffix(pictures: Pictures, suffix: str) -> tuple[Pictures, Pictures]:
    """One folder's pictures -> (targets NAME, references NAME + suffix, known as NAME)."""
    references = {name.removesuffix(suffix): picture for name, picture in pictures.items() if name.endswith(suffix)}
    return {name: picture for name, picture in pictures.items() if not name.endswith(suffix)}, references


def side_by_side(pictures: Pictures, reference: str) -> tuple[Pictures, Pictures]:
    """Pictures holding both -> (targets, references). reference: the half, left or right, that is the reference."""
    halves = ("right" if reference == "left" else "left", reference)
    return tuple({name: Picture(picture.path, half) for name, picture in pictures.items()} for half in halves)


def from_file(file: Path, problems: Problems) -> tuple[Pictures, Captions, list[Pictures]]:
    """A JSONL or CSV file, paths relative to its folder -> targets, captions, first references, second ones, …."""
    targets, captions, rows = {}, {}, {}
    for number, record in records(file, problems):
        where = f"{file}, line {number}"
        try:
            target, references, caption = fields(record)
            name = Path(target).with_suffix("").as_posix()
        except ValueError as error:
            problems.add("malformed lines", f"{where}: {error}")
            continue
        if name in targets:
            problems.add("names with several pictures", f"{where}: {target} stands twice")
        targets[name] = Picture(file.parent / target)
        captions[name] = tuple(line.strip() for line in caption.split("\n") if line.strip())
        rows[name] = [Picture(file.parent / path) for path in references]
        if not captions[name]:
            problems.add("pictures without a caption", f"{where}: {target}")
    counts = sorted({len(row) for row in rows.values()})
    if len(counts) > 1:
        problems.add("malformed lines", f"{file}: lines have {counts} references; every line needs as many")
    return targets, captions, [{name: row[i] for name, row in rows.items()} for i in range(min(counts, default=0))]


def records(file: Path, problems: Problems) -> Iterable[tuple[int, str | dict]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() != ".csv":
            return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)  # else an open quote swallows other lines
        return [(reader.line_num, {key: value for key, value in row.items() if value}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.add("files that cannot be read", f"pairs_file {file}: {error}")
        return []


def fields(record: str | dict) -> tuple[str, list[str], str]:
    """(target, references, caption) of a line. ValueError says what is wrong with it."""
    known = ("target", "reference", "references", "caption")
    if isinstance(record, str):
        with suppress(ValueError):
            record = json.loads(record)
    if not isinstance(record, dict):
        raise ValueError('not one JSON object {"target": …}')
    if None in record:
        raise ValueError("more fields than line 1; quote a caption that holds a comma")
    if unknown := [str(key) for key in record if key not in known]:
        raise ValueError(f"unknown {', '.join(unknown)}; a line has {', '.join(known)}")
    target, one, several, caption = (record.get(key) or "" for key in known)
    if not target:
        raise ValueError("no target")
    if one and several:
        raise ValueError("both reference and references; give one of them")
    references = one or several or []
    references = [references] if isinstance(references, str) else references
    if not isinstance(references, list) or not all(isinstance(text, str) for text in (target, *references, caption)):
        raise ValueError("target, reference and caption should be texts, references a list of texts")
    if any(path.is_absolute() or ".." in path.parts for path in map(Path, (target, *references))):
        raise ValueError("paths must be relative to the file's folder, without ..")
    "".join((target, *references, caption)).encode()  # JSON can hold halves of characters; they are a ValueError
    return target, references, caption
