"""Where nano looks at the word for the object that it edits. `pytest -s tests/study/test_words.py` prints the table."""

from pathlib import Path

import numpy as np
import pytest
import torch
from einops import reduce
from torch import Tensor

from kontext_min import flow, sampler
from kontext_min.checkpoints.load import find, load_flux, load_vae
from kontext_min.data.buckets import Size
from kontext_min.encoders import TextEncoder
from kontext_min.nano.edits import instruction
from kontext_min.nano.model import tokenizers_of
from kontext_min.nano.pretrain import to_tensor
from kontext_min.nano.scenes import EDITS, cover, draw, random_scene
from kontext_min.study.experiment import word_slices
from kontext_min.study.hooks import Call, attention, average

SIZE, TOKENS, TEXT, COUNT = Size(96, 96), 36, 24, 50
STREAMS = {"target": slice(TOKENS), "reference": slice(TOKENS, 2 * TOKENS)}  # of what follows the text
REPORTED, CHOICE = 0, 1000  # first of the scenes that the table is of, and of those that the head is chosen on


class Editor:
    """nano, for many instructions at once."""

    def __init__(self, folder: Path):
        checkpoint, place = find(folder), (torch.device("cpu"), torch.float32)
        self.flux, self.vae = load_flux(checkpoint, *place), load_vae(checkpoint, *place)
        self.text, self.shift = TextEncoder(checkpoint, *place), checkpoint.shift

    @torch.inference_mode()
    def __call__(self, prompts: list[str], references: Tensor):
        """Four steps from one noise for every instruction and picture (B, 3, H, W)."""
        ids, latents = tokenizers_of(Path("weights/nano"))(prompts), [self.vae.encode(references)]
        condition = flow.Condition(self.text.t5(ids[:, 0]), self.text.clip(ids[:, 1]), latents)
        field = sampler.guided(self.flux, condition, None, sampler.Sampling(guidance=1.0))
        noise = flow.draw_noise(latents[0].shape, torch.Generator().manual_seed(0))
        for _ in sampler.euler(field, noise, flow.schedule(4, TOKENS, self.shift)):
            pass


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor(Path("weights/nano"))


def scenes_of(edit: str, first: int) -> tuple[list[str], list[str], Tensor, Tensor]:
    """Instructions, the edited object's shape, pictures of two or three objects, and its share of every token."""
    prompts, shapes, pictures, masks = [], [], [], []
    for i in range(first, first + COUNT):
        r = np.random.default_rng([7, i])
        scene = random_scene(r, least=2)
        words, (_, changed) = EDITS[edit](r, scene)
        (thing,) = set(scene.objects) - set(changed.objects)
        prompts.append(instruction(r, edit, **words).rstrip("."))
        shapes.append(thing.shape)
        pictures.append(draw(scene, SIZE))
        masks.append(reduce(cover(thing, SIZE), "(h a) (w b) 1 -> (h w)", "mean", a=16, b=16))
    return prompts, shapes, to_tensor(pictures), torch.tensor(np.array(masks))


def maps_of(editor: Editor, edit: str, first: int) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """One run over all scenes -> how a stream's tokens look at the word, and the masks (B, tokens).

    (stream, "plain" or "relative": attention, or that divided by its mean) -> (blocks, B, H, tokens), mean over steps.
    """
    prompts, shapes, pictures, masks = scenes_of(edit, first)
    word = torch.zeros(COUNT, 1, TEXT, 1)
    for i, (prompt, shape) in enumerate(zip(prompts, shapes, strict=True)):
        part = word_slices(editor.text.tokenize_t5, prompt)[shape]
        word[i, :, part] = 1 / (part.stop - part.start)

    def look(call: Call) -> Tensor:  # (2, B, H, L)
        found = attention(slice(TEXT, None), slice(TEXT))(call)
        relative = [found[:, :, tokens] / found[:, :, tokens].mean(2, keepdim=True) for tokens in STREAMS.values()]
        return (torch.stack([found, torch.cat(relative, dim=2)]) @ word)[..., 0]

    with average(editor.flux, "*_blocks.*.attend", look) as means:
        editor(prompts, pictures)
    maps = torch.stack(list(means.values()), dim=1)  # (2, blocks, B, H, L)
    hows = zip(("plain", "relative"), maps, strict=True)
    return {(name, how): m[..., tokens] for how, m in hows for name, tokens in STREAMS.items()}, masks


def ratios(maps: Tensor, masks: Tensor) -> tuple[float, float]:
    """Maps (B, tokens) -> mean attention inside the masks over that outside; share of scenes where it is 2 or more."""
    inside, outside = ((maps * m).sum(1) / m.sum(1) for m in (masks, 1 - masks))
    return float(inside.mean() / outside.mean()), float((inside >= 2 * outside).float().mean())


@pytest.mark.parametrize("edit", ["recolour", "remove"])
def test_the_word_for_the_edited_object_is_looked_at_on_that_object(editor, edit):
    """By the block and head that do so best on other scenes; what the means over all do is printed."""
    (choice, choice_masks), (maps, masks) = (maps_of(editor, edit, first) for first in (CHOICE, REPORTED))
    print(f"\n{edit}, {COUNT} scenes: inside / outside (share of scenes with 2 or more)")
    best = {}
    for name in STREAMS:
        heads = [(b, h) for b in range(len(choice[name, "relative"])) for h in range(editor.flux.config.num_heads)]
        b, h = max(heads, key=lambda at: ratios(choice[name, "relative"][at[0], :, at[1]], choice_masks)[0])
        best[name] = ratios(maps[name, "relative"][b, :, h], masks)
        plain, relative = (ratios(maps[name, how].mean((0, 2)), masks) for how in ("plain", "relative"))
        said = (("plain mean", plain), ("relative mean", relative), (f"block {b} head {h}", best[name]))
        print(f"  {name:9}  " + "   ".join(f"{what} {r:.1f} ({share:.0%})" for what, (r, share) in said))
    assert max(ratio for ratio, _ in best.values()) >= 2
