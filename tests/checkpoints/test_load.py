"""Finding and loading: both layouts, every alias, hub ids, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from tiny import CPU, FP32

from kontext_min.checkpoints import load
from kontext_min.edit import Editor, edit
from kontext_min.encoders import TextEncoder
from kontext_min.presets import KONTEXT_DEV, Size
from kontext_min.sampler import Sampling

WEIGHTS = {  # of single files
    "transformer": "flux1-kontext-dev.safetensors", "vae": "ae.safetensors", "text_encoder": "clip_l.safetensors",
    "text_encoder_2": "t5xxl_fp16.safetensors",
}  # fmt: skip


@pytest.fixture
def singles(single_files, tmp_path):
    """A copy of the folder of single files, to change."""
    return Path(shutil.copytree(single_files, tmp_path / "single"))


@pytest.fixture
def folder(kontext, tmp_path):
    """A copy of the diffusers folder, to change."""
    return Path(shutil.copytree(kontext, tmp_path / "kontext"))


@torch.no_grad()
def latents(folder: Path) -> torch.Tensor:
    """What two steps with a reference make of seed 0: everything of the model has a part in it."""
    checkpoint = load.find(folder)
    text = TextEncoder(checkpoint, CPU, FP32)("make the sky red")
    vae, flux = load.load_vae(checkpoint, CPU, FP32), load.load_flux(checkpoint, CPU, FP32)
    reference, seen = Image.radial_gradient("L").resize((48, 32)).convert("RGB"), []
    edit(
        Editor(flux, vae, checkpoint.shift, KONTEXT_DEV),
        text,
        [reference],
        Size(48, 32),
        Sampling(steps=2),
        each_step=seen.append,
    )
    return seen[-1]


@pytest.fixture(scope="module")
def expected(kontext):
    return latents(kontext)


def test_fixture_is_as_the_published_files_are(kontext):
    index = json.loads((kontext / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = {name: file for name, file in index["weight_map"].items() if "transformer_blocks.1." in name}
    assert len(set(index["weight_map"].values())) > 3 and len(set(shards.values())) > 1  # a block straddles shards
    clip = tiny.read_part(kontext / "text_encoder")
    assert all(name.startswith("text_model.") for name in clip)
    assert {tensor.dtype for tensor in clip.values()} == {torch.bfloat16}
    assert json.loads((kontext / "text_encoder/config.json").read_text())["eos_token_id"] == 2
    t5 = tiny.read_part(kontext / "text_encoder_2")
    assert "shared.weight" in t5 and "encoder.embed_tokens.weight" not in t5
    assert len(list((kontext / "text_encoder_2").glob("*.safetensors"))) > 1
    assert (kontext / "scheduler/scheduler_config.json").exists()


def test_both_layouts_give_the_same_latents_to_the_last_bit(single_files, expected):
    assert torch.equal(latents(single_files), expected)


def prefixed(tensors):
    return {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}


def norm_weight(tensors):
    return {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in tensors.items()}


def clip_without_prefix(tensors):
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def clip_with_extras(tensors):
    extras = {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.tensor(4.6)}
    return {**tensors, **extras, "text_projection.weight": torch.eye(64)}


def embed_tokens_only(tensors):
    return {name.replace("shared.", "encoder.embed_tokens."): tensor for name, tensor in tensors.items()}


def both_embeddings(tensors):
    return {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"].clone()}


@pytest.mark.parametrize(
    "part, change",
    [
        ("transformer", prefixed),
        ("transformer", norm_weight),
        ("text_encoder", clip_without_prefix),
        ("text_encoder", clip_with_extras),
        ("text_encoder_2", embed_tokens_only),
        ("text_encoder_2", both_embeddings),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_other_names_in_single_files_change_nothing(part, change, singles, expected):
    tiny.rewrite(singles / WEIGHTS[part], change)
    assert torch.equal(latents(singles), expected)


def test_diffusers_folder_without_clip_prefix_and_with_unsharded_parts(folder, expected):
    tiny.rewrite(folder / "text_encoder/model.safetensors", clip_without_prefix)
    for part, name in (("transformer", "diffusion_pytorch_model"), ("text_encoder_2", "model")):
        tensors = tiny.read_part(folder / part)
        for path in folder.glob(f"{part}/*.safetensors*"):
            path.unlink()
        tiny.save_file(tensors, folder / part / f"{name}.safetensors")
    assert torch.equal(latents(folder), expected)


def test_sentencepiece_file_alone_is_enough(folder, expected):
    (folder / "tokenizer_2/tokenizer.json").unlink()
    assert torch.equal(latents(folder), expected)


def test_loaded_models_are_frozen_and_in_eval_mode(kontext):
    checkpoint = load.find(kontext)
    for module in (load.load_flux(checkpoint, CPU, FP32), load.load_vae(checkpoint, CPU, FP32)):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_loaded_weights_do_not_change_with_their_file(singles):
    flux = load.load_flux(load.find(singles), CPU, torch.bfloat16)  # the file's own dtype: a copy all the same
    before, path = flux.img_in.weight.clone(), singles / WEIGHTS["transformer"]
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(flux.img_in.weight, before)


# ------------------------------------------------------------------------------------------------ refused


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def test_missing_tensors_are_counted_and_five_are_named(singles):
    gone = [f"double_blocks.0.txt_mlp.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")]
    gone += ["single_blocks.0.linear1.bias", "single_blocks.1.linear2.bias", "single_blocks.1.linear2.weight"]
    tiny.rewrite(singles / WEIGHTS["transformer"], without(*gone))
    with pytest.raises(ValueError) as error:
        load.load_flux(load.find(singles), CPU, FP32)
    assert f"7 tensors missing: {', '.join(gone[:5])} and 2 more" in str(error.value)
    assert "flux1-kontext-dev.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_unexpected_tensors_are_counted_and_named(singles):
    tiny.rewrite(singles / WEIGHTS["vae"], lambda tensors: {**tensors, "quant_conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="1 unexpected tensors: quant_conv.weight"):
        load.load_vae(load.find(singles), CPU, FP32)


def test_misshaped_tensors_are_named_with_both_shapes(singles):
    wrong = {"text_model.final_layer_norm.bias": torch.zeros(3)}
    tiny.rewrite(singles / WEIGHTS["text_encoder"], lambda tensors: {**tensors, **wrong})
    with pytest.raises(ValueError, match=r"text_model.final_layer_norm.bias is \[3\], expected \[64\]"):
        load.load_clip(load.find(singles), CPU, FP32)


@pytest.mark.parametrize("part", WEIGHTS)
def test_file_of_another_network_is_refused_in_one_sentence(part, singles):
    tiny.save_file({"something.else": torch.zeros(2)}, singles / WEIGHTS[part])
    loaders = {
        "transformer": load.load_flux,
        "vae": load.load_vae,
        "text_encoder": load.load_clip,
        "text_encoder_2": load.load_t5,
    }
    with pytest.raises(ValueError) as error:
        loaders[part](load.find(singles), CPU, FP32)
    assert WEIGHTS[part] in str(error.value) and "\n" not in str(error.value)


def test_a_single_autoencoder_in_diffusers_names_is_refused_in_one_sentence(singles, folder):
    shutil.copy(next((folder / "vae").glob("*.safetensors")), singles / WEIGHTS["vae"])
    with pytest.raises(ValueError, match=r"missing or malformed: 'encoder.down.0.block.0.conv1.weight'"):
        load.load_vae(load.find(singles), CPU, FP32)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def web_page(path):
    path.write_text("<!DOCTYPE html><html>Not Found</html>")


def empty(path):
    path.write_bytes(b"")


def pickle(path):
    torch.save({"x": torch.zeros(1)}, path)


@pytest.mark.parametrize("damage", [truncated, web_page, empty, pickle], ids=lambda damage: damage.__name__)
def test_damaged_file_is_refused_in_one_sentence(damage, singles):
    damage(singles / WEIGHTS["vae"])
    with pytest.raises(ValueError) as error:
        load.load_vae(load.find(singles), CPU, FP32)
    sentence = "is a pickle, which can run code" if damage is pickle else "is not a complete safetensors file"
    assert f"ae.safetensors {sentence}" in str(error.value)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused_by_name(folder):
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="vae/diffusion_pytorch_model.bin is not read: use the .safetensors"):
        load.find(folder)


def test_a_model_in_gguf_is_refused_by_name(singles):
    (singles / WEIGHTS["transformer"]).rename(singles / "flux1-kontext-dev-Q8_0.gguf")
    with pytest.raises(FileNotFoundError, match="no transformer.*; flux1-kontext-dev-Q8_0.gguf is not read"):
        load.find(singles)


def test_a_file_in_place_of_its_folder_is_refused(singles):
    with pytest.raises(ValueError, match="ae.safetensors is a file; give its folder"):
        load.find(singles / WEIGHTS["vae"])


def test_shard_that_is_not_there_is_named(folder):
    sorted((folder / "transformer").glob("*.safetensors"))[2].unlink()
    with pytest.raises(FileNotFoundError, match="00003-of-.* does not exist; is the download complete"):
        load.load_flux(load.find(folder), CPU, FP32)


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2", "tokenizer"])
def test_part_that_is_not_there_is_named(part, folder):
    shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=part):
        load.find(folder)


# ------------------------------------------------------------------------------------------------ hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_id_is_found_in_the_local_cache(cache, kontext):
    repository, commit = cache / "models--black-forest-labs--FLUX.1-Kontext-dev", "0" * 40
    shutil.copytree(kontext, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert load.find("black-forest-labs/FLUX.1-Kontext-dev").folder == repository / "snapshots" / commit


def test_hub_id_without_network_says_what_to_run(cache):
    with pytest.raises(FileNotFoundError) as error:
        load.find("black-forest-labs/FLUX.1-Kontext-dev")
    assert "hf download black-forest-labs/FLUX.1-Kontext-dev" in str(error.value) and "\n" not in str(error.value)


def test_what_the_hub_says_is_passed_on(cache, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(FileNotFoundError, match=r"out of reach \(.*No space left on device\); accept"):
        load.find("black-forest-labs/FLUX.1-Kontext-dev")


def test_what_is_neither_folder_nor_hub_id_says_so():
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        load.find("./models/kontext")


# ------------------------------------------------------------------------------------------------ memory

MEASURE = """
import re, sys, threading, time
import torch
from pathlib import Path
from kontext_min import flow
from kontext_min.checkpoints.load import Checkpoint, find_component, load_flux

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

