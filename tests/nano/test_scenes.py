"""The data of nano's pretraining: reproducible, exact, and free of the edits that LoRAs are to teach."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kontext_min.config import Config
from kontext_min.data.buckets import Size
from kontext_min.nano import edits, evaluate
from kontext_min.nano.edits import (
    HELD_OUT,
    MIX,
    PHOTOS,
    PICTURE_EDITS,
    SIZES,
    example,
    from_image,
    photographs,
    write_pairs,
)
from kontext_min.nano.pretrain import PHASES
from kontext_min.nano.scenes import EDITS

SIZE, KINDS = Size(64, 48), ("", "validation_")
GIVEAWAYS = """invert negative sketch pencil sepia vintage mosaic pixelate outline contour silhouette inset
    deblur sharpen resolution jpeg artifact restore""".split()  # words of the held-out edits


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
    assert len(task.references) == {"text to image": 0, "insert": 2}.get(edit, 1)


@pytest.mark.parametrize("edit", [edit for edit in MIX if edit not in ("keep", "text to image")])
def test_every_edit_changes_its_picture_and_keep_does_not(edit):
    changes = [
        np.abs(task.target - task.references[0]).max() for task in (example("train", i, SIZE, edit) for i in range(8))
    ]
    assert np.median(changes) > 0.05  # one may do nothing, such as a red border on a red background
    kept = example("train", 0, SIZE, "keep")
    np.testing.assert_array_equal(kept.references[0], kept.target)


def test_shares_of_the_mix_sum_to_one_and_name_known_edits():
    assert sum(share for share, *_ in MIX.values()) == pytest.approx(1)
    assert set(MIX) == {*EDITS, *PICTURE_EDITS, "border"}


def test_no_held_out_edit_is_named_in_pretraining_prompts():
    words = re.compile("|".join(GIVEAWAYS), re.IGNORECASE)
    assert not set(HELD_OUT) & set(MIX)
    named = [prompt for _, *prompts in MIX.values() for prompt in prompts if words.search(prompt)]
    for phase in PHASES:
        assert set(phase.edits) <= set(MIX)
        tasks = ((phase.first_index + i, [None, *phase.edits][i % (1 + len(phase.edits))]) for i in range(600))
        drawn = [example("train", index, Size(16, 16), edit).prompt for index, edit in tasks]
        named += [prompt for prompt in drawn if words.search(prompt)]
    assert named == []


def test_no_pretraining_target_is_a_held_out_edit_of_its_reference():
    makers = [make for _, make in edits.TARGETS.values()]
    for i in range(150):
        task = example("train", i, SIZE)
        if not task.references:
            continue
        reference = task.references[0]
        moved = np.abs(task.target - reference).mean()
        for make in makers:
            made = make(reference)
            if np.abs(made - reference).mean() > 0.02 and moved > 0.02:  # on flat gray both may do nothing
                assert np.abs(made - task.target).mean() > 0.01, (task.prompt, make.__name__)
        for _, degrade in edits.DEGRADATIONS.values():  # restoring: the reference is a degraded target
            if np.abs(degrade(task.target) - task.target).mean() > 0.01:
                assert np.abs(degrade(task.target) - reference).mean() > 1e-3, (task.prompt, degrade.__name__)


def test_validation_photographs_come_from_pictures_that_training_never_sees():
    table = re.findall(r"^\| (\*\*validation\*\* )?([\w-]+) \| (\w+\.\w+) \|", (PHOTOS / "README.md").read_text(), re.M)
    listed = {kind: {name for held, name, _ in table if bool(held) is (kind == "validation_")} for kind in KINDS}
    sources = {kind: {source for held, _, source in table if bool(held) is (kind == "validation_")} for kind in KINDS}
    assert not sources[""] & sources["validation_"]
    for kind in KINDS:
        assert {file.stem for file in (PHOTOS / f"{kind}reference").glob("*.jpg")} == listed[kind]
    assert (len(photographs("train")), len(photographs("validation"))) == (15, 4)


def test_every_demo_pair_has_its_edited_target_and_caption():
    prompt, edit = edits.TARGETS["sepia"]
    for prefix in KINDS:
        for file in (PHOTOS / f"{prefix}reference").glob("*.jpg"):
            target = PHOTOS / f"{prefix}target" / file.name
            assert target.with_suffix(".txt").read_text().strip() == prompt
            difference = from_image(Image.open(target)) - edit(from_image(Image.open(file)))
            assert np.abs(difference).mean() < 0.02


def test_silhouettes_are_gray_and_before_the_same_background():
    for i in range(20):
        task = example("train", i, Size(96, 96), "silhouette")
        changed = np.abs(task.target - task.references[0]).max(-1) > 0
        gray = np.abs(task.target - 0.5).max(-1) < 1e-6
        assert gray.sum() > 400 and (gray & ~changed).sum() == 0  # of objects of about 36 x 36 pixels
        assert (changed & ~gray).sum() < 0.5 * changed.sum()  # their edges


def test_inset_is_the_second_picture_in_the_corner_of_the_first():
    task = example("validation", 2, Size(96, 64), "inset")
    first, second = task.references
    np.testing.assert_array_equal(task.target[:32], first[:32])
    np.testing.assert_array_equal(task.target[:, :48], first[:, :48])
    averaged = second.reshape(32, 2, 48, 2, 3).mean((1, 3))
    assert np.abs(task.target[32:, 48:] - averaged).max() < 1.5 / 255


@pytest.mark.parametrize("edit", HELD_OUT)
def test_held_out_examples_are_reproducible_and_change_something(edit):
    one, two = (example("train", 4, SIZE, edit) for _ in range(2))
    np.testing.assert_array_equal(one.target, two.target)
    assert one.target.dtype == np.float32 and one.target.shape == (48, 64, 3)
    assert max(np.abs(t.target - t.references[0]).mean() for t in [one] + [
        example("train", i, SIZE, edit) for i in range(6)]) > 0.005  # fmt: skip


def test_written_pairs_are_read_as_a_data_list_with_the_replayed_share(tmp_path):
    said = write_pairs("inset", tmp_path / "pairs", count=20, replay=0.3)
    entries = Config(data_backend_config=tmp_path / "pairs" / "data.json").datasets()
    roles = {entry.id: entry.role for entry in entries}
    assert roles["target"] == "image" and roles["reference-2"] == "conditioning"
    assert [entry.id for entry in entries if entry.is_regularisation_data] == ["replay-target"]
    counts = {part.name: len(list(part.glob("*.jpg"))) for part in (tmp_path / "pairs").iterdir() if part.is_dir()}
    assert counts["target"] + counts["replay-target"] == 20 and 2 <= counts["replay-target"] <= 11
    assert counts["target"] == counts["reference-1"] == counts["reference-2"]
    assert counts["replay-target"] == counts["replay-reference-1"]
    assert "data.json" in said
    with pytest.raises(ValueError, match="not empty"):
        write_pairs("inset", tmp_path / "pairs", count=1)
    sizes = [Image.open(tmp_path / "pairs" / "reference-2" / f"{file.stem}.jpg").size
             for file in sorted((tmp_path / "pairs" / "target").glob("*.jpg"))]  # fmt: skip
    write_pairs("inset", tmp_path / "square", count=3, sizes=SIZES[:1])
    assert {Image.open(file).size for file in (tmp_path / "square").glob("*/*.jpg")} == {(96, 96)}
    assert set(sizes) == {*SIZES} and all(e.resolution_type != "pixel" for e in entries)  # each keeps its own


def test_a_lora_that_is_not_there_is_named_before_the_base_is_measured(monkeypatch):
    monkeypatch.setattr("kontext_min.nano.evaluate.evaluate", lambda *_, **__: pytest.fail("the base was measured"))
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        evaluate.report_lora(Path("weights/nano"), Path("gone.safetensors"), ["keep"], 2)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["pairs", "sepia", "tests"], "nano: tests is not empty; name a new folder"),
        (["pairs", "sepia", "output/none", "--count", "0"], "nano: pairs takes --count 1 or more, and --replay from 0"),
        (["pairs", "sepia", "output/none", "--replay", "nan"], "--replay from 0 to 1"),
        (["evaluate", "--folder", "gone"], "nano: gone is neither a folder nor a hub id (owner/name)"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(arguments, sentence):
    command = [sys.executable, "-m", "kontext_min.nano", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1 and sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_where_the_input_is_above_the_ceiling_there_is_nothing_to_close(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluate, "read_adapter", lambda path: path)
    for copy, said in ((8.0, "LoRA 25.00 closed 75%\n"), (60.0, "LoRA 25.00 \n")):
        tables = iter([{"psnr": psnr, "ceiling": 30.0, "copy": copy} for psnr in (10.0, 25.0)])
        made = partial(lambda tables, *_, **__: ({"keep": next(tables)}, Image.new("RGB", (8, 8))), tables)
        monkeypatch.setattr(evaluate, "evaluate", made)
        evaluate.report_lora(Path("nano"), tmp_path / "lora.safetensors", ["keep"], 1)
        assert said in capsys.readouterr().out
