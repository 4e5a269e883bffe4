"""What the measures say, against the same worked out by hand; and the command line."""

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import add_lora, detach_all, random

from kontext_min import flow
from kontext_min.adapters.inject import updates
from kontext_min.adapters.write import write_adapter
from kontext_min.compare import psnr, shift_between
from kontext_min.encoders import encode_image
from kontext_min.flow import Condition
from kontext_min.quantize import QuantisedLinear
from kontext_min.study import hooks
from kontext_min.study.__main__ import COMMANDS, main
from kontext_min.study.experiment import Experiment, ablation, anatomy, follow, repeat

PICTURE = "configs/photos/validation_reference/cat.jpg"
LORA = ["transformer_blocks.0.attn.to_k", "transformer_blocks.1.ff.net.2", "single_transformer_blocks.2.attn.to_v",
        "single_transformer_blocks.2.proj_mlp"]  # fmt: skip


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return Experiment.open(PICTURE, "make it darker", "flip the image", size="64x48", steps=3, seed=1)


@pytest.fixture
def lora(experiment):
    """The same with a LoRA; afterwards without."""
    for seed, parameter in enumerate(add_lora(experiment.flux, LORA, rank=4, alpha=2)):
        parameter.data = 0.2 * random(*parameter.shape, seed=seed)
    yield experiment
    detach_all(experiment.flux)


def test_an_experiment_is_the_same_every_time_and_its_parts_are_where_it_says(experiment):
    x = experiment.run()
    assert torch.equal(experiment.run(), x) and x.shape == (1, 16, 6, 8)
    assert not torch.equal(experiment.run(experiment.conditions["flip the image"]), x)
    assert experiment.image.size == experiment.picture(x).size == (64, 48) and experiment.grid == (3, 4)
    streams = experiment.streams
    assert streams == {"text": slice(0, 24), "target": slice(24, 36), "reference": slice(36, 48)}
    with hooks.record(experiment.flux, "single_blocks.0", steps=[0]) as kept, hooks.without_reference(experiment.flux):
        experiment.run()
    assert kept["single_blocks.0"][0].shape[1] == streams["target"].stop


def test_words_cover_the_tokens_of_the_instruction_one_after_another():
    prompt = "Make the purple heart red, the red one"
    words = Experiment.open(PICTURE, prompt, size="32x32", steps=1).words
    assert list(words) == ["Make", "the", "purple", "heart", "red,", "the (6)", "red", "one"]
    ends = [0, *(part.stop for part in words.values())]
    assert [(part.start, part.stop) for part in words.values()] == list(zip(ends[:-1], ends[1:], strict=True))
    assert all(part.stop > part.start for part in words.values())


def test_ablation_measures_the_distance_to_the_undisturbed_result(experiment):
    contexts = {("a", "nothing"): nullcontext(), ("a", "all"): hooks.skip(experiment.flux, "*_blocks.*")}
    moved, quality, pictures = ablation(experiment, contexts)
    plain = experiment.run()
    with hooks.skip(experiment.flux, "*_blocks.*"):
        bare = experiment.run()
    assert moved["a"] == {"nothing": 0, "all": pytest.approx(float((bare - plain).norm() / plain.norm()))}
    assert quality["a"]["nothing"] == 99 and quality["a"]["all"] < 20
    assert quality["a"]["all"] == psnr(pictures["a"]["all"], pictures["as it is"][""])


@pytest.mark.parametrize("size", [1.0, 1e-7])  # also of what rounding of the output would swallow
@pytest.mark.parametrize(("name", "rows"), [("to_v", slice(384, 576)), ("proj_mlp", slice(576, 1344))])
def test_the_anatomy_of_a_lora_is_that_of_its_matrices(lora, name, rows, size):
    for other in updates(lora.flux):
        other.B.data *= size
    seen, update = [], next(u for u in updates(lora.flux) if u.name.startswith("single") and u.name.endswith(name))
    module = lora.flux.single_blocks[2].linear1
    with module.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0])):
        norm, rank, effect = (table["single_blocks.2"][name] for table in anatomy(lora))
    delta = (update.scale * update.B @ update.A).detach().double().numpy()
    singular = np.linalg.svd(delta, compute_uv=False)[:4]
    share = singular / singular.sum()
    assert norm == pytest.approx(np.linalg.norm(delta), rel=1e-4)
    assert rank == pytest.approx(np.prod(share**-share), rel=1e-3) and 1 < rank <= 4.01
    x = torch.cat(seen).double().flatten(0, 1).numpy()
    w, b = (p.detach().double().numpy()[rows] for p in (module.base.weight, module.base.bias))
    assert effect == pytest.approx(np.linalg.norm(x @ delta.T) / np.linalg.norm(x @ w.T + b), rel=1e-4)


def test_the_anatomy_is_by_block_and_module(lora):
    assert {block: list(row) for block, row in anatomy(lora)[0].items()} == {
        "double_blocks.0": ["to_k"], "double_blocks.1": ["ff.net.2"], "single_blocks.2": ["to_v", "proj_mlp"]
    }  # fmt: skip


def test_an_update_of_equal_singular_values_has_its_rank(lora):
    update = next(updates(lora.flux))
    update.A.data, update.B.data = torch.eye(4, update.A.shape[1]), torch.eye(update.B.shape[0], 4)
    _, rank, _ = anatomy(lora)
    assert rank["double_blocks.0"]["to_k"] == pytest.approx(4, rel=1e-3)


