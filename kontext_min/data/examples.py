"""Planned pairs -> training batches: views of pictures, what an epoch shows of them, latents and text from the caches.

Everything random is a function of (seed, name, epoch): the same on every machine, with any workers, after resume.
"""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from kontext_min import parallel
from kontext_min.checkpoints.load import Checkpoint, load_vae
from kontext_min.checkpoints.tensors import whole_file
from kontext_min.data.buckets import Size, Transform
from kontext_min.data.cache import Cache, digest, weights_id
from kontext_min.data.degrade import degrade
from kontext_min.data.pairs import Picture
from kontext_min.encoders import TextEncoder, encode_image, free, mask_weights
from kontext_min.flow import Condition
from kontext_min.models.vae import VAE
from kontext_min.quantize import form_of, quantising


def draw(*parts: str | int) -> np.random.Generator:  # a generator whose seed is made of all the parts together
    return np.random.default_rng(int(digest(*map(str, parts)), 16))


@dataclass(frozen=True, eq=False)
class Degradation:
    """A generator that makes a reference out of its target, and where it is kept; None: made anew at every use."""

    name: str
    parameters: dict
    seed: tuple[str | int, ...]
    folder: Path | None


@dataclass(frozen=True)
class View:
    """A picture as the model sees it: which file, how it is cut and resized, and how it is degraded."""

    picture: Picture
    transform: Transform
    degradation: Degradation | None = None
    strict: bool = False  # a reference that must show its target's frame
    crop: Callable[[int], Transform] | None = None  # cut anew at every use
    mask: bool = False  # no picture, but where the loss counts
    number: int = 0  # of the use

    @property
    def size(self) -> Size:
        return self.transform.size

    @property
    def fleeting(self) -> bool:  # whether it differs from use to use, so that keeping its latents would be of no use
        return self.crop is not None or (self.degradation is not None and self.degradation.folder is None)

    def at(self, number: int) -> "View":  # at a use of that number: itself unless it is made anew at every use
        transform = self.crop(number) if self.crop else self.transform
        return replace(self, number=number, transform=transform) if self.fleeting else self

    def key(self) -> str:  # content and everything that shapes the pixels
        how = self.degradation
        made = () if how is None else (how.name, repr(how.parameters), repr(how.seed))
        return digest(self.picture.path.read_bytes(), self.picture.half, repr(self.transform), *made)

    def open(self) -> Image.Image:
        """RGB, of the view's size; a degradation, unless it is kept, is made now, seeded by name and number."""
        how, file = self.degradation, self.file()
        if file and file.is_file():
            return Image.open(file).convert("RGB")
        image = self.transform(self.picture.open("black" if self.mask else "white"))
        return degrade(image, how.name, how.parameters, draw(*how.seed, self.number)) if how else image

    def file(self) -> Path | None:  # where a kept degradation lies; its name changes with source and parameters
        folder = self.degradation and self.degradation.folder
        return folder and folder / f"{self.picture.path.stem}-{self.key()[:12]}.png"

    def make(self):
        with whole_file(self.file()) as file:
            self.open().save(file, "PNG")


@dataclass(frozen=True)
class Example:
    """A target and all that it may be made from."""

    set_id: str
    name: str  # relative path without extension
    target: View
    references: tuple[View, ...]  # one per reference set; () trains text-to-image
    captions: tuple[str, ...]
    reference_captions: tuple[tuple[str, ...], ...]  # as references; () where the set has none of its own
    cache_dir: Path  # of the latents
    repeats: int = 0
    probability: float = 1.0
    regularise: bool = False
    mask: View | None = None  # where the loss counts; None: everywhere

    def views(self) -> tuple[View, ...]:  # target, then references, then the mask
        return (self.target, *self.references, *([self.mask] if self.mask else []))


@dataclass(frozen=True)
class Mix:
    """What an epoch shows of the examples."""

    seed: int = 42
    several: str = "random"  # of several reference sets: one at random, or all of them combined
    caption_dropout: float = 0.0
    reference_dropout: float = 0.0
    masked: float = 1.0  # share of uses in which a mask counts
    black: float = 0.0  # weight of a mask's black part, white being 1

    def complete(self) -> "Mix":  # the same with nothing left out
        return replace(self, caption_dropout=0.0, reference_dropout=0.0, masked=1.0)


