"""What memory a run takes: counted before, measured while it goes."""

import pytest
import tiny
import torch
from tiny import CPU, FP32
from torch import nn

from kontext_min.adapters.inject import add_lora
from kontext_min.checkpoints.load import load_flux, load_vae
from kontext_min.memory import GB, held, in_use, inputs, predicted, size_of


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
    assert len(plain) == 4 and "all activations (gradient_checkpointing is off)" in plain[-1]
