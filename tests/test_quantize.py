"""The base in int8: the arithmetic is that of the dequantised weight, and the LoRA's gradient hardly turns."""

from pathlib import Path

import pytest
import torch
from tiny import CPU, FP32, flux_inputs, part, random
from torch import nn

from kontext_min.adapters.inject import TARGETS, add_lora, detach_all, matching_modules, muted, updates
from kontext_min.checkpoints.load import load_flux
from kontext_min.memory import apply_checkpointing
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.presets import WEIGHTS
from kontext_min.quantize import Int8Linear, dequantise, quantize_int8


def linear(dtype, bias=True) -> nn.Linear:
    made = nn.Linear(64, 48, bias=bias, dtype=dtype).requires_grad_(False)
    made.weight.copy_(random(48, 64) * torch.logspace(-3, 3, 48)[:, None])  # rows of very different size
    made.weight[7] = 0
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_input_gradient_are_those_of_the_dequantised_weight_to_the_last_bit(dtype, bias):
    original = linear(dtype, bias)
    int8, twin = Int8Linear(original), nn.Linear(64, 48, bias=bias, dtype=dtype).requires_grad_(False)
    twin.load_state_dict({"weight": dequantise(int8.weight, int8.scale)} | ({"bias": original.bias} if bias else {}))
    x, dy = random(2, 5, 64, seed=2).to(dtype), random(2, 5, 48, seed=3).to(dtype)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [layer(i) for layer, i in zip((int8, twin), inputs, strict=True)]
    for output in outputs:
        output.backward(dy)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_within_half_a_step_of_its_row(dtype):
    original = linear(dtype)
    int8 = Int8Linear(original)
    step = original.weight.float().abs().amax(1, keepdim=True) / 127
    exact = int8.weight.float() * int8.scale.float()  # a bf16 scale is rounded before it is used, by up to 1/256
    assert ((exact - original.weight.float()).abs() <= step * (0.5 + (0.51 if dtype == torch.bfloat16 else 1e-4))).all()
    assert int8.weight.dtype == torch.int8 and int8.weight.abs().max() == 127
    assert not exact[7].any()


def loaded(folder: Path, dtype=FP32, **options) -> Flux:
    return load_flux(part(folder, "transformer"), CPU, dtype, **options)


def lora_gradient(flux: Flux, names: list[str]) -> torch.Tensor:
    """All of it as one vector, with an adapter of fixed random values."""
    add_lora(flux, names, 4, 4)
    for i, update in enumerate(updates(flux)):
        update.A.data, update.B.data = random(*update.A.shape, seed=i) * 0.1, random(*update.B.shape, seed=-i) * 0.02
    inputs = flux_inputs(flux.config)
    (flux(**inputs) - random(*inputs["img"].shape, seed=9)).pow(2).mean().backward()
    return torch.cat([p.grad.flatten() for update in updates(flux) for p in update.parameters()])


@pytest.mark.parametrize("model", ["tiny", "nano"])
def test_the_loras_gradient_points_where_it_did(kontext, model):
    folder = kontext if model == "tiny" else WEIGHTS / "nano"
    base = loaded(folder)
    names = matching_modules(base.config, TARGETS["all+ffs"])
    exact = lora_gradient(base, names)
    int8 = lora_gradient(loaded(folder, then=quantize_int8), names)
    cosine = torch.cosine_similarity(exact, int8, dim=0).item()
    print(f"{model}: cosine {cosine:.6f}")
    assert 0.999 < cosine < 1 - 1e-9
    checkpointed = loaded(folder, then=quantize_int8)
    apply_checkpointing(checkpointed)
    assert torch.equal(lora_gradient(checkpointed, names), int8)


def test_nothing_but_the_blocks_is_quantised_and_biases_arrive(kontext):
    base, int8 = loaded(kontext), loaded(kontext, then=quantize_int8)
    wanted = {name for name, m in base.named_modules() if isinstance(m, nn.Linear) and "_blocks." in name}
    assert {name for name, m in int8.named_modules() if isinstance(m, Int8Linear)} == wanted
    kept = {name for name, _ in int8.named_parameters()}
    assert kept == {name for name, _ in base.named_parameters()} - {f"{name}.weight" for name in wanted}
    for name, parameter in int8.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name))
    assert not any(p.requires_grad for p in int8.parameters())


def test_the_published_sizes_take_half_the_bytes():
    with torch.device("meta"):
        flux = Flux(FluxConfig()).to(torch.bfloat16)
    sizes = []
    for _ in range(2):
        sizes.append(sum(t.numel() * t.element_size() for t in (*flux.parameters(), *flux.buffers())))
        for name in [name for name, _ in flux.named_parameters()]:
            quantize_int8(flux, name)
    assert sizes[0] == 2 * 11_901_408_320
    assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.01), sizes


def test_backward_keeps_no_copy_of_a_weight():
    flux = loaded(WEIGHTS / "nano", then=quantize_int8)
    names = matching_modules(flux.config, TARGETS["all+ffs"])
    add_lora(flux, names, 4, 4)
    shapes = {m.weight.shape for m in flux.modules() if isinstance(m, Int8Linear)}
    shapes |= {shape[::-1] for shape in shapes}
    saved = []

    def keep(tensor):
        saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        flux(**flux_inputs(flux.config)).sum().backward()
    assert {dtype for shape, dtype in saved if shape in shapes} == {torch.int8}


def test_an_adapter_comes_off_an_int8_base_as_off_any(kontext):
    flux = loaded(kontext, then=quantize_int8)
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