@dataclass(frozen=True)
class Use:
    """One example as it is shown once."""

    index: int
    repeat: int
    example: Example
    target: View
    references: tuple[View, ...]
    caption: str
    mask: View | None = None

    @property
    def shape(self) -> tuple:  # uses of one shape can stand in one batch
        return self.target.size, tuple(view.size for view in self.references), self.example.regularise


def use_of(index: int, example: Example, mix: Mix, epoch: int, repeat: int = 0) -> Use:
    """References, caption and mask of one use. A set's own captions replace the target's when it alone serves it."""
    r, n = draw("use", mix.seed, example.set_id, example.name, epoch, repeat), epoch * (example.repeats + 1) + repeat
    picked, caption_draw, no_caption, masked = r.random(4)
    references, own = example.references, example.reference_captions
    if mix.several == "random":
        choice = int(picked * len(references))
        references, own = references[choice : choice + 1], own[choice : choice + 1]
    captions = (own[0] if len(own) == 1 else ()) or example.captions
    caption = captions[int(caption_draw * len(captions))] if no_caption >= mix.caption_dropout else ""
    mask = example.mask.at(n) if example.mask and masked < mix.masked else None
    return Use(index, repeat, example, example.target.at(n), tuple(v.at(n) for v in references), caption, mask)


@dataclass(frozen=True)
class Batch:
    """Uses of equal shapes: target latents (B, 16, h, w) and what they are made from."""

    target: Tensor
    condition: Condition
    regularise: bool = False  # learn the base model's own prediction instead of the target
    weight: Tensor | None = None  # (B, 1, h, w) of the loss at every latent, 1 on average of each use; None: 1


