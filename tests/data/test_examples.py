"""Geometry, caches and batches."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CPU, FP32, vae

from kontext_min.checkpoints.load import find, load_vae
from kontext_min.data.cache import Cache
from kontext_min.data.examples import Examples, plan
from kontext_min.data.pairs import Pair
from kontext_min.encoders import TextEncoder, encode_image


@pytest.fixture
def pairs(tmp_path):
    """Five pairs of noise in two aspects, with different captions."""
    made, generator = [], np.random.default_rng(0)
    for i, size in enumerate([(80, 80), (80, 80), (120, 80), (80, 80), (120, 80)]):
        paths = []
        for folder in ("target", "reference"):
            (tmp_path / folder).mkdir(exist_ok=True)
            paths.append(tmp_path / folder / f"{i}.png")
            Image.fromarray(generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(paths[-1])
        made.append(Pair(paths[0], (paths[1],), f"edit {i % 3}"))
    return made


def examples_of(kontext, folder, pairs, resolution=64):
    examples = Examples([plan(p, resolution, 16, [True], folder) for p in pairs], find(kontext), Cache(folder), FP32)
    examples.encode(CPU)
    return examples


def test_a_batch_holds_what_the_encoders_give(kontext, tmp_path, pairs):
    examples = examples_of(kontext, tmp_path / "cache", pairs)
    batch = examples.batch([0, 3], CPU)
    vae, encode = load_vae(find(kontext), CPU, FP32), TextEncoder(find(kontext), CPU, FP32)
    for row, index in enumerate([0, 3]):
        target, reference = examples.examples[index].open()
        txt, vec = encode(pairs[index].caption)
        assert torch.equal(batch.target[row : row + 1], encode_image(vae, target))
        assert torch.equal(batch.condition.references[0][row : row + 1], encode_image(vae, reference))
        assert torch.equal(batch.condition.txt[row : row + 1], txt)
        assert torch.equal(batch.condition.vec[row : row + 1], vec)


def test_every_epoch_holds_every_example_once_in_batches_of_one_shape(kontext, tmp_path, pairs):
    examples = examples_of(kontext, tmp_path / "cache", pairs)
    orders = [examples.epoch(number, 2, seed=7) for number in range(6)]
    for batches in orders:
        assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4]
        assert all(len({examples.examples[i].size for i in batch}) == 1 for batch in batches)
    assert len({str(order) for order in orders}) > 1
    assert orders[3] == examples.epoch(3, 2, seed=7) != examples.epoch(3, 2, seed=8)


def test_renaming_keeps_the_cache_and_a_change_of_content_renews_it(kontext, tmp_path, pairs):
    first = examples_of(kontext, tmp_path / "cache", pairs)
    entries = set((tmp_path / "cache").rglob("*.safetensors"))
    moved = [Pair(p.target.rename(p.target.with_name(f"x{p.target.name}")), p.references, p.caption) for p in pairs]
    renamed = examples_of(kontext, tmp_path / "cache", moved)
    assert renamed.latent_keys == first.latent_keys
    Image.new("RGB", (80, 80)).save(moved[0].target)
    changed = examples_of(kontext, tmp_path / "cache", moved)
    assert changed.latent_keys[0][0] != first.latent_keys[0][0] and changed.latent_keys[0][1] == first.latent_keys[0][1]
    other_size = examples_of(kontext, tmp_path / "cache", moved, resolution=96)
    assert not {k for row in other_size.latent_keys for k in row} & {k for row in changed.latent_keys for k in row}
    assert set((tmp_path / "cache").rglob("*.safetensors")) > entries


def test_other_weights_are_other_entries(kontext, tmp_path, pairs):
    shutil.copytree(kontext, tmp_path / "model")
    first = examples_of(tmp_path / "model", tmp_path / "cache", pairs)
    vae(seed=9).to(torch.bfloat16).save_pretrained(tmp_path / "model" / "vae")
    second = examples_of(tmp_path / "model", tmp_path / "cache", pairs)
    assert first.vae_id != second.vae_id and first.text_id == second.text_id
    assert not torch.equal(first.batch([0], CPU).target, second.batch([0], CPU).target)


def test_a_damaged_entry_is_named_with_the_remedy(kontext, tmp_path, pairs):
    examples = examples_of(kontext, tmp_path / "cache", pairs)
    path = Cache(tmp_path / "cache").path(examples.latent_keys[0][0])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged.*delete it"):
        examples.batch([0], CPU)


def test_a_strict_reference_of_another_aspect_is_refused_and_a_loose_one_gets_its_own_size(tmp_path, pairs):
    mixed = Pair(pairs[0].target, (pairs[2].references[0],), "x")
    with pytest.raises(ValueError, match="reference_strict.*reference_loose"):
        plan(mixed, 64, 16, [True], tmp_path)
    assert plan(mixed, 64, 16, [False], tmp_path).reference_sizes == ((80, 48),)
