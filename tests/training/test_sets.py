"""The data list of a config: the quickstart's three snippets, sizes, captions, and what is said at start."""

import numpy as np
import pytest
from PIL import Image

from kontext_min.config import Config, Dataset, checked
from kontext_min.data.examples import Mix, use_of
from kontext_min.training.sets import read_sets


def photo(path, size=(90, 60), seed=0):
    """A picture with detail at every scale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    r, picture = np.random.default_rng(seed), np.zeros((size[1], size[0], 3))
    for cell in (2, 5, 15):
        small = r.uniform(0, 85, (size[1] // cell + 1, size[0] // cell + 1, 3))
        picture += np.kron(small, np.ones((cell, cell, 1)))[: size[1], : size[0]]
    Image.fromarray(picture.astype(np.uint8)).save(path)


def folder(path, captions=True, size=(90, 60)):
    for i in range(3):
        photo(path / f"{i}.png", size, i)
        if captions:
            (path / f"{i}.txt").write_text(f"caption {i}")
    return path


def sets_of(tmp_path, *entries, **config):
    config = {"data_backend_config": list(entries), "cache_dir": tmp_path / "cache", **config}
    return read_sets(checked(Config, config, "test"), 16)


def sharpness(image):
    """Variance of the Laplacian of the luma."""
    x = np.asarray(image.convert("L"), float)
    return np.var(4 * x[1:-1, 1:-1] - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:])


def test_a_loose_set_is_as_large_as_its_targets_unless_it_says_otherwise(tmp_path):
    folder(tmp_path / "t")
    folder(tmp_path / "r", captions=False, size=(60, 90))
    target = {"id": "t", "instance_data_dir": tmp_path / "t", "conditioning_data": "r", "resolution": 96}
    loose = {"id": "r", "instance_data_dir": tmp_path / "r", "conditioning_type": "reference_loose"}
    assert sets_of(tmp_path, target, loose).training[0].references[0].size == (80, 112)
    smaller = {**loose, "resolution": 48}
    assert sets_of(tmp_path, target, smaller).training[0].references[0].size == (32, 64)


def test_a_generated_reference_is_blurrier_than_its_target_and_of_its_size(tmp_path):
    folder(tmp_path / "t")
    entry = {"id": "t", "instance_data_dir": tmp_path / "t", "resolution": 96,
             "conditioning": [{"type": "superresolution", "blur_radius": 2, "add_noise": False, "captions": "sharpen"},
                              {"type": "jpeg_artifacts", "quality": 10, "when": "step"}]}  # fmt: skip
    sets = sets_of(tmp_path, entry)
    for example in sets.training:
        target, blurred, compressed = (view.open() for view in example.views())
        assert sharpness(blurred) < 0.5 * sharpness(target)
        assert target.size == blurred.size == compressed.size == (112, 80)
        assert np.asarray(target).tobytes() != np.asarray(compressed).tobytes()
        assert example.reference_captions == (("sharpen",), ())
    assert any("the degraded picture is the reference, the original the target" in note for note in sets.notes)
    assert sets.training[0].references[0].file() and sets.training[0].references[1].fleeting


def test_small_targets_are_left_out_with_their_references_and_said(tmp_path):
    folder(tmp_path / "t")
    folder(tmp_path / "r", captions=False)
    for name in ("t", "r"):
        photo(tmp_path / name / "1.png", (30, 20))
    target = {"id": "t", "instance_data_dir": tmp_path / "t", "conditioning_data": "r", "minimum_image_size": 50}
    reference = {"id": "r", "instance_data_dir": tmp_path / "r", "conditioning_type": "reference_strict"}
    sets = sets_of(tmp_path, target, reference)
    assert [example.name for example in sets.training] == ["0", "2"]
    assert any("1 left out, below minimum_image_size: 1" in note for note in sets.notes)


def test_keys_of_simpletuners_are_ignored_with_a_reason_or_refused_with_a_remedy(tmp_path):
    folder(tmp_path / "t")
    entry = {"id": "t", "instance_data_dir": tmp_path / "t", "hash_filenames": True, "vae_cache_ondemand": False}
    notes = sets_of(tmp_path, entry).notes
    assert any("hash_filenames is ignored: caches are keyed by content" in note for note in notes)
    with pytest.raises(ValueError, match="caption_filter_list is not used here: edit the caption files"):
        sets_of(tmp_path, {**entry, "caption_filter_list": "x.txt"})


@pytest.mark.parametrize("way", ["suffix", "side by side", "jsonl"])
def test_other_ways_to_give_pairs_come_to_the_same(tmp_path, way):
    for i in range(2):
        photo(tmp_path / "d" / f"{i}.png", (60, 60), i)
        photo(tmp_path / "d" / f"{i}_ref.png", (60, 60), i + 10)
        (tmp_path / "d" / f"{i}.txt").write_text(f"caption {i}")
    if way == "side by side":
        for i in range(2):
            both = Image.new("RGB", (120, 60))
            both.paste(Image.open(tmp_path / "d" / f"{i}_ref.png"), (0, 0))
            both.paste(Image.open(tmp_path / "d" / f"{i}.png"), (60, 0))
            both.save(tmp_path / "d" / f"{i}.png")
            (tmp_path / "d" / f"{i}_ref.png").unlink()
    if way == "jsonl":
        row = '{{"target": "{0}.png", "reference": "{0}_ref.png", "caption": "caption {0}"}}\n'
        (tmp_path / "d" / "pairs.jsonl").write_text(row.format(0) + row.format(1))
    how = {
        "suffix": {"instance_data_dir": tmp_path / "d", "reference_suffix": "_ref"},
        "side by side": {"instance_data_dir": tmp_path / "d", "side_by_side": "reference_left"},
        "jsonl": {"pairs_file": tmp_path / "d" / "pairs.jsonl"},
    }[way]
    training = sets_of(tmp_path, {"id": "t", "resolution": 48, **how}).training
    assert [(e.name, e.captions) for e in training] == [("0", ("caption 0",)), ("1", ("caption 1",))]
    for i, example in enumerate(training):
        photo(tmp_path / "expected.png", (60, 60), i + 10)
        expected = Image.open(tmp_path / "expected.png").resize((48, 48), Image.LANCZOS)
        assert np.array_equal(example.references[0].open(), expected)


def test_validation_sets_are_never_trained_on_and_disabled_sets_are_left_out(tmp_path):
    for name in "abc":
        folder(tmp_path / name)
    entries = [{"id": name, "instance_data_dir": tmp_path / name} for name in "abc"]
    entries[1]["dataset_type"], entries[2]["disabled"] = "eval", True
    sets = sets_of(tmp_path, *entries, num_eval_images=2)
    assert {e.set_id for e in sets.training} == {"a"} and [e.set_id for e in sets.validation] == ["b"] * 3
    assert sets.unseen
    entries[2] = {**entries[2], "dataset_type": "eval", "disabled": False}
    sets = sets_of(tmp_path, *entries, num_eval_images=2, num_eval_pairs=4)
    assert [e.set_id for e in sets.validation] == ["b", "c"] * 2 and any("is on 4 of them" in n for n in sets.notes)
    entries[2]["disabled"] = True
    entries[1]["dataset_type"], entries[0]["disable_validation"] = "image", True
    assert {e.set_id for e in sets_of(tmp_path, *entries, num_eval_images=2).validation} == {"b"}


def test_what_is_not_taught_is_not_validated_on(tmp_path):
    for name in "ab":
        folder(tmp_path / name)
    entries = [{"id": name, "instance_data_dir": tmp_path / name} for name in "ab"]
    entries[0]["is_regularisation_data"] = True
    sets = sets_of(tmp_path, *entries)
    assert {e.set_id for e in sets.training} == {"a", "b"} and {e.set_id for e in sets.validation} == {"b"}


def test_a_name_that_is_held_out_is_in_no_set_that_is_trained_on(tmp_path):
    folder(tmp_path / "t")
    one = {"id": "t", "instance_data_dir": tmp_path / "t", "resolution": 96}
    twin = {**one, "id": "twin", "resolution": 48, "disable_validation": True}
    sets = sets_of(tmp_path, one, twin, validation_split=1)
    ((name, set_id),) = [(e.name, e.set_id) for e in sets.validation]
    assert set_id == "t" and len(sets.training) == 4 and name not in {e.name for e in sets.training}


def test_pictures_to_validate_on_that_are_trained_on_are_named(tmp_path):
    folder(tmp_path / "t")
    folder(tmp_path / "e")
    (tmp_path / "e" / "1.png").unlink()
    (tmp_path / "e" / "1.png").symlink_to(tmp_path / "t" / "1.png")
    one = {"id": "t", "instance_data_dir": tmp_path / "t", "resolution": 48}
    unseen = {"id": "e", "instance_data_dir": tmp_path / "e", "dataset_type": "eval"}
    with pytest.raises(
        ValueError, match="1 eval pictures that are trained on:\n .*e/1.png; take it out of one of the s"
    ):
        sets_of(tmp_path, one, unseen)
    (other,) = {e.set_id for e in sets_of(tmp_path, one, unseen, eval_dataset_id="t").validation}
    assert other == "t"  # of a set that is not chosen nothing is said
    taught = sets_of(tmp_path, {**one, "is_regularisation_data": True}, {**unseen, "is_regularisation_data": True})
    assert [e.regularise for e in taught.validation] == [False] * 3  # it is measured beside the target, not the base


def test_the_configs_caption_strategy_is_of_targets_and_not_of_what_they_name(tmp_path):
    folder(tmp_path / "t", captions=False)
    folder(tmp_path / "r", captions=False)
    target = {"id": "t", "instance_data_dir": tmp_path / "t", "conditioning_data": "r", "resolution": 48}
    training = sets_of(
        tmp_path, target, {"id": "r", "instance_data_dir": tmp_path / "r"}, caption_strategy="filename"
    ).training
    assert [(e.captions, e.reference_captions) for e in training] == [((str(i),), ((),)) for i in range(3)]


def test_the_defaults_of_an_entry(tmp_path):
    assert Dataset(id="x").strategy == "textfile"
    assert Dataset(id="x", conditioning_type="reference_strict").strategy is None
    assert Dataset(id="x", conditioning_type="reference_strict", caption_strategy="textfile").strategy == "textfile"


def test_a_set_that_another_names_as_references_is_one_without_saying_so(tmp_path):
    folder(tmp_path / "t")
    folder(tmp_path / "r", captions=False)
    target = {"id": "t", "instance_data_dir": tmp_path / "t", "conditioning_data": "r", "resolution": 48}
    sets = sets_of(tmp_path, target, {"id": "r", "instance_data_dir": tmp_path / "r"})
    assert len(sets.training) == 3 and all(len(e.references) == 1 and e.references[0].strict for e in sets.training)


def test_random_crops_are_of_the_pair_and_fixed_or_drawn_anew_in_every_epoch(tmp_path):
    folder(tmp_path / "t", size=(120, 60))
    folder(tmp_path / "r", captions=False, size=(120, 60))
    target = {"id": "t", "instance_data_dir": tmp_path / "t", "conditioning_data": "r", "resolution": 48,
              "crop": True, "crop_style": "random"}  # fmt: skip
    reference = {"id": "r", "instance_data_dir": tmp_path / "r", "conditioning_type": "reference_strict"}
    for fresh in (False, True):
        examples = sets_of(tmp_path, {**target, "vae_cache_clear_each_epoch": fresh}, reference).training
        uses = [use_of(0, examples[0], Mix(), epoch) for epoch in range(5)]
        assert len({use.target.transform.box for use in uses}) == (5 if fresh else 1)
        assert all(use.target.transform == use.references[0].transform for use in uses)
        assert all(np.array_equal(use.target.open(), use.references[0].open()) for use in uses)
        assert {use.target.size for use in uses} == {(48, 48)}
        assert uses[0].target.fleeting is fresh
    assert len({e.target.transform.box for e in examples}) == 3


def test_a_reference_that_is_stored_turned_is_cut_like_its_upright_target(tmp_path):
    folder(tmp_path / "t", size=(90, 50))
    (tmp_path / "r").mkdir()
    for i in range(3):
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = Image.open(tmp_path / "t" / f"{i}.png").transpose(Image.Transpose.ROTATE_90)
        turned.save(tmp_path / "r" / f"{i}.png", exif=exif)
    for style in ("center", "corner", "random"):
        target = {"id": "t", "instance_data_dir": tmp_path / "t", "conditioning_data": "r", "resolution": 48,
                  "crop": True, "crop_style": style}  # fmt: skip
        reference = {"id": "r", "instance_data_dir": tmp_path / "r", "conditioning_type": "reference_strict"}
        for example in sets_of(tmp_path, target, reference).training:
            assert np.array_equal(example.target.open(), example.references[0].open())


def test_transparency_is_said_once_with_a_count(tmp_path):
    folder(tmp_path / "t")
    for i in range(2):
        Image.open(tmp_path / "t" / f"{i}.png").convert("RGBA").save(tmp_path / "t" / f"{i}.png")
    notes = sets_of(tmp_path, {"id": "t", "instance_data_dir": tmp_path / "t"}).notes
    assert "2 pictures with an alpha channel are laid on white, masks on black" in notes


def test_animations_and_other_kinds_are_named_instead_of_overlooked(tmp_path):
    folder(tmp_path / "t")
    Image.new("RGB", (9, 9)).save(tmp_path / "t" / "x.gif")
    with pytest.raises(ValueError, match="x.gif; save it as .png"):
        sets_of(tmp_path, {"id": "t", "instance_data_dir": tmp_path / "t"})