folder, peak, done = Path(sys.argv[1]), [0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())
before = anonymous()
threading.Thread(target=watch).start()
checkpoint = Checkpoint(folder, {"transformer": find_component(folder, "transformer")}, flow.Shift())
flux = load_flux(checkpoint, torch.device("cpu"), torch.bfloat16)
done.set()
model = sum(p.numel() * p.element_size() for p in flux.parameters())
print(max(peak[0], anonymous()), before, model)
"""  # fmt: skip


@pytest.mark.slow
def test_loading_8_gb_needs_less_than_1_gb_beyond_the_model(tmp_path):
    """Shards of a random transformer at full width, 6 double and 13 single blocks, bf16, in diffusers' layout."""
    write_random_transformer(tmp_path / "transformer", depth=6, depth_single_blocks=13)
    run = [sys.executable, "-c", MEASURE, str(tmp_path)]
    root = Path(__file__).parents[2]
    output = subprocess.run(
        run, capture_output=True, text=True, check=True, cwd=root, env={**os.environ, "PYTHONPATH": "."}
    )
    peak, before, model = (int(value) for value in output.stdout.split())
    print(f"model {model / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, before {before / 1e9:.2f} GB")
    assert model > 7.5e9 and peak - model < 1e9


def write_random_transformer(folder: Path, **depths: int):
    """About 2 GB to a shard, written shard by shard."""
    from kontext_min.checkpoints import keys
    from kontext_min.models.flux import Flux, FluxConfig

    config = FluxConfig(**depths)
    with torch.device("meta"):
        state = Flux(config).state_dict()
    folder.mkdir()
    table, shard, size, weight_map, number = keys.flux_diffusers(config), {}, 0, {}, 0
    noise = torch.randn(2**26).bfloat16()  # enough for the largest matrix

    def write():
        name = f"diffusion_pytorch_model-{number:05d}.safetensors"
        tiny.save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))

    for ours, tensor in state.items():
        for name, part in table[ours].disassemble(tensor).items():
            shard[name] = noise[: part.numel()].view(part.shape).clone()
            size += shard[name].numel() * 2
        if size > 2e9:
            write()
            shard, size, number = {}, 0, number + 1
    write()
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = {"num_layers": config.depth, "num_single_layers": config.depth_single_blocks, "guidance_embeds": True}
    sizes |= {"num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 64}
    (folder / "config.json").write_text(json.dumps(sizes))
