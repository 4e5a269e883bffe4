"""Quantised files: scaled fp8 is dequantised exactly, everything else is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from tiny import CPU, FP32

from kontext_min.checkpoints import load
from kontext_min.checkpoints.tensors import Tensors


def block_matrices(tensors) -> list[str]:
    """What fp8 repacks quantise: the matrices of the blocks."""
    return [name for name, tensor in tensors.items() if "blocks." in name and tensor.ndim == 2]


def quantised(tensors, style: str, dtype=torch.float8_e4m3fn, prefix: str = ""):
    """A ComfyUI repack: fp8 values, an fp32 scale a tensor, and the markers of that style."""
    made = dict(tensors)
    for name in block_matrices(tensors):
        stem, scale = name.removesuffix(".weight"), tensors[name].abs().max().float() / 400
        made[name] = (tensors[name].float() / scale).to(dtype)
        if style == "scale_weight":
            made |= {f"{stem}.scale_weight": scale.reshape(1), f"{stem}.scale_input": torch.ones(1)}
        else:
            mark = json.dumps({"format": str(dtype).removeprefix("torch.")}).encode()
            made |= {f"{stem}.weight_scale": scale, f"{stem}.comfy_quant": torch.tensor(list(mark), dtype=torch.uint8)}
    if style == "scale_weight":
        made["scaled_fp8"] = torch.zeros(2).to(dtype)
    return {prefix + name: tensor for name, tensor in made.items()}


@pytest.fixture
def singles(single_files, tmp_path):
    return Path(shutil.copytree(single_files, tmp_path / "single"))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("style", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_fp8_is_dequantised_exactly(style, dtype, prefix, singles):
    path = singles / "flux1-kontext-dev.safetensors"
    original = tiny.load_file(path)
    made = quantised(original, style, dtype)
    tiny.rewrite(path, lambda tensors: quantised(tensors, style, dtype, prefix))
    state = load.load_flux(load.find(singles), CPU, FP32).state_dict()
    for name in block_matrices(original):
        scale = made[f"{name.removesuffix('.weight')}.{style}"]
        assert torch.equal(state[name], made[name].float() * scale.reshape(())), name
        assert tiny.error(state[name], original[name]) < 0.1
    assert torch.equal(state["img_in.weight"], original["img_in.weight"].float())


def test_plain_fp8_is_read_as_it_is(singles):
    path = singles / "t5xxl_fp16.safetensors"
    tiny.rewrite(path, lambda tensors: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()})
    state = load.load_t5(load.find(singles), CPU, FP32).state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in tiny.load_file(path).items())


def as_int8(tensors):
    """An int8 repack with a scale, as if it were fp8."""
    name = "double_blocks.0.img_mlp.0.weight"
    return {**tensors, name: tensors[name].to(torch.int8), name.replace("weight", "weight_scale"): torch.ones(1)}


def as_nvfp4(tensors):
    """Two numbers a byte, with scales of blocks and of the whole."""
    stem, mark = "double_blocks.0.img_mlp.0", torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    packed = tensors[f"{stem}.weight"][:, ::2].to(torch.uint8)
    scales = {"weight_scale": packed[:, ::8].to(torch.float8_e4m3fn), "weight_scale_2": torch.ones(())}
    return {
        **tensors,
        f"{stem}.weight": packed,
        f"{stem}.comfy_quant": mark,
        **{f"{stem}.{k}": v for k, v in scales.items()},
    }


def as_nf4(tensors):
    name = "double_blocks.0.img_mlp.0.weight"
    return {**tensors, f"{name}.absmax": torch.ones(4), f"{name}.quant_map": torch.ones(16)}


def with_block_scales(tensors):
    name = "double_blocks.0.img_mlp.0.weight"
    return {
        **tensors,
        name: tensors[name].to(torch.float8_e4m3fn),
        name.replace("weight", "weight_scale"): torch.ones(4),
    }


def with_a_scale_of_nothing(tensors):
    return {**tensors, "double_blocks.0.img_mlp.1.weight_scale": torch.ones(1)}


@pytest.mark.parametrize(
    "change",
    [as_int8, as_nvfp4, as_nf4, with_block_scales, with_a_scale_of_nothing],
    ids=lambda change: change.__name__,
)
def test_other_quantised_files_are_refused_by_name(change, singles):
    tiny.rewrite(singles / "flux1-kontext-dev.safetensors", change)
    with pytest.raises(ValueError, match=r"double_blocks.0.img_mlp.[01]") as error:
        load.load_flux(load.find(singles), CPU, FP32)
    assert "flux1-kontext-dev.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_tensors_of_several_files_are_one_mapping(kontext):
    files = load.find_component(kontext, "transformer").files
    tensors = Tensors(files)
    assert tensors.where.keys() == set(tiny.read_part(kontext / "transformer")) and len(files) > 3
    name = "transformer_blocks.1.ff.net.0.proj.weight"
    assert tensors.shapes()[name] == (256, 64) == tuple(tensors.read(name).shape)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480])
def test_header_whose_length_looks_like_a_pickle_is_none(length, tmp_path):
    for extra in range(length):
        tiny.save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"x": "x" * extra})
        if (tmp_path / "a.safetensors").read_bytes()[:8] == length.to_bytes(8, "little"):
            break
    assert Tensors([tmp_path / "a.safetensors"]).where.keys() == {"a"}
