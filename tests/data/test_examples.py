"""Views, uses, caches and batches."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CPU, FP32, vae

from kontext_min.checkpoints.load import Component, find, load_vae
from kontext_min.data.buckets import Geometry
from kontext_min.data.cache import Cache, weights_id
from kontext_min.data.examples import Degradation, Example, Examples, Mix, View, make_all, use_of
from kontext_min.data.pairs import Picture
from kontext_min.encoders import TextEncoder, encode_image


def noise(path, size, seed):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return Picture(path)


def view(picture, edge=64):
    return View(picture, Geometry(edge, step=16).transform(picture.size(), (0.5, 0.5)))


@pytest.fixture
def examples(tmp_path):
    """Five examples of noise in two aspects with one or two captions; two reference sets, the second with captions."""
    made = []
    for i, size in enumerate([(80, 80), (80, 80), (120, 80), (80, 80), (120, 80)]):
        pictures = [noise(tmp_path / folder / f"{i}.png", size, 100 * k + i) for k, folder in enumerate("trs")]
        target, *references = map(view, pictures)
        captions = ("a photo of cat", "make it night") if i % 2 else ("make the sky red",)
        own = ((), (f"please {i}",))
        made.append(Example("set", str(i), target, tuple(references), captions, own, tmp_path / "latents"))
    return made


def one_set(examples, which=0):
    """The same with one of the reference sets alone."""
    own = (lambda e: (e.reference_captions[which],)) if which else lambda e: ((),)
    return [replace(e, references=(e.references[which],), reference_captions=own(e)) for e in examples]


def ready(kontext, tmp_path, examples, mix=None, **more):
    prepared = Examples(examples, find(kontext), Cache(tmp_path / "text"), FP32, mix or Mix(), **more)
    prepared.encode(CPU)
    return prepared


def test_a_batch_holds_what_the_encoders_give(kontext, tmp_path, examples):
    prepared = ready(kontext, tmp_path, one_set(examples))
    uses = [prepared.uses(0)[i] for i in (0, 3)]
    batch = prepared.batch(uses, CPU)
    autoencoder, encode = load_vae(find(kontext), CPU, FP32), TextEncoder(find(kontext), CPU, FP32)
    for row, use in enumerate(uses):
        txt, vec = encode(use.caption)
        assert torch.equal(batch.target[row : row + 1], encode_image(autoencoder, use.example.target.open()))
        reference = encode_image(autoencoder, use.references[0].open())
        assert torch.equal(batch.condition.references[0][row : row + 1], reference)
        assert torch.equal(batch.condition.txt[row : row + 1], txt)
        assert torch.equal(batch.condition.vec[row : row + 1], vec)


def test_a_batch_of_two_is_two_batches_of_one(kontext, tmp_path, examples):
    prepared = ready(kontext, tmp_path, examples, Mix(several="combined"))
    uses = [prepared.uses(0)[i] for i in (0, 1)]
    both, first, second = (prepared.batch(part, CPU) for part in (uses, uses[:1], uses[1:]))
    assert torch.equal(both.target, torch.cat([first.target, second.target]))
    assert len(both.condition.references) == 2
    for i in range(2):
        parts = [first.condition.references[i], second.condition.references[i]]
        assert torch.equal(both.condition.references[i], torch.cat(parts))


def test_identical_strict_pictures_become_bit_identical_tensors(kontext, tmp_path):
    for size in [(80, 80), (123, 80), (80, 123), (200, 90)]:
        for style in ("center", "corner", "random"):
            picture = noise(tmp_path / "t" / f"{size}.png", size, 1)
            shutil.copytree(tmp_path / "t", tmp_path / "r", dirs_exist_ok=True)
            twin = Picture(tmp_path / "r" / f"{size}.png")
            transform = Geometry(48, step=16, style=style).transform(picture.size(), (0.2, 0.9))
            pair = (View(picture, transform), View(twin, transform))
            made = [Example("set", "x", pair[0], (pair[1],), ("make it night",), ((),), tmp_path / "latents")]
            prepared = ready(kontext, tmp_path, made)
            batch = prepared.batch(prepared.uses(0), CPU)
            assert torch.equal(batch.target, batch.condition.references[0])


def test_every_epoch_shows_every_example_once_in_batches_of_one_shape(kontext, tmp_path, examples):
    prepared = ready(kontext, tmp_path, one_set(examples), Mix(seed=7))
    orders = [[[use.index for use in batch] for batch in prepared.epoch(number, 2)] for number in range(6)]
    for batches in orders:
        assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4]
        assert all(len({examples[i].target.size for i in batch}) == 1 for batch in batches)
    assert len({str(order) for order in orders}) > 1
    again = ready(kontext, tmp_path, one_set(examples), Mix(seed=7))
    assert orders[3] == [[use.index for use in batch] for batch in again.epoch(3, 2)]


def test_repeats_and_probability_say_how_often_an_example_is_shown(kontext, tmp_path, examples):
    many = [replace(e, repeats=3, probability=0.5, name=f"{i}-{e.name}") for i in range(20) for e in one_set(examples)]
    prepared = Examples(many, find(kontext), Cache(tmp_path / "text"), FP32)
    assert 0.4 < len(prepared.uses(0)) / (len(many) * 4) < 0.6
    assert len({use.repeat for use in prepared.uses(0)}) == 4


def test_random_picks_one_set_by_name_and_epoch_and_combined_shows_all(examples):
    random, combined = Mix(several="random"), Mix(several="combined")
    picks = {(e.name, epoch): use_of(0, e, random, epoch).references for e in examples for epoch in range(20)}
    assert all(len(references) == 1 for references in picks.values())
    shares = [
        sum(r[0] == e.references[k] for e in examples for r in [picks[e.name, n] for n in range(20)]) for k in (0, 1)
    ]
    assert sum(shares) == 100 and min(shares) > 30
    assert all(use_of(0, e, combined, 0).references == e.references for e in examples)


def test_a_reference_sets_captions_are_used_when_it_alone_serves_the_use(examples):
    for epoch in range(10):
        use = use_of(0, examples[1], Mix(several="random"), epoch)
        own = use.references[0] == examples[1].references[1]
        assert use.caption in (("please 1",) if own else examples[1].captions)
    assert use_of(0, one_set(examples, 1)[1], Mix(), 0).caption == "please 1"
    assert use_of(0, examples[1], Mix(several="combined"), 0).caption in examples[1].captions
    assert {use_of(0, one_set(examples)[1], Mix(), n).caption for n in range(20)} == set(examples[1].captions)


def test_captions_and_references_are_dropped_as_often_as_asked_and_independently(kontext, tmp_path, examples):
    mix = Mix(caption_dropout=0.3, reference_dropout=0.2)
    made = Examples(one_set(examples, 1), find(kontext), Cache(tmp_path / "text"), FP32, mix)
    batches = [batch for epoch in range(300) for batch in made.epoch(epoch, 2)]
    uses = [use for batch in batches for use in batch]
    assert all(len({use.shape for use in batch}) == 1 for batch in batches)
    no_caption, no_reference = [use.caption == "" for use in uses], [use.references == () for use in uses]
    assert np.mean(no_caption) == pytest.approx(0.3, abs=0.05)
    assert np.mean(no_reference) == pytest.approx(0.2, abs=0.05)
    assert np.mean(np.array(no_caption) & np.array(no_reference)) == pytest.approx(0.06, abs=0.03)
    of_batches = np.mean([np.mean([use.references == () for use in batch]) for batch in batches])
    assert of_batches == pytest.approx(0.2, abs=0.05)  # each batch weighs alike in training, whatever its size


def test_degradations_are_the_same_in_any_number_of_processes_and_kept_ones_are_files(tmp_path, examples):
    files = {}
    for workers in (1, 4):
        kept = tmp_path / f"kept{workers}"
        views = [
            replace(e.target, degradation=Degradation("superresolution", {"blur_radius": 2.0}, (1, e.name), kept))
            for e in examples
        ]
        make_all(views, workers)
        files[workers] = {file.name: file.read_bytes() for file in kept.iterdir()}
        anew = [replace(view, degradation=replace(view.degradation, folder=None)) for view in views]
        assert all(np.array_equal(kept.open(), made.open()) for kept, made in zip(views, anew, strict=True))
    assert files[1] == files[4] and len(files[1]) == 5


def test_a_kept_degradation_is_made_again_when_source_or_parameters_change(tmp_path, examples):
    source = examples[0].target
    first = replace(source, degradation=Degradation("jpeg_artifacts", {"quality": 20}, (1,), tmp_path / "kept"))
    second = replace(source, degradation=Degradation("jpeg_artifacts", {"quality": 30}, (1,), tmp_path / "kept"))
    assert first.file() != second.file() and first.key() != source.key()
    before = first.file()
    noise(source.picture.path, (80, 80), 77)
    assert first.file() != before


def test_a_degradation_made_at_every_use_differs_from_epoch_to_epoch_and_leaves_no_file(kontext, tmp_path, examples):
    fleeting = Degradation("superresolution", {"noise_level": 0.1}, (1,), None)
    made = [replace(e, references=(replace(e.target, degradation=fleeting),)) for e in one_set(examples)]
    prepared = ready(kontext, tmp_path, made, vae=load_vae(find(kontext), CPU, FP32))
    first, again, second = (prepared.batch([prepared.uses(n)[0]], CPU) for n in (0, 0, 1))
    assert torch.equal(first.condition.references[0], again.condition.references[0])
    assert not torch.equal(first.condition.references[0], second.condition.references[0])
    assert torch.equal(first.target, second.target)
    assert len(list((tmp_path / "latents").rglob("*.safetensors"))) == 5


def test_renaming_keeps_the_cache_and_a_change_of_content_renews_it(kontext, tmp_path, examples):
    first = ready(kontext, tmp_path, one_set(examples))
    old = examples[0].target.picture.path
    moved = Picture(old.rename(old.with_name("renamed.png")))
    renamed = replace(examples[0].target, picture=moved)
    assert first._latent_key(renamed) == first.keys[examples[0].target]
    noise(moved.path, (80, 80), 99)
    assert first._latent_key(renamed) != first.keys[examples[0].target]
    assert first._latent_key(view(moved, 96)) != first._latent_key(renamed)


def test_repeats_in_an_epoch_are_made_anew_too_and_without_repeats_the_epoch_counts(examples):
    fleeting = Degradation("superresolution", {"noise_level": 0.1}, (1,), None)
    (example,) = one_set(examples[:1])
    once = replace(example, references=(replace(example.target, degradation=fleeting),))
    four = replace(once, repeats=3)
    made = [use_of(0, four, Mix(), epoch, repeat).references[0].open() for epoch in (0, 1) for repeat in range(4)]
    assert len({image.tobytes() for image in made}) == 8
    assert [use_of(0, once, Mix(), epoch).references[0].number for epoch in range(3)] == [0, 1, 2]


def test_the_fingerprint_tells_of_everything_that_decides_what_is_learnt(kontext, tmp_path, examples):
    def fingerprint(**changes):
        changed = [replace(examples[0], **changes), *examples[1:]]
        return Examples(changed, find(kontext), Cache(tmp_path / "text"), FP32).fingerprint()

    changes = [{}, {"set_id": "other"}, {"name": "other"}, {"regularise": True}, {"repeats": 1}, {"captions": ("x",)}]
    assert len({fingerprint(**change) for change in changes}) == len(changes)
    assert fingerprint() == fingerprint(cache_dir=tmp_path / "elsewhere")


def test_the_second_start_encodes_nothing_and_other_weights_encode_anew(kontext, tmp_path, examples):
    shutil.copytree(kontext, tmp_path / "model")

    def start():
        return Examples(examples, find(tmp_path / "model"), Cache(tmp_path / "text"), FP32)

    assert start().encode(CPU) == (8, 15)
    assert start().encode(CPU) == (0, 0)
    vae(seed=9).to(torch.bfloat16).save_pretrained(tmp_path / "model" / "vae")
    assert start().encode(CPU) == (0, 15)


def test_two_sets_of_the_same_pictures_may_have_caches_of_their_own(kontext, tmp_path, examples):
    (first,) = one_set(examples[:1])
    prepared = ready(kontext, tmp_path, [first, replace(first, set_id="twin", cache_dir=tmp_path / "own")])
    one, other = (prepared.batch([use], CPU) for use in prepared.uses(0))
    assert torch.equal(one.target, other.target) and list((tmp_path / "own").rglob("*.safetensors"))


def test_a_damaged_entry_is_found_and_made_again(kontext, tmp_path, examples, capsys):
    prepared = ready(kontext, tmp_path, one_set(examples))
    path = Cache(tmp_path / "latents").path(prepared.keys[examples[0].target])
    content = bytearray(path.read_bytes())
    for damage in (bytes(content[:100]), bytes(content[:-4]) + b"\x00\x01\x02\x03"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged.*start again"):
            prepared.batch([prepared.uses(0)[0]], CPU)
        assert prepared.encode(CPU) == (0, 1)
        assert "damaged; it is made anew" in capsys.readouterr().out
        assert path.read_bytes() == content


def test_pruning_removes_what_no_example_uses(kontext, tmp_path, examples):
    ready(kontext, tmp_path, examples)
    few = ready(kontext, tmp_path, one_set(examples)[:2])
    message = few.prune()
    assert message.startswith("removed 16 unused entries")
    assert few.encode(CPU) == (0, 0)
    assert len(list((tmp_path / "latents").rglob("*.safetensors"))) == 4


def test_a_latent_that_is_not_finite_names_the_file(kontext, tmp_path, examples):
    broken = load_vae(find(kontext), CPU, FP32)
    broken.encoder.conv_in.weight.data.fill_(float("nan"))
    prepared = Examples(examples, find(kontext), Cache(tmp_path / "text"), FP32, vae=broken)
    with pytest.raises(ValueError, match=r"t/0.png: its latents are not finite"):
        prepared.encode(CPU)


def test_pruning_leaves_what_is_no_entry_alone(tmp_path):
    (tmp_path / "de").mkdir()
    (tmp_path / "fr" / "sub").mkdir(parents=True)
    for name in ("de/photo.jpg", "de/notes.safetensors", "fr/sub/x.txt"):
        (tmp_path / name).write_text("mine")
    Cache(tmp_path).put("de" + "0" * 38, {"x": torch.zeros(2)})
    assert Cache(tmp_path).prune(set())[0] == 1
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["notes.safetensors", "photo.jpg", "x.txt"]


def test_one_changed_value_anywhere_in_a_weight_file_is_another_identity(tmp_path):
    file, memo = tmp_path / "w.safetensors", tmp_path / "memo.json"
    content = bytearray(5_000_000)
    file.write_bytes(content)
    first = weights_id(Component((file,), {}), memo)
    assert weights_id(Component((file,), {}), memo) == first
    content[1_700_001] = 1
    file.write_bytes(content)
    assert weights_id(Component((file,), {}), memo) != first
