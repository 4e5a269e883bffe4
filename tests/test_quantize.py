"""The base in int8, fp8 and NF4: its arithmetic, the gradient over it, what backward keeps, and the copy on disk."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from tiny import CPU, FP32, add_lokr, add_lora, detach_all, flux_inputs, part, quantise, quantised, random
from torch import nn
from torch.utils.checkpoint import checkpoint

from kontext_min.adapters.inject import TARGETS, matching_modules, muted, updates
from kontext_min.adapters.layers import Kronecker
from kontext_min.checkpoints.load import find, load_flux
from kontext_min.encoders import TextEncoder
from kontext_min.memory import apply_checkpointing
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.presets import WEIGHTS
from kontext_min.quantize import NF4, QuantisedLinear, form_of, open_flux, quantising, refuse_on

FORMS, DYNAMIC = ["int8", "fp8", "nf4"], ["int8-dynamic", "fp8-dynamic"]
ROOT = Path(__file__).parents[1]


def linear(dtype, bias=True) -> nn.Linear:
    made = nn.Linear(128, 48, bias=bias, dtype=dtype).requires_grad_(False)
    made.weight.copy_(random(48, 128) * torch.logspace(-3, 3, 48)[:, None])  # rows of very different size
    made.weight[7] = 0
    return made


# ------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_input_gradient_are_those_of_the_dequantised_weight_to_the_last_bit(form, dtype, bias):
    original = linear(dtype, bias)
    ours, twin = quantised(original, form), nn.Linear(128, 48, bias=bias, dtype=dtype).requires_grad_(False)
    twin.load_state_dict({"weight": ours.dequantised()} | ({"bias": original.bias} if bias else {}))
    x, dy = random(2, 5, 128, seed=2).to(dtype), random(2, 5, 48, seed=3).to(dtype)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [layer(i) for layer, i in zip((ours, twin), inputs, strict=True)]
    for output in outputs:
        output.backward(dy)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(ours.dequantised(slice(5, 9)), twin.weight[5:9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_int8_weight_is_within_half_a_step_of_its_row(dtype):
    original = linear(dtype)
    int8 = quantised(original, "int8")
    step = original.weight.float().abs().amax(1, keepdim=True) / 127
    exact = int8.weight.float() * int8.scale.float()  # a bf16 scale is rounded before it is used, by up to 1/256
    assert ((exact - original.weight.float()).abs() <= step * (0.5 + (0.51 if dtype == torch.bfloat16 else 1e-4))).all()
    assert int8.weight.dtype == torch.int8 and int8.weight.abs().max() == 127
    assert not exact[7].any()


def test_every_fp8_weight_is_within_half_a_unit_of_its_3_bits():
    original = linear(FP32)
    weight, fp8 = original.weight, quantised(original, "fp8")
    assert fp8.weight.dtype == torch.float8_e4m3fn and fp8.weight.float().abs().amax(1)[0] == 448
    smallest = fp8.scale * 2**-6  # below it, numbers lie 2^-9 apart
    assert ((fp8.dequantised() - weight).abs() <= 1.001 * 2**-4 * weight.abs().maximum(smallest)).all()


@pytest.mark.parametrize("inputs", [128, 80])  # blocks of 64, and of 16
def test_every_nf4_weight_is_the_nearest_level_of_its_block(inputs):
    original = nn.Linear(inputs, 24).requires_grad_(False)
    original.weight.copy_(random(24, inputs) * torch.logspace(-3, 3, inputs))  # blocks of very different size
    nf4, size = quantised(original, "nf4"), {128: 64, 80: 16}[inputs]
    blocks = original.weight.double().unflatten(1, (-1, size))
    largest, levels = blocks.abs().amax(2, keepdim=True), torch.tensor(NF4).double()
    near = ((blocks / largest)[..., None] - levels).abs().argmin(-1)
    assert tiny.error(nf4.dequantised().view_as(blocks), levels[near] * largest) < 1e-6
    assert nf4.weight.shape == (24, inputs // 2) and nf4.weight.dtype == torch.uint8
    assert nf4.scale.shape == (24, inputs // size)


def test_nf4_is_that_of_torchao_and_of_its_definition():
    from torchao.quantization import to_nf4

    ends = [torch.special.ndtri(torch.linspace(0.9677083, 0.5, n).double())[:-1] for n in (8, 9)]
    levels = torch.cat([-ends[0], torch.zeros(1), ends[1].flip(0)]) / ends[1].max()
    torch.testing.assert_close(torch.tensor(NF4).double(), levels, rtol=0, atol=1e-6)
    made = nn.Linear(512, 256, dtype=torch.bfloat16)
    made.weight.data = (random(256, 512) * torch.logspace(-1, 0, 256)[:, None]).bfloat16()
    theirs, ours = to_nf4(made.weight.data).get_original_weight(), quantised(made, "nf4").dequantised()
    errors = [tiny.error(weight, made.weight) for weight in (ours, theirs)]
    assert errors[0] < 1.01 * errors[1] < 0.1, errors


@pytest.mark.parametrize("form, most", [("int8-dynamic", 0.025), ("fp8-dynamic", 0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_the_inputs_costs_little_and_the_gradient_comes_back_whole(form, most, dtype):
    original = linear(dtype)
    original.weight *= torch.logspace(1, -1, 48)[:, None]
    ours, x, dy = quantised(original, form), random(40, 128, seed=2).to(dtype), random(40, 48, seed=3).to(dtype)
    x.requires_grad_()
    y = ours(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == dtype
    bias = original.bias.float()
    assert tiny.error(y.float() - bias, x.float() @ original.weight.float().T) < most
    assert tiny.error(dx.float(), dy.float() @ original.weight.float()) < most
    few = x[:3]  # of which nothing is rounded
    assert torch.equal(ours(few), nn.functional.linear(few, ours.dequantised(), ours.bias))


def test_torchaos_own_w8a8_loses_the_inputs_gradient_without_a_word():
    """Why it is not used: what lies before a linear gets no gradient through it."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    original = linear(FP32)
    theirs = nn.Sequential(nn.Linear(128, 48))
    theirs[0].load_state_dict(original.state_dict())
    quantize_(theirs.requires_grad_(False), Int8DynamicActivationInt8WeightConfig())
    x = random(40, 128).requires_grad_()
    assert not theirs(x).requires_grad and quantised(original, "int8-dynamic")(x).requires_grad
    assert tiny.error(theirs(x), original(x)) < 0.05


