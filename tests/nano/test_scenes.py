"""The data of nano's pretraining: reproducible, exact, and free of the edits that LoRAs are to teach."""

import re

import numpy as np
import pytest
from PIL import Image

from kontext_min.data.buckets import Size
from kontext_min.nano import demo, held_out, photos
from kontext_min.nano.edits import GLOBAL_EDITS, HELD_OUT, LATER_MIX, MIX, OBJECT_EDITS, TEMPLATES, example, from_image
from kontext_min.nano.pretrain_flux import PHASES

SIZE = Size(64, 48)


def test_same_index_gives_same_example():
    first, second = example("train", 5, SIZE), example("train", 5, SIZE)
    assert first.prompt == second.prompt
    np.testing.assert_array_equal(first.target, second.target)
    assert example("validation", 5, SIZE).prompt != first.prompt or not np.array_equal(
        example("validation", 5, SIZE).target, first.target
    )


@pytest.mark.parametrize("edit", MIX)
def test_pictures_have_the_asked_size_and_range(edit):
    task = example("train", 11, SIZE, edit)
    assert task.target.shape == (48, 64, 3) and task.target.dtype == np.float32
    assert 0 <= task.target.min() and task.target.max() <= 1
    assert (task.reference is None) == (edit == "text to image")


@pytest.mark.parametrize("edit", [*OBJECT_EDITS, *GLOBAL_EDITS])
def test_every_edit_changes_its_picture_and_keep_does_not(edit):
    changes = [
        np.abs(task.target - task.reference).max() for task in (example("train", i, SIZE, edit) for i in range(8))
    ]
    assert np.median(changes) > 0.05  # one may do nothing, such as a red border on a red background
    kept = example("train", 0, SIZE, "keep")
    np.testing.assert_array_equal(kept.reference, kept.target)


def test_shares_of_the_mix_sum_to_one_and_name_known_edits():
    assert sum(MIX.values()) == pytest.approx(1) and sum(LATER_MIX.values()) == pytest.approx(1)
    assert set(MIX) == set(LATER_MIX)
    assert set(MIX) == {*TEMPLATES, "text to image"} == {*OBJECT_EDITS, *GLOBAL_EDITS, "keep", "text to image"}


def test_no_held_out_edit_is_named_in_pretraining_prompts():
    words = re.compile("|".join(word for group in HELD_OUT.values() for word in group), re.IGNORECASE)
    assert not set(HELD_OUT) & set(MIX)
    named = [prompt for prompts in TEMPLATES.values() for prompt in prompts if words.search(prompt)]
    for phase in PHASES:
        drawn = [example("train", phase.first_index + i, Size(16, 16), mix=phase.mix).prompt for i in range(600)]
        named += [prompt for prompt in drawn if words.search(prompt)]
    assert named == []


def test_no_pretraining_target_is_a_held_out_edit_of_its_reference():
    makers = [make for _, make in held_out.TARGETS.values()]
    for i in range(150):
        task = example("train", i, SIZE)
        if task.reference is None:
            continue
        moved = np.abs(task.target - task.reference).mean()
        for make in makers:
            made = make(task.reference)
            if np.abs(made - task.reference).mean() > 0.02 and moved > 0.02:  # on flat gray both may do nothing
                assert np.abs(made - task.target).mean() > 0.01, (task.prompt, make.__name__)
        for _, degrade in held_out.DEGRADATIONS.values():  # restoring: the reference is a degraded target
            if np.abs(degrade(task.target) - task.target).mean() > 0.01:
                assert np.abs(degrade(task.target) - task.reference).mean() > 1e-3, (task.prompt, degrade.__name__)


def test_validation_photographs_come_from_pictures_that_training_never_sees():
    train, validation = ({source for source, _ in table.values()} for table in (photos.TRAIN, photos.VALIDATION))
    assert not train & validation
    assert len(photos.load_photos("train")) == len(photos.TRAIN)
    assert len(photos.load_photos("validation")) == len(photos.VALIDATION)


def test_every_demo_pair_has_its_edited_target_and_caption():
    prompt, edit = held_out.TARGETS[demo.DEMO]
    assert demo.DEMO in HELD_OUT
    for prefix in ("", "validation_"):
        for file in (photos.PHOTOS / f"{prefix}reference").glob("*.jpg"):
            target = photos.PHOTOS / f"{prefix}target" / file.name
            assert target.with_suffix(".txt").read_text().strip() == prompt
            difference = from_image(Image.open(target)) - edit(from_image(Image.open(file)))
            assert np.abs(difference).mean() < 0.02
