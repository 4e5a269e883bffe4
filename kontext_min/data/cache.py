"""Latents and encoded text on disk: small files, keyed by content and all that shaped them, never by name or place."""

import hashlib
import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kontext_min.checkpoints.load import Component
from kontext_min.checkpoints.tensors import whole_file

VERSION = "1"  # of what is kept and how it is made: a change makes new entries
ENTRY = re.compile(r"[0-9a-f]{40}\.(safetensors|\d+\.tmp)")


def digest(*parts: str | bytes) -> str:  # one key for several parts, none of which can run into the next
    h = hashlib.sha256(VERSION.encode())
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:40]


def weights_id(component: Component, memo: Path) -> str:
    """A network's identity: settings and content of all files. memo: a JSON file with the hashes of unchanged ones."""
    known = json.loads(memo.read_text(encoding="utf-8")) if memo.is_file() else {}
    before, parts = len(known), [repr(sorted(component.config.items()))]
    for path in component.files:
        stat = path.stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        if key not in known:
            with open(path, "rb") as file:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        parts.append(known[key])
    if len(known) > before:
        with whole_file(memo) as file:
            file.write_text(json.dumps(known, indent=2), encoding="utf-8")
    return digest(*parts)


def checksum(value: Mapping[str, Tensor]) -> str:  # of names and bytes
    return digest(*(part for name in sorted(value) for part in (name, value[name].view(torch.uint8).numpy().tobytes())))


@dataclass(frozen=True)
class Cache:
    """A folder of entries, each a mapping of tensors with a checksum."""

    folder: Path

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def whole(self, key: str) -> bool:
        """Whether an entry is there and undamaged; a damaged one is removed, with a line, so that it is made anew."""
        try:
            return self.path(key).is_file() and bool(self.get(key))
        except ValueError:
            print(f"{self.path(key)} is damaged; it is made anew")
            self.path(key).unlink(missing_ok=True)
            return False

    def get(self, key: str) -> dict[str, Tensor]:  # an entry; ValueError with the remedy when it is gone or damaged
        try:
            with safe_open(self.path(key), framework="pt") as handle:
                value = {name: handle.get_tensor(name) for name in handle.keys()}
                if checksum(value) == (handle.metadata() or {}).get("checksum"):
                    return value
                raise ValueError("its checksum differs")
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{self.path(key)} is gone or damaged ({error}); start again: it is made anew") from error

    def put(self, key: str, value: Mapping[str, Tensor]):
        value = {name: tensor.cpu().contiguous() for name, tensor in value.items()}
        with whole_file(self.path(key)) as file:
            save_file(value, file, metadata={"checksum": checksum(value)})

    def prune(self, keys: Container[str]) -> tuple[int, int]:
        """Remove every entry that is not among `keys`, and nothing that is no entry. -> (entries, bytes) removed."""
        entries = [p for p in self.folder.glob("??/*") if ENTRY.fullmatch(p.name) and p.name[:2] == p.parent.name]
        unused = [path for path in entries if path.name[:40] not in keys]
        size = sum(path.stat().st_size for path in unused)
        for path in unused:
            path.unlink()
        return len(unused), size