@pytest.mark.parametrize("form", FORMS + DYNAMIC)
def test_compiled_it_is_the_same_without_a_break(form):
    ours, x = quantised(linear(FP32), form), random(20, 128).requires_grad_()
    made = [layer(x) for layer in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True))]
    torch.testing.assert_close(*made)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in made))


# ------------------------------------------------------------------------------------------------ in the transformer


def loaded(folder: Path, form: str | None = None, dtype=FP32) -> Flux:
    return load_flux(part(folder, "transformer"), CPU, dtype, then=form and quantise(form))


def twelve_blocks(form: str | None) -> Flux:
    """4 double and 8 single blocks as torch draws them."""
    sizes = {"hidden_size": 256, "num_heads": 4, "axes_dim": (8, 28, 28), "depth": 4, "depth_single_blocks": 8}
    torch.manual_seed(1)
    flux = Flux(FluxConfig(**sizes, vec_in_dim=64, context_in_dim=48)).requires_grad_(False)
    for name, _ in list(flux.named_parameters()) if form else ():
        quantise(form)(flux, name)
    return flux


def gradient(flux: Flux, names: list[str], lokr: bool = False) -> torch.Tensor:
    """All of it as one vector, with an adapter of fixed random values."""
    adapter = add_lokr(flux, names, Kronecker(8, full_matrix=True)) if lokr else add_lora(flux, names, 4, 4)
    for i, parameter in enumerate(adapter):
        parameter.data = random(*parameter.shape, seed=i) * 0.05
    inputs = flux_inputs(flux.config)
    (flux(**inputs) - random(*inputs["img"].shape, seed=9)).pow(2).mean().backward()
    return torch.cat([p.grad.flatten() for p in adapter]).double()


@pytest.mark.parametrize("form", FORMS + DYNAMIC)
@pytest.mark.parametrize("lokr", [False, True], ids=["LoRA", "LoKr"])
def test_the_adapters_gradient_points_where_it_did(form, lokr):
    names = matching_modules(twelve_blocks(None).config, TARGETS["all+ffs"])
    exact, ours = (gradient(twelve_blocks(chosen), names, lokr) for chosen in (None, form))
    assert 0.999 < torch.cosine_similarity(exact, ours, dim=0) < 1 - 1e-9


