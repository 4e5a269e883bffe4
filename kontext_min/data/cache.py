"""Latents and encoded text on disk, keyed by content and by all that shaped the entry, never by name or position.

An entry is one small safetensors file that appears whole or not at all. Deleting the folder costs only time.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kontext_min.checkpoints.load import Component

SAMPLE = 1 << 20  # bytes read at the start, middle and end of a weight file


def digest(*parts: str | bytes) -> str:
    """One key for several parts, none of which can run into the next."""
    h = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:40]


def weights_id(component: Component) -> str:
    """A network's identity: its settings, and of each file the size and a megabyte at start, middle and end."""
    parts: list[str | bytes] = [repr(sorted(component.config.items()))]
    for path in component.files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            parts.append(str(size))
            for place in (0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)):
                file.seek(place)
                parts.append(file.read(SAMPLE))
    return digest(*parts)


class Cache:
    """A folder of entries, each a mapping of tensors."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where an entry lies."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def get(self, key: str) -> dict[str, Tensor]:
        """An entry. FileNotFoundError or ValueError when it is gone or cut short, with the remedy."""
        path = self.path(key)
        if not path.is_file():
            raise FileNotFoundError(f"{path} vanished while it was needed; start again, and it is made anew")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and it is made anew") from error

    def put(self, key: str, value: Mapping[str, Tensor]):
        """Keep an entry."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file({name: tensor.cpu().contiguous() for name, tensor in value.items()}, temporary)
        temporary.replace(path)
