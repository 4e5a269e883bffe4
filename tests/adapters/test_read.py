"""Every format of adapters, made by its definition or by the programs that write it, works as defined; the rest is
refused. Nothing here is written by our own exporter.
"""

import json
import re
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import CPU, FP32, add_lora, detach_all, error

import infer
from kontext_min.adapters import read
from kontext_min.adapters.inject import apply_updates, start_from, updates
from kontext_min.adapters.read import read_adapter
from kontext_min.adapters.rows import by_linear
from kontext_min.checkpoints import load
from kontext_min.checkpoints.load import load_flux, load_vae
from kontext_min.data.buckets import Size
from kontext_min.edit import Editor, edit
from kontext_min.flow import Shift
from kontext_min.presets import NANO
from kontext_min.sampler import Sampling

BFL = ("img_in", "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.proj", "double_blocks.1.img_mod.lin",
       "double_blocks.1.txt_mlp.0", "single_blocks.0.linear1", "single_blocks.1.linear2",
       "final_layer.adaLN_modulation.1", "final_layer.linear")  # fmt: skip
PLACES = {  # diffusers' module -> BFL's, and which of its rows: the table of the published files
    row["diffusers_name"].removesuffix(".weight"): (row["bfl_name"].removesuffix(".weight"), row["op"])
    for row in tiny.table("transformer_map")
}
DIFFUSERS = [name for name, (ours, _) in PLACES.items() if ours in BFL]
FP8 = torch.float8_e4m3fn
PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
FORMATS = {  # prefix, separator, whose names, endings or "lokr", dtype
    "a diffusers": ("transformer.", ".", DIFFUSERS, PEFT, FP32),
    "b ai-toolkit": ("transformer.", ".", DIFFUSERS, PEFT, torch.float16),
    "c kohya": ("lora_unet_", "_", BFL, KOHYA, torch.bfloat16),
    "d comfy": ("diffusion_model.", ".", BFL, KOHYA, torch.float8_e4m3fn),
    "e onetrainer": ("lora_transformer_", "_", DIFFUSERS, KOHYA, torch.bfloat16),
    "f fal": ("base_model.model.", ".", BFL, PEFT, FP32),
    "g diffusers before PEFT": ("transformer.", ".", DIFFUSERS, ("lora.down.weight", "lora.up.weight"), FP32),
    "i kohya lokr": ("lora_unet_", "_", BFL, "lokr", torch.bfloat16),
    "j lycoris": ("lycoris_", "_", DIFFUSERS, "lokr", FP32),
    "k ai-toolkit lokr": ("transformer.", ".", DIFFUSERS, "lokr", torch.float16),
}
ALPHAS = ("rank", "half the rank", "absent", "in metadata")
LAYOUTS = ("fused", "split")


def expressible(form: str, alpha: str, layout: str) -> bool:
    """PEFT's header is of diffusers' names alone, these have no fused modules; a split LoKr has other names."""
    names, kind = FORMATS[form][2:4]
    if alpha == "in metadata" and (names is not DIFFUSERS or kind is not PEFT):
        return False
    return layout == "split" if names is DIFFUSERS else layout == "fused" or kind != "lokr"


MATRIX = [case for case in ((f, a, s) for f in FORMATS for a in ALPHAS for s in LAYOUTS) if expressible(*case)]


@pytest.fixture(scope="module")
def editor(kontext):
    """Ours; every test takes its updates off again."""
    return Editor(load_flux(tiny.part(kontext, "transformer"), CPU, FP32),
                  load_vae(tiny.part(kontext, "vae"), CPU, FP32), Shift(), NANO)  # fmt: skip


@pytest.fixture(scope="module")
def flux(editor):
    return editor.flux


@pytest.fixture(autouse=True)
def clean(request):
    yield
    if "flux" in request.fixturenames:
        detach_all(request.getfixturevalue("flux"))