@pytest.mark.parametrize("form", FORMS + DYNAMIC)
def test_checkpointed_the_gradient_is_the_same_to_the_last_bit(kontext, form):
    plain, checkpointed = loaded(kontext, form), loaded(kontext, form)
    apply_checkpointing(checkpointed)
    names = matching_modules(plain.config, TARGETS["all+ffs"])
    assert torch.equal(gradient(checkpointed, names), gradient(plain, names))


@pytest.mark.parametrize("form, least", [("int8", 0.999), ("fp8", 0.99), ("nf4", 0.9)])
def test_over_trained_blocks_that_are_small_the_gradient_turns_more(form, least):
    """nano's 6 blocks of 192 channels: what 2.6 % and 9 % of noise in every weight do where little averages out.
    Every version of nano has its own figures, above these round bounds: 0.9995 and 0.9993 of int8, 0.9948 and 0.9927 of
    fp8 in the fifth and the sixth.
    """
    names = matching_modules(loaded(WEIGHTS / "nano").config, TARGETS["all+ffs"])
    exact, ours = (gradient(loaded(WEIGHTS / "nano", chosen), names) for chosen in (None, form))
    cosine = torch.cosine_similarity(exact, ours, dim=0).item()
    print(f"nano in {form}: cosine {cosine:.4f}")
    assert least < cosine < 1 - 1e-6


def test_nothing_but_the_blocks_is_quantised_without_their_modulation_and_biases_arrive(kontext):
    base, int8 = loaded(kontext), loaded(kontext, "int8")
    wanted = {name for name, m in base.named_modules() if isinstance(m, nn.Linear) and "_blocks." in name}
    wanted = {name for name in wanted if "mod" not in name}
    assert {name for name, m in int8.named_modules() if isinstance(m, QuantisedLinear)} == wanted
    kept = {name for name, _ in int8.named_parameters()}
    assert kept == {name for name, _ in base.named_parameters()} - {f"{name}.weight" for name in wanted}
    for name, parameter in int8.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name))
    assert not any(p.requires_grad for p in int8.parameters())


@pytest.mark.parametrize("form, each", [("int8", 1.0), ("fp8", 1.0), ("nf4", 0.531)])
def test_a_weight_of_the_published_size_takes_a_half_or_a_quarter_of_the_bytes(form, each):
    weight = nn.Linear(15360, 3072, device="meta", dtype=torch.bfloat16)
    assert sum(t.nbytes for t in quantised(weight, form).buffers()) / weight.weight.numel() == pytest.approx(
        each, abs=0.001
    )


