"""The model card: what the hub reads, and what a reader tries."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from tiny import CPU, write_pairs

import infer
import train
from kontext_min.adapters.read import read_adapter
from kontext_min.training import run as card

PROMPT = 'it\'s "réd" 🟥 | a photo of cat'


@pytest.fixture(scope="module")
def run(kontext, tmp_path_factory):
    """A trained folder with its card."""
    folder = tmp_path_factory.mktemp("card")
    data = write_pairs(folder, 3, (64, 48), PROMPT)
    values = {
        "pretrained_model_name_or_path": str(kontext), "data_backend_config": data, "mixed_precision": "no",
        "cache_dir": str(folder / "cache"), "max_train_steps": 3, "lora_rank": 4, "lora_alpha": 8, "num_eval_images": 1,
        "learning_rate": 3e-2, "validation_num_inference_steps": 2, "output_dir": str(folder / "out"),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    train.main([str(folder / "config.json")])
    return folder / "out"


def test_the_hub_reads_the_front_matter_and_the_tables_are_true(run):
    hub = pytest.importorskip("huggingface_hub")
    read = hub.ModelCard.load(run / "README.md")
    assert read.data.tags == ["flux", "flux-kontext", "lora", "image-to-image", "kontext_min"]
    assert (read.data.library_name, read.data.pipeline_tag) == ("diffusers", "image-to-image")
    assert read.data.base_model is None and read.data.license is None  # of a folder of one's own nothing is known
    assert "trained for 3 steps with kontext_min on 3 pairs and 0 pictures" in read.text
    settings = json.loads(read.text.partition("```json")[2].partition("```")[0])
    assert {"learning_rate": 0.03, "lora_rank": 4, "lora_alpha": 8.0}.items() <= settings.items()
    assert (run / "validation" / "000003.png").exists()
    assert "(validation/000003.png)" in read.text and "ComfyUI" in read.text


def test_the_cards_code_runs_in_diffusers_and_gives_what_infer_gives(run, monkeypatch):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    monkeypatch.chdir(run)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (code,) = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    exec(code, {})
    infer.main(["--lora", str(run / "pytorch_lora_weights.safetensors"), "--device", CPU.type, "--out", "ours.png"])
    ours, theirs = (np.asarray(Image.open(name), float) for name in ("ours.png", "edited.png"))
    assert ours.shape == theirs.shape and abs(ours - theirs).max() <= 1
    base = infer_without_lora(run)
    assert abs(ours - base).mean() > 0.5


def infer_without_lora(run):
    """The same sample of the base model."""
    recipe = read_adapter(run / "pytorch_lora_weights.safetensors").recipe
    flags = ["--model", recipe["model"], "--image", recipe["image"][0], "--prompt", PROMPT, "--reference-size", "keep"]
    flags += ["--steps", "2", "--seed", str(recipe["seed"]), "--size", recipe["size"], "--precision", "fp32"]
    infer.main([*flags, "--out", str(run / "base.png")])
    return np.asarray(Image.open(run / "base.png"), float)


def test_the_header_says_precision_base_and_modelspec_and_diffusers_reads_alpha_as_rank(run):
    diffusers = pytest.importorskip("diffusers")
    file = run / "pytorch_lora_weights.safetensors"
    recipe = read_adapter(file).recipe
    assert recipe["precision"] == "fp32" and recipe["base_model_precision"] == "no_change"
    assert recipe["trained_steps"] == 3 and recipe["prompt"] == [PROMPT]
    with safe_open(file, "pt") as handle:
        header = handle.metadata()
    spec = {key.removeprefix("modelspec."): value for key, value in header.items() if key.startswith("modelspec.")}
    assert set(spec) >= {"sai_model_spec", "architecture", "implementation", "title", "resolution", "date"}
    assert spec["resolution"] == recipe["size"] and re.match(r"\d{4}-\d\d-\d\dT", spec["date"])
    _, _, settings = diffusers.FluxKontextPipeline.lora_state_dict(
        run, weight_name=file.name, return_alphas=True, return_lora_metadata=True
    )
    assert settings["transformer.r"] == settings["transformer.lora_alpha"] == 4


def test_a_published_base_is_named_with_its_licence():
    hub = pytest.importorskip("huggingface_hub")
    lines = "\n".join(card.LICENCES["FLUX.1-Kontext-dev"])
    data = hub.ModelCard(f"---\n{lines}\n---\n").data
    assert data.base_model == "black-forest-labs/FLUX.1-Kontext-dev" and data.license == "other"
