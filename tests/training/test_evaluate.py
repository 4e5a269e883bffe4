"""The eval loss and the probe, on models of which the answer is known, and on nano."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import CPU, FP32
from torch import nn

import train
from kontext_min import flow, presets
from kontext_min.checkpoints.load import find, load_flux
from kontext_min.config import Config, read_config
from kontext_min.data.examples import Examples
from kontext_min.run_folder import RunFolder
from kontext_min.training.evaluate import Evaluator, ignored
from kontext_min.training.sets import mix_of, read_sets, text_cache

ROOT = Path(__file__).parents[2]


class Ignorant(nn.Module):
    """A transformer that never looks beyond the token it predicts for."""

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, img, **_):
        return self.share * img


class Copier(Ignorant):
    """One that knows that the target is its reference: predicts (x_t - reference) / t, which is noise - target."""

    def forward(self, img, img_ids, timesteps, **_):
        count = int((img_ids[:, 0] == 0).sum())
        if img.shape[1] < 2 * count:
            return self.share * img
        return torch.cat([(img[:, :count] - img[:, count : 2 * count]) / timesteps, img[:, count:]], 1)


@pytest.fixture
def config(kontext, tmp_path):
    """Four pairs of equal pictures; three are held out."""
    for i in range(4):
        for folder in ("target", "reference"):
            (tmp_path / folder).mkdir(exist_ok=True)
            noise_picture(i).save(tmp_path / folder / f"{i}.png")
        (tmp_path / "target" / f"{i}.txt").write_text("make it night")
    return Config(
        pretrained_model_name_or_path=str(kontext), output_dir=tmp_path / "out", cache_dir=tmp_path / "cache",
        mixed_precision="no", validation_split=3, aspect_bucket_alignment=16, data_backend_config=[
            {"id": "t", "instance_data_dir": tmp_path / "target", "conditioning_data": "r", "resolution": 48},
            {"id": "r", "instance_data_dir": tmp_path / "reference", "conditioning_type": "reference_strict"},
        ],
    )  # fmt: skip


def noise_picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def changed(config, **more):
    return config.model_copy(update=more)


def evaluator(config, flux, examples=None):
    sets = read_sets(config, 16)
    checkpoint = find(presets.locate(config.pretrained_model_name_or_path))
    made = Examples(sets.validation, checkpoint, text_cache(config), FP32, mix_of(config).complete())
    made.encode(CPU)
    return Evaluator(config, flux, made, sets.unseen)


def lines(config):
    return [json.loads(line) for line in (config.output_dir / "validation" / "eval.jsonl").read_text().splitlines()]


def test_a_model_that_ignores_references_has_one_loss_and_is_told_so(config):
    text = evaluator(config, Ignorant()).run(5)
    (line,) = lines(config)
    assert line["probe"]["own"] == line["probe"]["shuffled"] == line["probe"]["none"] == line["loss"] > 0
    assert (line["step"], line["pairs"], line["unseen"]) == (5, 3, True)
    assert "warning: the LoRA does not look at its reference" in text and "conditioning_data" in line["warning"]
    assert "warning" not in evaluator(config, Ignorant()).run(0)


def test_a_model_that_copies_its_reference_loses_nothing_with_its_own(config):
    text = evaluator(config, Copier()).run(5)
    probe = lines(config)[0]["probe"]
    assert probe["own"] < 1e-9 and probe["shuffled"] > 0.01 and probe["none"] > 0.01 and "warning" not in text


def test_the_curve_is_the_loss_at_the_middles_of_eight_parts_by_formula(config):
    made = evaluator(config, Ignorant())
    made.run(1)
    (line,) = lines(config)
    times = [t for t, _ in line["per_timestep"]]
    assert times == [1 / 16, 3 / 16, 5 / 16, 7 / 16, 9 / 16, 11 / 16, 13 / 16, 15 / 16]
    assert sum(loss for _, loss in line["per_timestep"]) / 8 == pytest.approx(line["loss"])
    targets = torch.cat([made.examples.latents(use.example, use.target) for use in made.uses])
    spread, mean = targets.var().item(), targets.mean().item() ** 2
    for t, loss in line["per_timestep"]:  # share * x_t against noise - target, noise being standard normal
        a, b = 0.5 * (1 - t) + 1, 0.5 * t - 1  # of the target, of the noise
        assert loss == pytest.approx(a**2 * (spread + mean) + b**2, rel=0.15), t


def test_it_is_the_same_again_and_a_resumed_run_replaces_later_lines(config):
    flux = load_flux(find(config.pretrained_model_name_or_path), CPU, FP32)
    for step in (1, 2, 3):
        evaluator(config, flux).run(step)
    RunFolder(config.output_dir).rewind(1)
    evaluator(config, flux).run(2)
    first, second = lines(config)
    assert {**first, "step": 2} == second
    more = changed(config, eval_timesteps=3, num_eval_pairs=1)
    evaluator(more, flux).run(4)
    last = lines(config)[-1]
    assert len(last["per_timestep"]) == 3 and last["probe"]["shuffled"] is None and last["pairs"] == 1


def test_pairs_of_equal_references_are_not_shuffled_with_each_other(config, tmp_path):
    for i in (1, 2):
        (tmp_path / "reference" / f"{i}.png").write_bytes((tmp_path / "reference" / "0.png").read_bytes())
    made = evaluator(changed(config, validation_split=0, num_eval_images=4), Ignorant())
    others = [made.other(use).example.name for use in made.uses]
    assert others == ["3", "3", "3", "0"] and not made.unseen
    same = [replace(use, references=made.uses[0].references) for use in made.uses]
    made.uses, made.shown = same, [made.shown[0]] * 4
    assert made.other(same[0]) is None


def test_without_references_there_is_no_probe_and_disabled_there_is_nothing(config):
    alone = config.data_backend_config[0].model_copy(update={"conditioning_data": []})
    made = evaluator(changed(config, data_backend_config=[alone]), Ignorant())
    assert "warning" not in made.run(3) and lines(config)[0]["probe"] is None
    assert evaluator(changed(config, eval_loss_disable=True), Ignorant()).run(3) == ""


@pytest.mark.parametrize("probe, warned", [
    ({"own": 0.5, "shuffled": 0.5, "none": 0.9}, True),
    ({"own": 0.5, "shuffled": 0.52, "none": 0.9}, False),
    ({"own": 0.5, "shuffled": None, "none": 0.5}, True),
    (None, False),
])  # fmt: skip
def test_the_warning_comes_when_the_own_reference_is_not_clearly_better(probe, warned):
    assert ignored(probe) is warned


def test_evaluation_does_not_change_training_by_a_bit(config, tmp_path):
    loras = []
    for name, change in (("with", {"eval_steps_interval": 1}), ("without", {"eval_loss_disable": True})):
        more = {
            "max_train_steps": 4, "lora_rank": 2, "learning_rate": 1e-2, "gradient_checkpointing": False,
            "validation_disable": True, "output_dir": tmp_path / name, "caption_dropout_probability": 0.3,
        }  # fmt: skip
        file = tmp_path / f"{name}.json"
        file.write_text(changed(config, **more, **change).model_dump_json(exclude_defaults=True))
        train.main([str(file)])
        loras.append(load_file(tmp_path / name / "pytorch_lora_weights.safetensors"))
    assert all(torch.equal(loras[0][key], loras[1][key]) for key in loras[0])
    assert len((tmp_path / "with" / "validation" / "eval.jsonl").read_text().splitlines()) == 5
    assert not (tmp_path / "without" / "validation" / "eval.jsonl").exists()


def test_nano_looks_at_its_references(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = read_config(ROOT / "configs" / "nano.json", [f"output_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"])
    flux = load_flux(find(presets.locate("nano")), CPU, FP32)
    text = evaluator(config, flux).run(1)
    probe = lines(config)[0]["probe"]
    assert probe["own"] < 0.8 * probe["shuffled"] and "warning" not in text


def test_the_loss_of_a_pair_at_one_time_is_the_error_of_its_velocity(config):
    flux = load_flux(find(config.pretrained_model_name_or_path), CPU, FP32)
    made = evaluator(changed(config, eval_timesteps=1), flux)
    batch = made.examples.batch(made.uses[:1], CPU)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "draw_noise", lambda shape, g: seen.append(torch.randn(shape, generator=g)) or seen[-1])
        found = made.losses((made.uses[0], made.uses[0]))
    x_t, t = 0.5 * batch.target + 0.5 * seen[0], torch.tensor([0.5])
    with torch.no_grad():
        v = flow.velocity(flux, x_t, t, batch.condition, torch.ones(1))
    torch.testing.assert_close(found[0], (v - (seen[0] - batch.target)).pow(2).mean())