@pytest.mark.parametrize("form", FORMS + DYNAMIC)
def test_backward_keeps_no_copy_of_a_weight(form):
    flux = loaded(WEIGHTS / "nano", form)
    add_lora(flux, matching_modules(flux.config, TARGETS["all+ffs"]), 4, 4)
    shapes = {(m.out_features, m.in_features) for m in flux.modules() if isinstance(m, QuantisedLinear)}
    shapes |= {shape[::-1] for shape in shapes}
    saved = []

    def keep(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        flux(**flux_inputs(flux.config)).sum().backward()
    assert saved and not shapes & set(saved)


def test_a_checkpointed_block_does_not_compute_its_last_product_again(monkeypatch):
    layers, products, plain = [quantised(nn.Linear(32, 32), "int8") for _ in range(3)], [], nn.functional.linear
    net = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
    monkeypatch.setattr(nn.functional, "linear", lambda *given: products.append(1) or plain(*given))
    checkpoint(net, random(4, 32).requires_grad_(), use_reentrant=False).sum().backward()
    assert len(products) == 3 + 2


def test_an_adapter_comes_off_an_int8_base_as_off_any(kontext):
    flux = loaded(kontext, "int8")
    inputs = flux_inputs(flux.config)
    with torch.no_grad():
        before = flux(**inputs)
        add_lora(flux, matching_modules(flux.config, TARGETS["all"]), 4, 4)
        for update in updates(flux):
            update.B += 0.1
        assert not torch.equal(flux(**inputs), before)
        with muted(flux):
            assert torch.equal(flux(**inputs), before)
        detach_all(flux)
        assert torch.equal(flux(**inputs), before)


# ------------------------------------------------------------------------------------------------ kept on disk

NAMES = {
    "no_change": None, "bf16": None, "fp32": None, "int8-quanto": "int8", "int8-torchao": "int8", "int8": "int8",
    "fp8-torchao": "fp8", "int8-dynamic": "int8-dynamic", "fp8-dynamic": "fp8-dynamic", "nf4": "nf4",
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp8", "fp8-torchao", "fp8-dynamic", "int8-dynamic"])
def test_what_a_device_cannot_multiply_in_is_refused(precision):
    with pytest.raises(ValueError, match=f"this mps device cannot multiply in {precision}; use int8 or nf4"):
        refuse_on(torch.device("mps"), precision)
    refuse_on(CPU, precision)


@pytest.mark.parametrize("precision", ["bf16", "no_change", "int8", "int8-torchao", "nf4"])
def test_what_every_device_can_multiply_in_is_not_refused(precision):
    assert refuse_on(torch.device("mps"), precision) is None  # and nothing is raised


def test_the_names_of_precisions_are_simpletuners():
    assert {name: form_of(name) for name in NAMES} == NAMES


def same_state(one: Flux, other: Flux):
    ones, others = one.state_dict(), other.state_dict()
    assert ones.keys() == others.keys()
    for name, tensor in ones.items():
        assert tensor.dtype == others[name].dtype
        assert torch.equal(tensor.view(torch.uint8), others[name].view(torch.uint8)), name


@pytest.mark.parametrize("layout", ["kontext", "single_files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_the_kept_base_is_the_quantised_one_to_the_last_bit(layout, dtype, form, tmp_path, request, capsys):
    checkpoint = part(request.getfixturevalue(layout), "transformer")
    first, second = (open_flux(checkpoint, CPU, dtype, form, tmp_path) for _ in range(2))
    same_state(first, second)
    same_state(first, loaded(checkpoint.folder, form, dtype))
    assert not second.training and not any(p.requires_grad for p in second.parameters())
    lines = [line for line in capsys.readouterr().out.splitlines() if "the blocks' weights in" in line]
    assert [line.count("which is made first") for line in lines] == [1, 0]
    assert len(list(tmp_path.iterdir())) == 2  # it, and the identity of the model's files


def only(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def flipped(file: Path):
    data = bytearray(file.read_bytes())
    data[-5000] ^= 1
    file.write_bytes(data)


def cut(file: Path):
    file.write_bytes(file.read_bytes()[:-100])


def swapped(file: Path):
    a, b = (f"double_blocks.{i}.img_mlp.0.weight" for i in (0, 1))
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    tiny.rewrite(file, lambda tensors: {**tensors, a: tensors[b], b: tensors[a]}, metadata)


def without_sums(file: Path):
    tiny.rewrite(file, dict)


@pytest.mark.parametrize("damage", [flipped, cut, swapped, without_sums], ids=lambda damage: damage.__name__)
def test_a_damaged_kept_base_is_made_anew_with_one_line(damage, kontext, tmp_path, capsys):
    checkpoint = part(kontext, "transformer")
    flux = open_flux(checkpoint, CPU, FP32, "nf4", tmp_path)
    whole = only(tmp_path).read_bytes()
    damage(only(tmp_path))
    capsys.readouterr()
    same_state(open_flux(checkpoint, CPU, FP32, "nf4", tmp_path), flux)
    assert capsys.readouterr().out.count(f"{only(tmp_path)} is damaged") == 1
    assert only(tmp_path).read_bytes() == whole


def test_another_form_dtype_or_model_is_another_file_and_dynamic_has_the_same(kontext, tmp_path):
    checkpoint, nano = part(kontext, "transformer"), part(WEIGHTS / "nano", "transformer")
    bases = [(checkpoint, FP32, "int8-quanto"), (checkpoint, FP32, "nf4"), (checkpoint, torch.bfloat16, "nf4")]
    for n, (model, dtype, precision) in enumerate([*bases, (nano, FP32, "nf4")], 1):
        open_flux(model, CPU, dtype, precision, tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) == n
    dynamic = open_flux(checkpoint, CPU, FP32, "int8-dynamic", tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == n
    assert all(m.dynamic for m in dynamic.modules() if isinstance(m, QuantisedLinear))


def test_nothing_half_written_stays(kontext, tmp_path, monkeypatch):
    monkeypatch.setattr("kontext_min.checkpoints.save.checksum", lambda tensor: zlib.crc32(b"") / 0)
    with pytest.raises(ZeroDivisionError):
        open_flux(part(kontext, "transformer"), CPU, FP32, "int8", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.json"]


def test_an_fp8_file_can_be_the_source_of_any_form(single_files, tmp_path):
    folder = tmp_path / "fp8"
    folder.mkdir()
    tensors = tiny.load_file(single_files / "flux1-kontext-dev.safetensors")
    names = [name for name, tensor in tensors.items() if "blocks." in name and tensor.ndim == 2]
    tensors |= {name: (tensors[name].float() * 64).to(torch.float8_e4m3fn) for name in names}
    tensors |= {name.replace("weight", "weight_scale"): torch.tensor(1 / 64) for name in names}
    tiny.save_file(tensors, folder / "flux1-kontext-dev.safetensors")
    flux = open_flux(part(folder, "transformer"), CPU, FP32, "nf4", tmp_path / "cache")
    exact = loaded(folder).get_submodule(names[0].removesuffix(".weight")).weight
    assert tiny.error(flux.get_submodule(names[0].removesuffix(".weight")).dequantised(), exact) < 0.11


# ------------------------------------------------------------------------------------------------ memory

MEASURE = """
import re, sys, threading
from pathlib import Path
import torch
from kontext_min import flow, quantize
from kontext_min.checkpoints.load import Checkpoint, find_component

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

folder, form = Path(sys.argv[1]), sys.argv[2]
peaks, read, done, before = [0], quantize.read_kept, threading.Event(), anonymous()
def watch():
    while not done.wait(0.005):
        peaks[-1] = max(peaks[-1], anonymous())
def read_kept(*arguments):
    peaks.append(0)
    return read(*arguments)
quantize.read_kept = read_kept
threading.Thread(target=watch).start()
checkpoint = Checkpoint(folder, {"transformer": find_component(folder, "transformer")}, flow.Shift())
place = (torch.device("cpu"), torch.bfloat16)
flux = quantize.open_flux(checkpoint, *place, form, folder / "kept")
done.set()
print(before, *peaks, sum(t.nbytes for t in (*flux.parameters(), *flux.buffers())))
"""  # fmt: skip


def write_sparse_transformer(file: Path, **depths: int):
    """A single file at full width whose weights, all of them zero, take no room on the disk."""
    with torch.device("meta"):
        tensors = Flux(FluxConfig(**depths)).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [end, end := end + 2 * tensor.numel()]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_quantising_takes_less_than_1_gb_and_loading_less_than_1_gb_beyond_the_model(form, tmp_path):
    """A sixth of the published size, which peaks as the whole does: one tensor is in memory at a time."""
    write_sparse_transformer(tmp_path / "flux1-kontext-dev.safetensors", depth=3, depth_single_blocks=6)
    run = [sys.executable, "-c", MEASURE, str(tmp_path), form]
    environment = {**os.environ, "PYTHONPATH": "."}
    output = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout
    before, making, loading, model = (int(value) / 1e9 for value in output.splitlines()[-1].split())
    print(f"{form}: before {before:.2f} GB, making {making:.2f} GB, loading {loading:.2f} GB, model {model:.2f} GB")
    assert making < 1 and loading - model < 1


@pytest.mark.parametrize("precision, most", [("int8-torchao", 0.02), ("nf4", 0.2)])
def test_t5s_linears_are_quantised_as_they_load_and_nothing_else(precision, most):
    model, prompts = find(WEIGHTS / "nano"), ["make the red circle blue", "flip the picture"]
    exact = dict(zip(prompts, map(TextEncoder(model, CPU, FP32), prompts), strict=True))
    encoder = TextEncoder(model, CPU, FP32, quantising(precision))
    plain = [name for name, module in encoder.t5.named_modules() if isinstance(module, nn.Linear)]
    assert not plain and sum(isinstance(module, QuantisedLinear) for module in encoder.t5.modules()) == 2 * 7
    assert encoder.t5.shared.weight.dtype == FP32 and any(isinstance(m, nn.Linear) for m in encoder.clip.modules())
    for prompt, (txt, vec) in exact.items():
        ours, same = encoder(prompt)
        assert 0 < tiny.error(ours, txt) < most and torch.equal(vec, same)
