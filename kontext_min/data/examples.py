"""Pairs -> training batches: one geometry per pair, latents and text through the cache, batches of equal shapes."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from kontext_min.checkpoints.load import Checkpoint, load_vae
from kontext_min.data.buckets import Size, bucket_size, fit, open_image, oriented_size
from kontext_min.data.cache import Cache, digest, weights_id
from kontext_min.data.pairs import Pair
from kontext_min.encoders import TextEncoder, encode_image, free
from kontext_min.flow import Condition

SAME_ASPECT = 0.02  # two pictures whose aspects differ by more cannot be cropped alike


@dataclass(frozen=True)
class Example:
    """A pair with the sizes in which it is trained."""

    pair: Pair
    size: Size
    reference_sizes: tuple[Size, ...]
    cache_dir: Path  # of the latents

    def pictures(self) -> list[tuple[Path, Size]]:
        """Target first, then references."""
        return [(self.pair.target, self.size), *zip(self.pair.references, self.reference_sizes, strict=True)]

    def open(self) -> list[Image.Image]:
        """Target and references, cropped and resized: exactly what is encoded."""
        return [fit(open_image(path), size) for path, size in self.pictures()]


@dataclass(frozen=True)
class Batch:
    """Examples of equal shapes: target latents (B, 16, h, w) and what they are made from."""

    target: Tensor
    condition: Condition


def plan(pair: Pair, resolution: int, step: int, strict: list[bool], cache_dir: Path) -> Example:
    """Choose the sizes of a pair. strict: per reference, whether it gets the target's crop and size or its own bucket.

    Raises ValueError when a strict reference has another aspect than its target: it cannot be aligned.
    """
    original = oriented_size(pair.target)
    size = bucket_size(original, resolution, step)
    sizes = []
    for path, same in zip(pair.references, strict, strict=True):
        own = oriented_size(path)
        if same and abs((own.width / own.height) / (original.width / original.height) - 1) > SAME_ASPECT:
            raise ValueError(
                f"{path} is {own} and {pair.target} is {original}: with reference_strict both need one aspect; "
                f"crop them alike, or set conditioning_type to reference_loose"
            )
        sizes.append(size if same else bucket_size(own, resolution, step))
    return Example(pair, size, tuple(sizes), cache_dir)


class Examples:
    """All examples of a run, encoded once and read from the caches when a batch is made."""

    def __init__(self, examples: list[Example], checkpoint: Checkpoint, texts: Cache, dtype: torch.dtype):
        self.examples, self.checkpoint, self.texts, self.dtype = examples, checkpoint, texts, dtype
        self.vae_id = weights_id(checkpoint.components["vae"])
        text_parts = [weights_id(checkpoint.components[part]) for part in ("text_encoder", "text_encoder_2")]
        self.text_id = digest(*text_parts, *tokenizer_files(checkpoint.folder), str(dtype))
        self.latent_keys = [[self._latent_key(*picture) for picture in example.pictures()] for example in examples]

    def _latent_key(self, path: Path, size: Size) -> str:
        return digest("latents", self.vae_id, str(size), path.read_bytes())

    def _text_key(self, caption: str) -> str:
        return digest("text", self.text_id, caption)

    def __len__(self) -> int:
        return len(self.examples)

    def encode(self, device: torch.device):
        """Fill the cache: text first, then pictures; each network is loaded only if something is missing."""
        self._encode_texts(device)
        self._encode_pictures(device)

    def _encode_texts(self, device: torch.device):
        captions = dict.fromkeys(example.pair.caption for example in self.examples)
        missing = [caption for caption in captions if self._text_key(caption) not in self.texts]
        if not missing:
            return
        encode = TextEncoder(self.checkpoint, device, self.dtype)
        for caption in tqdm(missing, desc="encoding captions"):
            txt, vec = encode(caption)
            self.texts.put(self._text_key(caption), {"txt": txt, "vec": vec})
        del encode
        free(device)

    def _encode_pictures(self, device: torch.device):
        missing = {}
        for example, keys in zip(self.examples, self.latent_keys, strict=True):
            cache = Cache(example.cache_dir)
            for key, picture in zip(keys, example.pictures(), strict=True):
                if key not in cache:
                    missing[cache.path(key)] = (cache, key, *picture)
        if not missing:
            return
        vae = load_vae(self.checkpoint, device, torch.float32)
        for cache, key, path, size in tqdm(missing.values(), desc="encoding pictures"):
            cache.put(key, {"latents": encode_image(vae, fit(open_image(path), size))})
        del vae
        free(device)

    def latents(self, index: int) -> list[Tensor]:
        """Target and references of an example from the cache, each (1, 16, h, w) fp32."""
        cache = Cache(self.examples[index].cache_dir)
        return [cache.get(key)["latents"] for key in self.latent_keys[index]]

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """txt (1, L, D) and vec (1, D') of an example."""
        entry = self.texts.get(self._text_key(self.examples[index].pair.caption))
        return entry["txt"], entry["vec"]

    def batch(self, indices: list[int], device: torch.device) -> Batch:
        """Examples of equal shapes as one batch on the device."""
        columns = zip(*map(self.latents, indices), strict=True)
        target, *references = (torch.cat(column).to(device) for column in columns)
        txt, vec = (torch.cat(column).to(device) for column in zip(*map(self.text, indices), strict=True))
        return Batch(target, Condition(txt, vec, references))

    def epoch(self, number: int, batch_size: int, seed: int) -> list[list[int]]:
        """Every example once, in batches of equal shapes (the last of a shape may be smaller), shuffled."""
        generator = seeded("order", seed, number)
        by_shape = defaultdict(list)
        for index in torch.randperm(len(self), generator=generator).tolist():
            example = self.examples[index]
            by_shape[example.size, example.reference_sizes].append(index)
        starts = [(group, i) for group in by_shape.values() for i in range(0, len(group), batch_size)]
        batches = [group[i : i + batch_size] for group, i in starts]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def seeded(*parts: str | int) -> torch.Generator:
    """A CPU generator whose seed is made of all the parts together."""
    return torch.Generator().manual_seed(int(digest(*map(str, parts))[:15], 16))


def tokenizer_files(folder: Path) -> list[bytes]:
    """The contents of both tokenizer folders, which shape the encoded text as weights do."""
    return [path.read_bytes() for part in ("tokenizer", "tokenizer_2") for path in sorted((folder / part).glob("*.*"))]
