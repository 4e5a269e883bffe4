"""What memory a run takes: counted before, measured while it goes."""

import pytest
import tiny
import torch
from benchmarks import arms
from tiny import CPU, FP32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kontext_min.adapters.inject import TARGETS, add_lokr, add_lora, matching_modules
from kontext_min.adapters.layers import Kronecker
from kontext_min.checkpoints.load import load_flux, load_vae
from kontext_min.memory import GB, apply_checkpointing, attention_kernels, held, in_use, inputs, predicted, size_of
from kontext_min.quantize import open_flux

POLICIES = ("block", "keep_attn", "keep_gemm")


def test_memory_in_use_grows_by_what_is_held():
    before = in_use(CPU)
    held = torch.ones(50_000_000)
    after = in_use(CPU)
    assert after["memory"] - before["memory"] == pytest.approx(0.2, abs=0.03)
    assert held.sum() and before["memory_limit"] == after["memory_limit"] > after["memory"]


def test_the_size_of_a_quantised_tensor_is_that_of_its_parts():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = nn.Sequential(nn.Linear(1024, 256, bias=False, dtype=torch.bfloat16))
    assert size_of(linear[0].weight) == 1024 * 256 * 2
    quantize_(linear, Int8WeightOnlyConfig())
    assert 1024 * 256 <= size_of(linear[0].weight) <= 1024 * 256 + 256 * 8


def gigabytes(lines: list[str]) -> list[float]:
    return [float(line.split()[0]) for line in lines]


def test_the_prediction_counts_weights_adapter_and_the_inputs_of_checkpointed_blocks(kontext):
    flux = load_flux(tiny.part(kontext, "transformer"), CPU, FP32).requires_grad_(False)
    vae = load_vae(tiny.part(kontext, "vae"), CPU, FP32)
    files = [
        sum(t.numel() * 4 for t in tiny.read_part(kontext / name).values()) / GB for name in ("transformer", "vae")
    ]
    tokens = 1_000_000  # of 64 channels, in 4 blocks
    parameters = sum(p.numel() for p in add_lora(flux, ["transformer_blocks.0.attn.to_q"], 16, 16))
    kept = inputs(flux, tokens, FP32)
    lines = predicted(held(flux, 1000, FP32) | kept, vae, True)
    transformer, adapter, activations, autoencoder, total = gigabytes(lines)
    assert [transformer, autoencoder] == pytest.approx(files, abs=0.0006)
    assert [adapter, activations] == pytest.approx([parameters * 1000 / GB, 4 * 64 * 4 * tokens / GB], abs=0.0006)
    assert total == pytest.approx(sum([*files, adapter, activations]), abs=0.003)
    assert "what one block computes: measured" in lines[-1]
    plain = predicted(held(flux, 0, FP32), vae, False)
    assert len(plain) == 4 and "all that is kept for backward" in plain[-1]


# ------------------------------------------------------------------------------------------------ recompute


def gradients(flux, wanted: int | None) -> list[torch.Tensor]:
    """Of every parameter that is trained."""
    for parameter in flux.parameters():
        parameter.grad = None
    out = flux(**tiny.flux_inputs(flux.config), wanted=wanted)
    torch.manual_seed(1)
    (out[:, :12] * tiny.random(*out[:, :12].shape, seed=7)).sum().backward()
    return [p.grad for p in flux.parameters() if p.requires_grad]


ADAPTERS = {  # module patterns and kind
    "LoRA": (TARGETS["all+ffs"], {}),
    "DoRA": (TARGETS["all+ffs"], {"dora": True}),
    "LoKr": (TARGETS["all+ffs"], {"lokr": True}),
    "LoRA on the modulation too": (TARGETS["ai-toolkit"], {}),
    "LoRA on q and v": (("to_q", "to_v"), {}),
}


@pytest.mark.parametrize("base", ["no_change", "int8-torchao", "nf4", "int8-dynamic"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_policy_gives_the_same_gradients_to_the_last_bit(kontext, adapter, base, tmp_path):
    patterns, kind = ADAPTERS[adapter]
    found = []
    for policy in (None, *POLICIES):
        flux = open_flux(tiny.part(kontext, "transformer"), CPU, FP32, base, tmp_path)
        flux.requires_grad_(False)
        torch.manual_seed(0)
        names = matching_modules(flux.config, patterns)
        lokr = kind.get("lokr")
        add = add_lokr(flux, names, Kronecker(4, dim=3)) if lokr else add_lora(flux, names, 4, 4, dora=bool(kind))
        for i, parameter in enumerate(add):
            parameter.data += 0.1 * tiny.random(*parameter.shape, seed=i)
        if policy:
            apply_checkpointing(flux, policy)
        found.append(gradients(flux, 12))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_the_tokens_that_nobody_wants_change_no_gradient(kontext):
    flux = load_flux(tiny.part(kontext, "transformer"), CPU, FP32).requires_grad_(False)
    add_lora(flux, matching_modules(flux.config, TARGETS["all+ffs"]), 4, 4)
    given = tiny.flux_inputs(flux.config)
    with torch.no_grad():
        torch.testing.assert_close(flux(**given, wanted=12), flux(**given)[:, :12], rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(flux, 12), gradients(flux, None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def flops():
    """GEMM FLOPs of a training step of the benchmark's small shape, without computing it, as shares of the peer's."""
    pytest.importorskip("peft")
    counts = {}
    for name in ("peer", *POLICIES, "none"):
        with torch.device("meta"):
            model = arms.arm(name, arms.SMALL.config)
        given = {key: value.to("meta") for key, value in arms.inputs(arms.SMALL, FP32).items()}
        counts[name] = arms.gemm_flops(model, given)
    return {name: count / counts["peer"] for name, count in counts.items()}


def test_a_step_has_fewer_flops_than_diffusers_and_pefts(flops):
    assert flops["block"] <= 0.86 and flops["keep_attn"] == flops["block"]
    assert flops["none"] < flops["keep_gemm"] <= 0.66


def without_memory(name: str) -> nn.Module:
    """An arm of the benchmark at full size, of tensors that have a shape and no memory. Inside FakeTensorMode."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = arms.arm(name, arms.FULL.config)
    finally:
        torch.set_default_dtype(FP32)
    for module in model.modules():
        for key, p in module.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=CPU), p.requires_grad))
    return model


@pytest.mark.slow  # a minute for each arm
def test_at_full_size_a_step_takes_no_more_memory_than_diffusers_and_pefts():
    pytest.importorskip("peft")
    peak = {}
    for name in ("peer", *POLICIES):
        with FakeTensorMode():
            peak[name] = arms.step_bytes(without_memory(name), arms.inputs(arms.FULL, torch.bfloat16)) / GB
    print(peak)
    assert peak["block"] <= peak["peer"] and peak["keep_attn"] < 7.8 and peak["keep_gemm"] < 30


def test_on_the_cpu_attention_has_the_kernels_that_it_always_has():
    before = torch._C._get_sdp_priority_order()
    with attention_kernels(CPU):
        assert torch._C._get_sdp_priority_order() == before
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


def test_on_hopper_alone_cudnn_comes_first_and_the_order_is_put_back(monkeypatch):
    before = torch._C._get_sdp_priority_order()
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with attention_kernels(torch.device("cuda")):
            first = torch._C._get_sdp_priority_order()[0]
        assert first == (int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION) if capability == (9, 0) else before[0])
        assert torch._C._get_sdp_priority_order() == before