def test_the_path_ends_at_the_result_and_its_changes_are_those_of_the_velocity(lora):
    predicted, table = follow(lora)
    assert torch.allclose(predicted[-1], lora.run(), atol=1e-5) and len(predicted) == 3
    assert list(table) == ["speed", "text", "reference", "LoRA"]
    given, empty, t = lora.condition, lora.conditions[""], torch.ones(1)
    conditions = given, Condition(empty.txt, empty.vec, given.references), Condition(given.txt, given.vec)
    with torch.no_grad():
        v, *others = (flow.velocity(lora.flux, lora.noise, t, c, torch.tensor([2.5])) for c in conditions)
        detach_all(lora.flux)
        others.append(flow.velocity(lora.flux, lora.noise, t, given, torch.tensor([2.5])))
    assert table["speed"]["t = 1.000"] == pytest.approx(float(v.square().mean() ** 0.5))
    for name, other in zip(("text", "reference", "LoRA"), others, strict=True):
        assert table[name]["t = 1.000"] == pytest.approx(float((v - other).norm() / v.norm()), rel=1e-4), name
    assert torch.allclose(predicted[0], lora.noise - v, atol=1e-5)


def test_drift_goes_on_from_the_last_picture_and_measures_from_the_first(experiment):
    pictures, table = repeat(experiment, 2)
    first = experiment.image
    assert pictures[0] is first and pictures[1] == experiment.picture(experiment.run())
    again = Condition(experiment.condition.txt, experiment.condition.vec, [encode_image(experiment.vae, pictures[1])])
    assert pictures[2] == experiment.picture(experiment.run(again))
    assert table["PSNR"]["round 2"] == psnr(pictures[2], first)
    assert (table["dx"]["round 2"], table["dy"]["round 2"]) == shift_between(first, pictures[2])[:2]
    red = np.asarray(pictures[2], float)[..., 0].mean() - np.asarray(first, float)[..., 0].mean()
    assert table["red"]["round 2"] == pytest.approx(red)


# ------------------------------------------------------------------------------------------------ command line

SMALL = ["--image", PICTURE, "--prompt", "make it darker", "--size", "48x32", "--steps", "2"]


@pytest.fixture
def lora_file(lora, tmp_path):
    write_adapter(tmp_path / "lora.safetensors", list(updates(lora.flux)), {}, torch.float32)
    return tmp_path / "lora.safetensors"


PAGES = {
    "attention": (
        ["--block", "single_blocks.*", "--word", "darker"],
        ["between", "streams", "words", "reference-heads", "reference-steps", "target-heads", "target-steps"],
    ),
    "ablate": (["--heads"], ["latents", "pictures", "psnr"]),
    "lora": ([], ["effect", "norm", "rank", "without"]),
    "path": ([], ["predictions", "velocity"]),
    "drift": (["--rounds", "2"], ["numbers", "pictures"]),
}  # fmt: skip


@pytest.mark.parametrize("command", PAGES)
def test_every_command_writes_a_page_and_its_pictures(command, lora_file, tmp_path):
    flags, names = PAGES[command]
    main([command, *SMALL, *flags, "--lora", str(lora_file), "--out", str(tmp_path / "page")])
    files = sorted((tmp_path / "page").iterdir())
    assert [file.name for file in files] == sorted(["index.html", *(f"{name}.png" for name in names)])
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert (
        sorted(f"{name}.png" for name in names) == sorted(re.findall("<img src='(.*?)'>", page)) and "http" not in page
    )
    for name in names:
        colours = Image.open(tmp_path / "page" / f"{name}.png").convert("RGB").getcolors(1 << 24)
        assert len(colours) > 20, f"{name} is blank"


def test_a_lora_may_be_weakened_and_the_base_be_quantised(lora_file, tmp_path, monkeypatch):
    seen, picture = [], str(Path(PICTURE).resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(COMMANDS, "path", lambda edit, args: seen.append(edit.flux) or [])
    main(["path", *SMALL, "--image", picture, "--lora", f"{lora_file}:0.5", "--precision", "int8"])
    (flux,) = seen
    assert {update.scale for update in updates(flux)} == {0.5} and len(list(updates(flux))) == len(LORA)
    assert any(isinstance(module, QuantisedLinear) for module in flux.modules())
    assert len(list((tmp_path / "cache" / "base").glob("*.safetensors"))) == 1


WRONG = {
    "nothing is called": (["attention", *SMALL, "--block", "blocks.*"], "no module is called 'blocks.*'"),
    "no block": (["ablate", *SMALL, "--block", "*_blocks.0.attend"], "fits more than blocks"),
    "no word": (["attention", *SMALL, "--prompt", " "], "nothing to study"),
    "no such word": (["attention", *SMALL, "--word", "cat"], "--word cat: the instruction has make, it, darker"),
    "no LoRA": (["lora", *SMALL], "the model has no LoRA; give one with --lora FILE"),
    "no picture": (["path", "--image", "none.png", "--prompt", "x"], "none.png"),
    "no prompt": (["path", "--image", PICTURE, "--prompt", ""], "nothing to study"),
    "no steps": (["path", *SMALL, "--steps", "0"], "1 step or more"),
    "no size": (["path", *SMALL, "--size", "big"], "a size is WIDTHxHEIGHT"),
    "no rounds": (["drift", *SMALL, "--rounds", "0"], "--rounds"),
    "no model": (["path", *SMALL, "--model", "/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_said_in_a_sentence(case, tmp_path):
    flags, said = WRONG[case]
    with pytest.raises((ValueError, OSError)) as error:
        main([*flags, "--out", str(tmp_path / "page")])
    assert said in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "page").exists()


def test_it_ends_with_1_and_no_traceback():
    command = [sys.executable, "-m", "kontext_min.study", *WRONG["no picture"][0]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("study: ")
