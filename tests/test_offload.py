"""What a GPU need not hold changes no bit: modulation elsewhere, inputs and weights that come and go."""

import pytest
import tiny
import torch
from tiny import CPU, FP32

from kontext_min import offload
from kontext_min.adapters.inject import TARGETS, add_lora, matching_modules
from kontext_min.memory import apply_checkpointing
from kontext_min.quantize import is_quantised, open_flux


def chosen(name: str) -> bool:
    return is_quantised(name) and not offload.is_modulation(name)


def gradients(kontext, cache, precision, target, policy, parts) -> list[torch.Tensor]:
    """Of three steps of a model with these parts of it elsewhere; their outputs, too."""
    flux = open_flux(tiny.part(kontext, "transformer"), CPU, FP32, precision, cache, only=chosen)
    made = {}
    if "modulation" in parts:
        made["modulation"] = offload.Modulation(flux, CPU)
    torch.manual_seed(0)
    for i, parameter in enumerate(add_lora(flux, matching_modules(flux.config, TARGETS[target]), 4, 4)):
        parameter.data += 0.1 * tiny.random(*parameter.shape, seed=i)
    if policy:
        apply_checkpointing(flux, policy)
    if "inputs" in parts:
        made["inputs"] = offload.Inputs(flux, CPU)
    found = []
    for step in range(3):
        given = tiny.flux_inputs(flux.config)
        given["timesteps"] = given["timesteps"] * 0.9**step
        out = flux(**given, wanted=12)
        (out * tiny.random(*out.shape, seed=step)).sum().backward()
        found.append(out.detach())
    if "inputs" in parts:
        assert made["inputs"].count and not made["inputs"].kept and not made["inputs"].coming
    return found + [p.grad for p in flux.parameters() if p.requires_grad]


PARTS = [("modulation",), ("inputs",), ("modulation", "inputs")]


@pytest.mark.parametrize("precision", ["no_change", "int8-torchao", "nf4", "int8-dynamic"])
@pytest.mark.parametrize("target, policy", [("all+ffs", "block"), ("ai-toolkit", "keep_attn"), ("all", "keep_gemm")])
def test_what_is_elsewhere_changes_no_bit(kontext, tmp_path, monkeypatch, precision, target, policy):
    monkeypatch.setattr(offload, "LARGE", 0)
    plain = gradients(kontext, tmp_path, precision, target, policy, ())
    for parts in PARTS:
        other = gradients(kontext, tmp_path, precision, target, policy, parts)
        assert len(plain) == len(other)
        if target == "ai-toolkit" and "modulation" in parts:  # with a LoRA on it, sums are in another order
            most = 0.05 if "dynamic" in precision else 1e-5  # inputs that are then rounded to 8 bits make steps
            assert max(tiny.error(a, b) for a, b in zip(other, plain, strict=True)) < most
        else:
            assert all(map(torch.equal, plain, other)), parts
