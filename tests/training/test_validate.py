"""What is shown while a run goes: which items, with which settings, and what lies in the folder afterwards."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import train
from kontext_min.config import Config, checked
from kontext_min.data.buckets import Size
from kontext_min.presets import KONTEXT_DEV
from kontext_min.sampler import Sampling
from kontext_min.training import validate
from kontext_min.training.sets import read_sets
from kontext_min.training.validate import items_of, sampling_of


@pytest.fixture
def values(kontext, tmp_path):
    """Four steps on six small pairs, shown in two sampling steps."""
    data = tiny.write_pairs(tmp_path, 6, (64, 32), "make it night {i}", noise=60)
    Image.effect_noise((40, 80), 50).convert("RGB").save(tmp_path / "mine.png")
    return {
        "pretrained_model_name_or_path": str(kontext), "data_backend_config": data, "mixed_precision": "no",
        "cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "out"), "max_train_steps": 4,
        "lora_rank": 2, "gradient_checkpointing": False, "learning_rate": 1e-2, "validation_steps": 2,
        "num_eval_images": 1, "validation_num_inference_steps": 2, "aspect_bucket_alignment": 16,
    }  # fmt: skip


def items(values, **more):
    config = checked(Config, {**values, **more}, "test")
    return items_of(config, read_sets(config, 16), KONTEXT_DEV)


def run(values, tmp_path, **more):
    (tmp_path / "config.json").write_text(json.dumps({**values, **more}))
    train.main([str(tmp_path / "config.json")])
    return tmp_path / "out"


# ---------------------------------------------------------------------------------------------------------- items


def test_a_list_has_defaults_and_takes_what_is_said(values, tmp_path):
    mine = str(tmp_path / "mine.png")
    asked = [
        {"prompt": "red hat", "images": mine, "negative": "blur", "seed": 7, "size": "100x50", "name": "hat"},
        {"prompt": "as the first pair"},
        {"prompt": "from text", "images": [], "size": 64},
        {"prompt": "two", "path": [mine, mine]},
    ]
    more = {"validation_negative_prompt": "ugly", "validation_seed": 3, "validation_resolution": 96}
    pair, hat, first, text, two = items(values, validation_input=asked, **more)
    assert (pair.name, pair.prompt, pair.unseen, pair.size) == ("0", "make it night 0", False, (64, 32))
    assert (hat.name, hat.negative, hat.seed, hat.size) == ("hat", "blur", 7, (96, 48))
    assert hat.references[0].size == (48, 96)  # its own aspect 0.5 at about the area of 100x50
    assert (first.negative, first.seed, first.size) == ("ugly", 3, (64, 32)) and first.references == pair.references
    assert text.references == () and text.size == (64, 64) and "text-to-image" in text.title()
    assert [view.size for view in two.references] == [(64, 128)] * 2 and two.size == (64, 128)
    assert {item.unseen for item in (hat, first, text, two)} == {None}
    assert items(values, validation=asked[:1], validation_disable=True) == []
    assert len(items(values, validation=asked[:1], validation_using_datasets=False)) == 1


def test_without_a_size_pictures_are_made_as_infer_makes_them(values, tmp_path):
    (item,) = items(values, validation=[{"prompt": "x", "images": [str(tmp_path / "mine.png")]}], num_eval_images=0)
    assert item.size == item.references[0].size == (720, 1456)  # the preferred size nearest to 1:2
    assert item.references[0].transform.box == pytest.approx((0, 0.5 - 1456 / 2880, 1, 0.5 + 1456 / 2880), abs=0.02)


def test_several_resolutions_are_several_pictures(values, tmp_path):
    asked = [{"prompt": "x", "images": [str(tmp_path / "mine.png")]}]
    made = items(values, validation=asked, num_eval_images=0, validation_resolution="64, 64x256")
    assert [(item.name, item.size) for item in made] == [("x 64x64", (48, 96)), ("x 64x256", (96, 176))]


def test_prompt_and_libraries_give_items_too(values, tmp_path):
    library = tmp_path / "library.json"
    entry = {"prompt": "make it red", "image": str(tmp_path / "mine.png"), "seed": 5, "size": "32x64"}
    library.write_text("// comments are allowed\n" + json.dumps({"plain": "make the sky red", "more": entry}))
    made = items(values, validation_prompt="a photo of cat", user_prompt_library=str(library))
    assert [item.name for item in made] == ["0", "a photo of cat", "plain", "more"]
    assert made[3].seed == 5 and made[3].size == (32, 64) and made[2].references == made[0].references


def test_what_cannot_be_shown_is_said_before_anything_starts(values, tmp_path):
    (tmp_path / "broken.json").write_text('{"x": {"promt": "y"}, "z": "ok"}')
    asked = [{"prompt": "a", "images": "gone.png"}, {"prompt": "b", "images": [], "size": "big"}]
    with pytest.raises(ValueError) as raised:
        items(values, validation=asked, user_prompt_library=str(tmp_path / "broken.json"), eval_dataset_id="tt")
    for part in ("a: gone.png does not exist", "b: a size is WIDTHxHEIGHT", "broken.json, x: ", "promt", "is no set"):
        assert part in str(raised.value), part
    with pytest.raises(ValueError, match="unknown key validation.0.seeed, did you mean seed"):
        items(values, validation=[{"prompt": "a", "seeed": 1}])


def test_the_split_is_never_trained_on_and_a_function_of_seed_and_name(values, tmp_path):
    def split(**more):
        return read_sets(checked(Config, {**values, **more}, "test"), 16)

    sets = split(validation_split=2)
    held, trained = {e.name for e in sets.validation}, {e.name for e in sets.training}
    assert len(held) == 2 and len(trained) == 4 and not held & trained and sets.unseen
    assert {e.name for e in split(validation_split=1 / 3).validation} == held
    assert {e.name for e in split(validation_split=3).validation} > held  # more of the same order
    assert len({frozenset(e.name for e in split(validation_split=2, seed=s).validation) for s in range(8)}) > 1
    twice = [*values["data_backend_config"], {**values["data_backend_config"][0], "id": "again", "resolution": 32}]
    both = split(validation_split=2, data_backend_config=twice)
    assert {e.name for e in both.validation} == held and len(both.validation) == 4 and len(both.training) == 8
    for i in (6, 7):  # what is added does not move what was held out, unless it comes before it
        for kind in ("target", "reference"):
            Image.effect_noise((64, 32), 60 + i).convert("RGB").save(tmp_path / kind / f"{i}.png")
        (tmp_path / "target" / f"{i}.txt").write_text("x")
    assert {e.name for e in split(validation_split=2).validation} <= held | {"6", "7"}
    with pytest.raises(ValueError, match="validation_split 8 of 8 pairs leaves none to train on"):
        split(validation_split=8)
    with pytest.raises(ValueError, match="a share below 1 or a whole number"):
        split(validation_split=1.5)


def test_one_set_can_be_chosen_to_validate_on(values, tmp_path):
    target, reference = values["data_backend_config"]
    data = [target, reference, {**target, "id": "e", "dataset_type": "eval"}, {**target, "id": "other"}]
    data[2]["instance_data_dir"] = shutil.copytree(target["instance_data_dir"], tmp_path / "e")
    for chosen, unseen in ((None, True), ("e", True), ("other", False)):
        config = checked(Config, {**values, "data_backend_config": data, "eval_dataset_id": chosen}, "test")
        sets = read_sets(config, 16)
        assert {e.set_id for e in sets.validation} == {chosen or "e"} and sets.unseen is unseen


def test_settings_reach_the_sampler(values):
    more = {"validation_guidance": 3.5, "validation_guidance_real": 4, "validation_no_cfg_until_timestep": 1}
    sampling = sampling_of(checked(Config, {**values, **more}, "test"))
    assert sampling == Sampling(2, 3.5, 4.0, (0.5, 1.0))


# ---------------------------------------------------------------------------------------------------------- a run


@pytest.fixture
def edits(monkeypatch):
    """Every call of `edit` in validation: prompt's and negative's encoding, size, sampling."""
    calls, edit = [], validate.edit

    def noted(editor, text, references, size, sampling, negative=None):
        calls.append((text, negative, len(references), size, sampling))
        return edit(editor, text, references, size, sampling, negative)

    monkeypatch.setattr(validate, "edit", noted)
    return calls


def test_a_run_leaves_sheets_and_single_pictures_and_uses_true_cfg(values, tmp_path, edits):
    asked = [{"prompt": "red", "images": str(tmp_path / "mine.png"), "size": "48x32", "seed": 9, "negative": "blur"}]
    out = run(values, tmp_path, validation=asked, validation_guidance_real=3, validation_split=2) / "validation"
    records = json.loads((out / "items.json").read_text())
    pair, mine = records
    assert mine == {"name": "red", "prompt": "red", "negative": "blur", "seed": 9, "size": "48x32", "unseen": None,
                    "references": 1, "target": False}  # fmt: skip
    assert pair["unseen"] is True and pair["target"] is True and pair["size"] == "64x32"
    pictures = {str(path.relative_to(out)) for path in out.rglob("*.png")}
    steps = {f"{step:06d}/{i:02d}.png" for step in (2, 4) for i in range(2)}
    expected = {"input-1/00.png", "input-1/01.png", "target/00.png", "base/00.png", "base/01.png"}
    assert pictures == expected | steps | {"000002.png", "000004.png"}
    assert Image.open(out / "000004" / "01.png").size == (48, 32)
    assert not np.array_equal(Image.open(out / "base" / "01.png"), Image.open(out / "000004" / "01.png"))
    assert [len(json.loads(line)["pairs"]) for line in (out / "psnr.jsonl").read_text().splitlines()] == [1, 1]
    assert len(edits) == 6 and {call[4].cfg_scale for call in edits} == {3}
    assert [(call[3], call[4].seed) for call in edits[:2]] == [((64, 32), 42), ((48, 32), 9)]
    (red, blur, *_), (text, empty, *_) = edits[1], edits[0]
    assert not torch.equal(red[0], blur[0]) and not torch.equal(blur[0], empty[0]) and not torch.equal(text[0], red[0])
    trained = json.loads((tmp_path / "out" / "config.json").read_text())
    assert checked(Config, trained, "again").validation[0].size == "48x32"


def test_a_resumed_run_makes_the_base_again_only_if_the_items_have_changed(values, tmp_path, edits):
    keys = {"lr_scheduler": "constant", "resume_from_checkpoint": "latest"}
    out = run(values, tmp_path, max_train_steps=2, **keys) / "validation"
    assert len(edits) == 2  # base and LoRA at the end
    base = np.asarray(Image.open(out / "base" / "00.png"))
    run(values, tmp_path, max_train_steps=4, **keys)
    assert len(edits) == 3 and np.array_equal(Image.open(out / "base" / "00.png"), base)
    sheet = Image.open(out / "000004.png")
    run(values, tmp_path, max_train_steps=6, validation_seed=1, **keys)
    assert len(edits) == 5 and not np.array_equal(Image.open(out / "base" / "00.png"), base)
    assert Image.open(out / "000006.png").size == sheet.size and not (out / "000004").exists()
    assert (out.parent / "previous-1" / "000004" / "00.png").exists()
    before, after = ((folder / "psnr.jsonl").read_text().splitlines() for folder in (out.parent / "previous-1", out))
    assert [[json.loads(line)["step"] for line in lines] for lines in (before, after)] == [[2, 4], [6]]
    assert json.loads((out / "items.json").read_text())[0]["seed"] == 1
    assert (out / "000004.png").exists() and Size(*sheet.size).width > 3 * 64


def test_a_finished_run_keeps_its_pictures_whatever_is_asked_of_it(values, tmp_path, edits, capsys):
    out = run(values, tmp_path, max_train_steps=2, resume_from_checkpoint="latest")
    before = {path: path.read_bytes() for path in (out / "validation").rglob("*") if path.is_file()}
    run(values, tmp_path, max_train_steps=2, resume_from_checkpoint="latest", validation_prompt="paint it red")
    assert "already reached; nothing to do" in capsys.readouterr().out and len(edits) == 2
    assert {path: path.read_bytes() for path in (out / "validation").rglob("*") if path.is_file()} == before


def test_nothing_to_show_is_no_error(values, tmp_path, capsys):
    out = run(values, tmp_path, validation_disable=True)
    assert not (out / "validation" / "items.json").exists() and (out / "pytorch_lora_weights.safetensors").exists()