@pytest.fixture
def oracle(kontext):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FluxTransformer2DModel.from_pretrained(kontext / "transformer", dtype=FP32)


# ------------------------------------------------------------------------------------------------ by definition


def shape_of(flux, name: str) -> tuple[int, int]:
    """(rows, in) of a module of BFL's or diffusers'."""
    ours, op = PLACES.get(name, (name, "copy"))
    rows, inputs = flux.get_submodule(ours).weight.shape
    return (rows_of(op).stop - rows_of(op).start if op.startswith("rows") else rows), inputs


def rows_of(op: str) -> slice:
    """'rows[3072:6144]' of the published size -> the tiny model's rows."""
    return slice(*(int(edge) * 64 // 3072 for edge in op[5:-1].split(":")))


def add_to(total: dict[str, torch.Tensor], flux, name: str, delta: torch.Tensor):
    """Add a module's delta W, its rows as its format has them, to that of BFL's linears."""
    ours, op = PLACES.get(name, (name, "copy"))
    whole = total.setdefault(ours, torch.zeros_like(flux.get_submodule(ours).weight))
    if op.startswith("cat"):
        delta = torch.cat(delta.chunk(2)[::-1])
    whole[rows_of(op) if op.startswith("rows") else slice(None)] += delta


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return (0.3 * tiny.random(*shape, seed=seed)).to(dtype)


def lora_halves(shape, rank: int, parts: int, dtype, seed: int) -> dict[str, torch.Tensor]:
    """A and B; with several parts (sd-scripts' `split_qkv`) their As are stacked and B is block-diagonal."""
    edges = [shape[0] * i // parts for i in range(parts + 1)]
    blocks = [noise((edges[i + 1] - edges[i], rank), FP32, seed + i) for i in range(parts)]
    return {"A": noise((rank * parts, shape[1]), dtype, seed + 9), "B": torch.block_diag(*blocks).to(dtype)}


def lokr_sides(shape, rank: int, dtype, seed: int) -> dict[str, torch.Tensor]:
    """w1 and w2 in LyCORIS's three ways, by `seed`: both whole, w2 of two factors, both of two factors."""
    (a, c), (b, d) = (4, 2), (shape[0] // 4, shape[1] // 2)
    sides = {"w1": (a, c)} if seed % 3 < 2 else {"w1_a": (a, rank), "w1_b": (rank, c)}
    sides |= {"w2": (b, d)} if seed % 3 < 1 else {"w2_a": (b, rank), "w2_b": (rank, d)}
    return {f"lokr_{name}": noise(size, dtype, seed + i) for i, (name, size) in enumerate(sides.items())}


def make(flux, form: str, alpha: str, layout: str, path: Path) -> dict[str, torch.Tensor]:
    """Write a file of mixed ranks by the format's definition. -> what it adds to BFL's linears, by the definition."""
    prefix, separator, names, endings, dtype = FORMATS[form]
    tensors, total, patterns = {}, {}, {}
    for seed, name in enumerate(names):
        stem, rank, shape = prefix + name.replace(".", separator), 2 + seed % 3, shape_of(flux, name)
        if endings == "lokr":
            made = lokr_sides(shape, rank, dtype, seed)
            w1 = made["lokr_w1"] if "lokr_w1" in made else made["lokr_w1_a"].float() @ made["lokr_w1_b"].float()
            w2 = made["lokr_w2"] if "lokr_w2" in made else made["lokr_w2_a"].float() @ made["lokr_w2_b"].float()
            product, whole = torch.kron(w1.float(), w2.float()), {"lokr_w1", "lokr_w2"} <= made.keys()
        else:
            halves = lora_halves(shape, rank, 3 if layout == "split" and "qkv" in name else 1, dtype, seed)
            made, whole = dict(zip(endings, halves.values(), strict=True)), False
            rank, product = len(halves["A"]), halves["B"].float() @ halves["A"].float()
        value = rank if alpha == "rank" else rank / 2
        if alpha in ("rank", "half the rank"):
            made["alpha"] = torch.tensor(9999999999.0 if whole else value).to(dtype)  # as ai-toolkit: inf in fp16
        patterns[f"^{name}"] = value
        total_scale = 1 if whole or alpha == "absent" else value / rank
        add_to(total, flux, name, total_scale * product)
        tensors |= {f"{stem}.{ending}": tensor for ending, tensor in made.items()}
    config = {"transformer.lora_alpha": 1, "transformer.alpha_pattern": patterns, "transformer.r": 1}
    header = {"lora_adapter_metadata": json.dumps(config)} if alpha == "in metadata" else {"ss_network_alpha": "7"}
    save_file(tensors, path, metadata=header)  # nobody reads ss_network_alpha: the tensors say it
    return total


def assert_adds(flux, path: Path, total: dict[str, torch.Tensor]):
    """Read, the file changes BFL's linears by `total`."""
    ours = {}
    for linear, (_, here) in by_linear(read_adapter(path).updates, flux).items():
        ours[linear.name] = torch.zeros_like(total[linear.name])
        for update in here:
            ours[linear.name][update.start : update.start + update.shape[0]] += update.delta()
    assert ours.keys() == total.keys()
    assert max(error(ours[name], total[name]) for name in ours) < 1e-6


def picture(editor) -> np.ndarray:
    text = tiny.random(1, 5, 48, seed=1), tiny.random(1, 64, seed=2)
    with torch.no_grad():
        return np.asarray(edit(editor, text, [], Size(32, 32), Sampling(2, 2.5, 1.0, (0, 1), 0)), dtype=float)


def picture_of_merged(editor, total: dict[str, torch.Tensor]) -> np.ndarray:
    """With the deltas in the weights themselves."""
    kept = {name: editor.flux.get_submodule(name).weight for name in total}
    for name, delta in total.items():
        editor.flux.get_submodule(name).weight = torch.nn.Parameter(kept[name] + delta)
    made = picture(editor)
    for name, weight in kept.items():
        editor.flux.get_submodule(name).weight = weight
    return made


@pytest.mark.parametrize("form, alpha, layout", MATRIX)
def test_every_format_adds_what_it_defines_and_makes_that_picture(form, alpha, layout, editor, flux, tmp_path):
    total = make(flux, form, alpha, layout, path := tmp_path / "lora.safetensors")
    assert_adds(flux, path, total)
    file = read_adapter(path)
    apply_updates(flux, file.updates, 1.0, FP32)
    ours = picture(editor)
    detach_all(flux)
    difference = abs(ours - picture_of_merged(editor, total))
    assert difference.max() <= 2 and difference.mean() <= 0.05
    assert abs(ours - picture(editor)).mean() > 2
    kind = "LoKr" if "lokr" in FORMATS[form][3] else "LoRA"
    title = {"c": "kohya", "d": "comfy", "e": "onetrainer", "f": "fal", "i": "kohya", "j": "lycoris"}
    assert file.title == f"{title.get(form[0], 'diffusers')} {kind}, {len(FORMATS[form][2])} modules"


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("form", ["c kohya", "k ai-toolkit lokr"])
def test_tensors_of_any_precision_are_read_as_they_are(form, dtype, flux, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, form, (*FORMATS[form][:4], dtype))
    total = make(flux, form, "absent", "split", tmp_path / "lora.safetensors")
    assert_adds(flux, tmp_path / "lora.safetensors", total)


@pytest.mark.parametrize("kind", [torch.int32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_is_a_number_however_it_is_stored(shape, kind, flux, tmp_path):
    total = make(flux, "c kohya", "rank", "fused", path := tmp_path / "lora.safetensors")
    stored = {n: t.to(kind).reshape(shape) if n.endswith(".alpha") else t for n, t in load_file(path).items()}
    save_file(stored, path)
    assert_adds(flux, path, total)


# ------------------------------------------------------------------------------------------------ by other programs


def lycoris(model, prefix: str, names, **settings):
    """LyCORIS's network on these modules, applied, with random weights."""
    library = pytest.importorskip("lycoris")
    preset = {"enable_conv": False, "target_module": [], "target_name": list(names), "lora_prefix": prefix}
    library.LycorisNetwork.apply_preset(preset)
    network = library.LycorisNetwork(model, **{"lora_dim": 4, "alpha": 2, **settings})
    network.apply_to()
    for seed, (name, parameter) in enumerate(network.named_parameters()):
        drawn = 0.15 * tiny.random(*parameter.shape, seed=seed)
        parameter.data = parameter * (1 + drawn) if "dora_scale" in name else drawn
    return network


ALGORITHMS = {
    "lora": {"network_module": "lora"},
    "dora": {"network_module": "lora", "weight_decompose": True},
    "lokr": {"network_module": "lokr"},
    "lokr, both in factors": {"network_module": "lokr", "lora_dim": 1, "alpha": 40, "factor": 8,
                              "decompose_both": True},
    "lokr, whole": {"network_module": "lokr", "factor": 4, "full_matrix": True, "alpha": 9},
    "lokr, rslora": {"network_module": "lokr", "rs_lora": True, "lora_dim": 3},
    "lokr with dora": {"network_module": "lokr", "weight_decompose": True},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("prefix", ["lora_unet", "lycoris"])
@torch.no_grad()
def test_file_of_lycoris_does_what_lycoris_does(prefix, algorithm, flux, oracle, tmp_path):
    fused = prefix == "lora_unet"
    model, names = (flux, BFL) if fused else (oracle, DIFFUSERS)
    network = lycoris(model, prefix, names, **ALGORITHMS[algorithm])
    assert len(network.loras) == len(names)
    given = tiny.flux_inputs(flux.config)
    theirs = flux(**given) if fused else tiny.run_flux(oracle, **given)
    network.save_weights(str(tmp_path / "lora.safetensors"), FP32, {"lycoris_config": "{}"})
    network.restore()
    base = flux(**given)
    apply_updates(flux, read_adapter(tmp_path / "lora.safetensors").updates, 1.0, FP32)
    assert error(flux(**given), theirs) < 1e-5 and error(base, theirs) > 0.05


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_dora_by_input_channel_is_refused(flux, tmp_path):
    network = lycoris(flux, "lora_unet", BFL, network_module="lora", weight_decompose=True, wd_on_out=False)
    network.save_weights(str(tmp_path / "lora.safetensors"), FP32, {})
    network.restore()
    with pytest.raises(
        ValueError, match=r"DoRA scale of shape \[1, .* each output row .*OneTrainer: lora_decompose_output_axis"
    ):
        read_adapter(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 1}, {"use_rslora": True, "rank_pattern": {"attn.to_k": 2}}])
@pytest.mark.parametrize("writer", ["pipeline", "transformer", "peft"])
@torch.no_grad()
def test_dora_of_peft_works(writer, settings, flux, oracle, tmp_path):
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 4, "use_dora": True, "target_modules": DIFFUSERS, **settings}
    config = peft.LoraConfig(**settings)
    model = peft.get_peft_model(oracle, config) if writer == "peft" else oracle.add_adapter(config)
    for seed, (name, parameter) in enumerate(oracle.named_parameters()):
        drawn = 0.15 * tiny.random(*parameter.shape, seed=seed)
        if "lora_" in name:
            parameter.data = parameter * (1 + drawn) if "magnitude" in name else drawn
    if writer == "peft":
        model.save_pretrained(tmp_path)
    elif writer == "transformer":
        oracle.save_lora_adapter(tmp_path)
    else:
        header = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        layers = peft.get_peft_model_state_dict(oracle)
        diffusers.FluxKontextPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=header)
    file = read_adapter(tmp_path)
    assert "LoRA with DoRA" in file.title
    apply_updates(flux, file.updates, 1.0, FP32)
    given = tiny.flux_inputs(flux.config)
    assert error(flux(**given), tiny.run_flux(oracle, **given)) < 1e-5


# ------------------------------------------------------------------------------------------------ at work


@torch.no_grad()
def test_swapping_adapters_leaves_no_trace(kontext, flux, tmp_path):
    given, fresh = tiny.flux_inputs(flux.config), load_flux(tiny.part(kontext, "transformer"), CPU, FP32)
    for i, form in enumerate(("c kohya", "j lycoris", "a diffusers")):
        make(flux, form, "half the rank", LAYOUTS[i > 0], tmp_path / f"{i}.safetensors")
    first, second, third = (read_adapter(tmp_path / f"{i}.safetensors").updates for i in range(3))
    base = flux(**given)
    for change in ([(first, 1.0), (third, 0.3)], [(second, 0.5)], [(third, -1.0), (second, 1.0)], []):
        for updates_, strength in change:
            apply_updates(flux, updates_, strength, FP32)
            apply_updates(fresh, updates_, strength, FP32)
        assert torch.equal(flux(**given), fresh(**given)) and torch.equal(flux(**given), base) == (not change)
        detach_all(flux)
        fresh = load_flux(tiny.part(kontext, "transformer"), CPU, FP32)


@torch.no_grad()
def test_infer_adds_up_adapters_of_several_formats(kontext, tmp_path, monkeypatch, capsys):
    flux = load_flux(tiny.part(kontext, "transformer"), CPU, FP32)
    lora = make(flux, "c kohya", "half the rank", "fused", tmp_path / "lora.safetensors")
    lokr = make(flux, "j lycoris", "half the rank", "split", tmp_path / "lokr.safetensors")
    name, scale = "double_blocks.0.img_mlp.2", 0.5
    weight = flux.get_submodule(name).weight
    a, b, m = noise((4, weight.shape[1]), FP32, 1), noise((64, 4), FP32, 2), noise((64, 1), FP32, 3).abs()
    stem = f"lora_unet_{name.replace('.', '_')}"
    dora = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.dora_scale": m}
    save_file(dora, tmp_path / "dora.safetensors")
    turned = m * (weight + b @ a) / (weight + b @ a).norm(dim=1, keepdim=True)
    deltas = {name: scale * (turned - weight)}
    for total, strength in ((lora, 0.7), (lokr, -0.4)):
        deltas |= {n: deltas.get(n, 0) + strength * delta for n, delta in total.items()}
    flags = ["--model", kontext, "--prompt", "red", "--size", "32x32", "--steps", 2, "--precision", "fp32"]
    strengths = {"lora": 0.7, "lokr": -0.4, "dora": scale}
    given = [flag for n, k in strengths.items() for flag in ("--lora", f"{tmp_path / n}.safetensors:{k}")]
    infer.main([*map(str, [*flags, "--device", "cpu", *given, "--out", tmp_path / "ours.png"])])
    for ours, delta in deltas.items():
        flux.get_submodule(ours).weight += delta
    monkeypatch.setattr(load, "load_flux", lambda *_, **more: flux)
    infer.main([*map(str, [*flags, "--device", "cpu", "--out", tmp_path / "merged.png"])])
    ours, theirs = (np.asarray(infer.Image.open(tmp_path / f"{n}.png"), dtype=float) for n in ("ours", "merged"))
    assert abs(ours - theirs).max() <= 2
    said = capsys.readouterr().out
    for title in (
        "kohya LoRA, 9 modules",
        f"lycoris LoKr, {len(DIFFUSERS)} modules",
        "kohya LoRA with DoRA, 1 modules",
    ):
        assert f"{title} at strength" in said


def test_training_starts_from_fused_modules_of_another_program(flux, tmp_path):
    total = make(flux, "c kohya", "half the rank", "fused", path := tmp_path / "lora.safetensors")
    for seed, name in enumerate(BFL):
        add_lora(flux, [theirs for theirs, (ours, _) in PLACES.items() if ours == name], 2 + seed % 3, 5)
    start_from(flux, read_adapter(path).updates)
    made = {}
    for linear, (_, here) in by_linear(list(updates(flux)), flux).items():
        made[linear.name] = torch.zeros_like(total[linear.name])
        for update in here:
            made[linear.name][update.start : update.start + update.shape[0]] += update.delta().detach()
    assert max(error(made[name], total[name]) for name in total) < 1e-6


@pytest.mark.parametrize("down, up", [(1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("ends", [KOHYA, PEFT, ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")])
def test_a_text_encoder_that_is_not_changed_is_left_out_and_said(ends, down, up, tmp_path, capsys):
    stem = "lora_te1_text_model_0_q_proj" if ends is KOHYA else "text_encoder.text_model.0.q_proj"
    idle = {f"{stem}.{ends[0]}": torch.full((4, 64), down), f"{stem}.{ends[1]}": torch.full((64, 4), up)}
    idle |= {f"{stem}.alpha": torch.tensor(4.0), "text_encoders.t5xxl.x.lora_up.weight": torch.zeros(8, 4).to(FP8)}
    save_file(GOOD | idle, path := tmp_path / "lora.safetensors")
    (update,) = read_adapter(path).updates
    assert update.name == "double_blocks.0.img_attn.proj"
    assert capsys.readouterr().out == f"{path}: 4 tensors of a text encoder are left out, all zero\n"


@torch.no_grad()
def test_names_of_peft_below_the_pipelines_prefix_are_read(flux, tmp_path):
    total = make(flux, "a diffusers", "half the rank", "split", path := tmp_path / "lora.safetensors")
    tiny.rewrite(path, lambda ts: {n.replace("transformer.", "transformer.base_model.model.", 1): ts[n] for n in ts})
    assert_adds(flux, path, total)


# ------------------------------------------------------------------------------------------------ refused


Q, K = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_proj"


def pair(stem: str, rank: int = 4, inputs: int = 64, rows: int = 64, endings=KOHYA) -> dict[str, torch.Tensor]:
    return {f"{stem}.{endings[0]}": torch.ones(rank, inputs), f"{stem}.{endings[1]}": torch.ones(rows, rank)}


def header_of(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


HUGE = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}).encode()
GOOD = pair(K)
TE = pair("lora_te1_text_model_encoder_layers_0_self_attn_q_proj")
LOKR = {f"{K}.lokr_w1": torch.ones(2, 2), f"{K}.lokr_w2_a": torch.ones(32, 4), f"{K}.lokr_w2_b": torch.ones(4, 32)}
TO_Q, TO_K = pair("transformer.transformer_blocks.0.attn.to_q"), pair("lora_unet_transformer_blocks_0_attn_to_k")
ENDS = {
    "proj.lora_A.weight": (4, 64),
    "proj.lora_B.weight": (64, 4),
    "proj.lora_B.bias": (64,),
    "norm.key_norm.scale": (8,),
}
CONTROL = {f"double_blocks.{i}.img_attn.{end}": torch.ones(shape) for i in range(3) for end, shape in ENDS.items()}
PISSA = json.dumps({"transformer.init_lora_weights": "pissa_niter_4"})
BROKEN = {  # what is in the file: tensors, tensors with a header, or bytes -> what is said
    "truncated": (struct.pack("<Q", 900) + b'{"a":', "not a complete safetensors file"),
    "nothing in it": (b"", "not a complete safetensors file"),
    "web page": (b"<!DOCTYPE html><html>Access denied</html>", "not a complete safetensors file"),
    "pickle renamed": ("pickle", "is a pickle, which can run code"),
    "old pickle renamed": ("old pickle", "is a pickle, which can run code"),
    "header bomb": (header_of(b"{}", 2**60), "not a complete safetensors file"),
    "huge shape": (header_of(HUGE) + bytes(8), "not a complete safetensors file"),
    "nested header": (header_of(b'{"a":' + b"[" * 99999), "not a complete safetensors file"),
    "no tensors": ({}, "is no LoRA: it has no tensors"),
    "not a LoRA": ({"model.layers.0.weight": torch.ones(2)}, "is no LoRA: it has model.layers.0.weight"),
    "a whole model": ({"img_in.weight": torch.ones(2, 2), "img_in.bias": torch.ones(2)}, "is no LoRA.*whole model"),
    "LoRA of SDXL": (pair("lora_unet_down_blocks_1_attentions_0_proj_in"), "none is of a module of FLUX.*_proj_in"),
    "wrong prefix": (pair("unet.transformer_blocks.0.attn.to_q"), "none is of a module of FLUX.*unet.transformer_bl"),
    "mixed formats": (GOOD | TO_Q, "2 tensors do not belong to a .*lora_unet"),
    "fused and its part": (GOOD | pair(Q, rows=192) | TO_K, "2 tensors do not belong.*attn_to_k.lora_down"),
    "two spellings": (GOOD | pair(K, endings=PEFT), f"{K}.lora_A.weight and {K}.lora_down.weight are the same"),
    "left-over key": (GOOD | {f"{Q}.lora_down.scale_weight": torch.ones(1)}, "1 tensors do not belong.*scale_weight"),
    "missing half": (GOOD | {f"{Q}.lora_up.weight": torch.ones(192, 4)}, f"{Q} has lora_B; it needs lora_A and lora_B"),
    "rank mismatch": (GOOD | {f"{K}.lora_up.weight": torch.ones(64, 5)}, f"{K} has lora_A .*do not share a rank"),
    "NaN": ({**GOOD, f"{K}.lora_up.weight": torch.full((64, 4), float("nan"))}, f"{K} holds NaN or infinity in lora_B"),
    "infinite alpha": (GOOD | {f"{K}.alpha": torch.tensor(9999999999.0).half()}, f"{K} has an alpha of inf"),
    "alphas": (GOOD | {f"{K}.alpha": torch.ones(4)}, f"{K} has an alpha that cannot be .* 4 elements"),
    "rank 0": (pair(K, rank=0), f"{K} has lora_A of shape"),
    "integers": (GOOD | {f"{K}.lora_up.weight": torch.ones(64, 4).char()}, f"{K} has lora_B of shape .*int8"),
    "convolution": (GOOD | {f"{K}.lora_up.weight": torch.ones(64, 4, 1, 1)}, "do not share a rank"),
    "LoRA and LoKr": (GOOD | LOKR, f"{K} has .*lokr_w2_b, .*; it needs"),
    "LoKr without w1": ({n: t for n, t in LOKR.items() if "w2" in n}, f"{K} has lokr_w2_a, lokr_w2_b; it needs"),
    "LoKr of too many": (LOKR | {f"{K}.lokr_w2": torch.ones(32, 32)}, f"{K} has lokr_w1, lokr_w2, .*_b; it needs"),
    "infinite alpha of LoKr": (LOKR | {f"{K}.alpha": torch.tensor(float("inf"))}, f"{K} has an alpha of inf"),
    "text encoder only": (TE, "2 tensors change a text encoder.*convert --transformer-only leaves them out.*lora_te1"),
    "text encoder too": (GOOD | TE, "2 tensors change a text encoder, which is not done here.*lora_te1"),
    "only a text encoder that is zero": ({n: 0 * t for n, t in TE.items()}, "is no LoRA: it has no tensors"),
    "LoHa": ({f"{K}.hada_w1_a": torch.ones(64, 4)}, "1 tensors are of a LoHa.*merge it into a model where it was made"),
    "OFT": ({f"{K}.oft_blocks": torch.ones(2, 4, 4), f"{K}.alpha": torch.ones(1)}, "1 tensors are of OFT"),
    "fused": (pair("transformer.transformer_blocks.0.attn.to_qkv"), "fused by SimpleTuner's fuse_qkv_projections"),
    "fused, lycoris": (pair("lycoris_transformer_blocks_0_attn_to_added_qkv"), "2 tensors are of q, k, v fused by"),
    "difference": (GOOD | {f"{K}.diff_b": torch.ones(64)}, "1 tensors replace or add whole weights.*diff_b"),
    "LoCon": (GOOD | {f"{K}.lora_mid.weight": torch.ones(4, 4, 3, 3)}, "of a convolution's update"),
    "Control LoRA": (CONTROL, "3 tensors are of a Control LoRA of BFL, which makes another model"),
    "XLabs": ({"double_blocks.0.processor.qkv_lora1.down.weight": torch.ones(4, 64)}, "in XLabs' format"),
    "PiSSA": ((TO_Q, {"lora_adapter_metadata": PISSA}), "init_lora_weights pissa_niter_4, which cannot"),
    "LoRA-GA": ((TO_Q, {"lora_adapter_metadata": '{"init_lora_weights": "lora_ga"}'}), "init_lora_weights lora_ga, wh"),
    "settings": ((GOOD, {"lora_adapter_metadata": "[1"}), "its settings are no JSON object"),
    "recipe": ((GOOD, {"kontext_min": "3"}), "its settings are no JSON object"),
    "wrong recipe": ((GOOD, {"kontext_min": '{"steps": "many", "prompt": 5}'}), "steps 'many', prompt 5, which"),
    "no such device": ((GOOD, {"kontext_min": '{"device": "tpu"}'}), "shown with device 'tpu'"),
    "another method": ((TO_Q, {"lora_adapter_metadata": '{"transformer.peft_type": "LOHA"}'}), "with peft_type LOHA"),
    "alpha in words": ((GOOD, {"lora_adapter_metadata": '{"lora_alpha": "many"}'}), "an alpha that cannot be under"),
    "DoRA without scales": ((GOOD, {"lora_adapter_metadata": '{"use_dora": true}'}), "has no lora_magnitude_vector"),
    "wrong model size": (pair(K, inputs=3072, rows=3072), "does not fit .*proj maps 3072 to 3072 channels, the model"),
    "deeper model": (pair("lora_unet_single_blocks_37_linear2"), "does not fit .*modules that this model.*single_blo"),
}  # fmt: skip


def write(content, path: Path):
    if isinstance(content, str):
        torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=content == "pickle")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        tensors, header = content if isinstance(content, tuple) else (content, None)
        save_file(tensors, path, metadata=header)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_refused_in_one_sentence_before_anything_is_loaded(case, kontext, tmp_path, monkeypatch):
    content, sentence = BROKEN[case]
    write(content, path := tmp_path / "lora.safetensors")
    for loader in ("load_t5", "load_clip", "load_vae", "load_flux"):
        monkeypatch.setattr(f"kontext_min.checkpoints.load.{loader}", None)
    arguments = ["--model", kontext, "--prompt", "x", "--lora", path, "--device", "cpu", "--out", tmp_path / "out.png"]
    monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as refusal:  # as the command line has it: a sentence as exit code is exit code 1
        runpy.run_path(infer.__file__, run_name="__main__")
    said = refusal.value.code
    assert isinstance(said, str) and said.startswith(f"infer.py: {path}") and "\n" not in said
    assert re.search(sentence, said), said


def test_names_with_underscores_are_unambiguous():
    for form in read.FORMATS.values():
        stems = read.modules(form)
        assert len(stems) == len(set(stems.values())) > 300
        assert all(form.stem(name) == stem for stem, name in stems.items())