@dataclass
class Examples:
    """All examples of a run, encoded once and read from the caches when a batch is made."""

    examples: list[Example]
    checkpoint: Checkpoint
    texts: Cache
    dtype: torch.dtype
    mix: Mix = field(default_factory=Mix)
    vae: VAE | None = None  # needed for views that are made anew at every use
    prompts: tuple[str, ...] = ()  # texts that are needed beside the captions
    t5: str = "no_change"  # precision of that encoder

    def __post_init__(self):
        self.vae_id, *encoders = map(self.weights_of, ("vae", "text_encoder", "text_encoder_2"))
        folders = [self.checkpoint.folder / part for part in ("tokenizer", "tokenizer_2")]
        tokenizers = [path.read_bytes() for folder in folders for path in sorted(folder.glob("*.*"))]
        self.text_id = digest(*encoders, *tokenizers, str(self.dtype), form_of(self.t5) or "")
        self.keys = {view: self._latent_key(view) for e in self.examples for view in e.views() if not view.fleeting}

    def weights_of(self, part: str) -> str:
        return weights_id(self.checkpoint.components[part], self.texts.folder / "weights.json")

    def _latent_key(self, view: View) -> str:
        return digest("mask on black" if view.mask else "latents", self.vae_id, view.key())

    def _text_key(self, caption: str) -> str:
        return digest("text", self.text_id, caption)

    def captions(self) -> list[str]:
        shown = [c for e in self.examples for group in (e.captions, *e.reference_captions) for c in group]
        return list(dict.fromkeys([*shown, *self.prompts, *([""] if self.mix.caption_dropout else [])]))

    def fingerprint(self) -> str:
        """The data's content: every picture, caption and name, how often and how mixed; folders do not count."""
        own = ("set_id", "name", "captions", "reference_captions", "repeats", "probability", "regularise")
        parts = [[getattr(example, key) for key in own] for example in self.examples]
        views = [self.keys.get(view) or view.key() for e in self.examples for view in e.views()]
        return digest(repr(parts), *views, repr(self.mix), self.vae_id, self.text_id)

    def encode(self, device: torch.device) -> tuple[int, int]:
        """Fill the caches, loading a network only if something is missing. -> how many captions and pictures.
        All ranks look what is missing, and each makes its share of that.
        """
        captions = [caption for caption in self.captions() if not self.texts.whole(self._text_key(caption))]
        kept = [(Cache(e.cache_dir), view) for e in self.examples for view in e.views() if not view.fleeting]
        views = {(cache, self.keys[view]): view for cache, view in kept if not cache.whole(self.keys[view])}
        parallel.wait()
        own = slice(parallel.rank(), None, parallel.world())  # of what is shared out
        if mine := captions[own]:
            encode = TextEncoder(self.checkpoint, device, self.dtype, quantising(self.t5))
            for caption in tqdm(mine, desc="encoding captions", unit=" captions"):
                self.texts.put(self._text_key(caption), dict(zip(("txt", "vec"), encode(caption), strict=True)))
            del encode
            free()
        if mine := [*views.items()][own]:
            vae = self.vae or load_vae(self.checkpoint, device, torch.float32)
            for (cache, key), view in tqdm(mine, desc="encoding pictures", unit=" pictures"):
                cache.put(key, {"latents": encode_view(vae, view)})
            del vae
            free()
        parallel.wait()
        return len(captions), len(views)

    def prune(self, *others: "Examples") -> str:
        """Remove from the caches what neither this nor `others` use. -> one sentence on what went."""
        together = (self, *others)
        texts = {part._text_key(caption) for part in together for caption in part.captions()}
        latents = {key for part in together for key in part.keys.values()}
        folders = {example.cache_dir for part in together for example in part.examples}
        removed = [self.texts.prune(texts), *(Cache(folder).prune(latents) for folder in folders)]
        entries, size = map(sum, zip(*removed, strict=True))
        return f"removed {entries} unused entries, {size / 1e6:.1f} MB"

    def latents(self, example: Example, view: View) -> Tensor:
        """(1, 16, h, w) fp32 (of a mask 1 channel): from the cache, or encoded now if it is made anew at every use."""
        if view.fleeting:
            assert self.vae is not None, "views that are made anew need the VAE"
            return encode_view(self.vae, view).cpu()
        return Cache(example.cache_dir).get(self.keys[view])["latents"]

    def text(self, caption: str) -> tuple[Tensor, Tensor]:  # txt (1, L, D) and vec (1, D') of a caption
        return tuple(self.texts.get(self._text_key(caption))[key] for key in ("txt", "vec"))

    def batch(self, uses: list[Use], device: torch.device) -> Batch:
        rows = ([self.latents(use.example, view) for view in (use.target, *use.references)] for use in uses)
        columns = (*zip(*(self.text(use.caption) for use in uses), strict=True), *zip(*rows, strict=True))
        txt, vec, target, *references = (torch.cat(column).to(device) for column in columns)
        condition, weight = Condition(txt, vec, references), None
        if any(use.mask for use in uses):
            weight = torch.cat([self.weight(use, target.shape[-2:]) for use in uses]).to(device)
        return Batch(target, condition, uses[0].example.regularise, weight)

    def weight(self, use: Use, shape: tuple[int, int]) -> Tensor:
        """(1, 1, h, w) how much a use's loss counts at every latent, 1 on average; 0 where a crop left no white."""
        if use.mask is None:
            return torch.ones(1, 1, *shape)
        weight = self.mix.black + (1 - self.mix.black) * self.latents(use.example, use.mask)
        return weight / weight.mean().clamp(min=1e-6)

    def uses(self, number: int) -> list[Use]:
        return [
            use_of(index, example, self.mix, number, repeat)
            for index, example in enumerate(self.examples)
            for repeat in range(example.repeats + 1)
            if draw("share", self.mix.seed, example.set_id, example.name, number, repeat).random() < example.probability
        ]

    def epoch(self, number: int, batch_size: int) -> list[list[Use]]:
        """What one epoch shows, shuffled, in batches of equal shapes (the last of a shape may be smaller)."""
        r, uses, groups = draw("order", self.mix.seed, number), self.uses(number), defaultdict(list)
        for i in r.permutation(len(uses)):
            groups[uses[i].shape].append(uses[i])
        batches = [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
        # by whole batches: uses without references would else stand in small ones of their own, which weigh as much
        batches, share = [batches[i] for i in r.permutation(len(batches))], self.mix.reference_dropout
        return [[replace(use, references=()) for use in uses] if r.random() < share else uses for uses in batches]


def make_all(views: list[View], workers: int | None = None):
    """Write every kept degradation that is not there yet, on several processes; the result does not depend on them."""
    missing = {file: view for view in views if (file := view.file()) is not None and not file.is_file()}
    if missing:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(tqdm(pool.map(View.make, missing.values(), chunksize=8), total=len(missing), desc="making references"))


def encode_view(vae: VAE, view: View) -> Tensor:
    """Latents, or a mask's share of white. ValueError naming the file when there is a NaN or an infinity among them."""
    latents = mask_weights(view.open(), vae.config.factor) if view.mask else encode_image(vae, view.open())
    if not torch.isfinite(latents).all():
        raise ValueError(f"{view.picture.path}: its latents are not finite; it or the VAE's weights are broken")
    return latents
