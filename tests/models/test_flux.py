"""The transformer against diffusers' FluxTransformer2DModel, and its golden numbers."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import CPU, FP32, error, flux_inputs, random, run_flux

from kontext_min.checkpoints.load import load_flux
from kontext_min.models import flux as flux_module
from kontext_min.models.flux import Flux, FluxConfig, apply_rope, rope_angles, timestep_embedding

SIZES = {
    "tiny kontext": {},
    "schnell": {"guidance_embeds": False, "num_layers": 1, "num_single_layers": 3},
    "narrow heads": {"num_attention_heads": 5, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
    "kontext heads": {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128,
                      "axes_dims_rope": (16, 56, 56)},
    "no double blocks": {"num_layers": 0, "joint_attention_dim": 32, "pooled_projection_dim": 24, "in_channels": 16},
}  # fmt: skip


def both(folder, dtype=FP32, change=lambda oracle: None, **settings):
    """diffusers' model and ours, read from the files that it wrote."""
    oracle = tiny.flux(**settings)
    change(oracle)
    oracle.save_pretrained(folder / "transformer", max_shard_size="100KB")
    return oracle.to(dtype), load_flux(tiny.part(folder, "transformer"), CPU, dtype)


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_transformer_equals_diffusers(name, tmp_path):  # trap 1, trap 4, trap 11, trap 12
    oracle, ours = both(tmp_path, **SIZES[name])
    given = flux_inputs(ours.config)
    assert error(ours(**given), run_flux(oracle, **given)) < 1e-5


@torch.no_grad()
def test_bf16_equals_diffusers_where_t_and_guidance_are_exact_in_bf16(tmp_path):  # trap 5
    """diffusers rounds 1000 t to bf16, in steps of 4; we do not. So t and guidance are ones that bf16 holds."""
    oracle, ours = both(tmp_path, torch.bfloat16)
    given = flux_inputs(ours.config, torch.bfloat16, t=(0.5, 0.25), guidance=(2.0, 2.0))
    assert error(ours(**given), run_flux(oracle, **given)) < 0.02


def small_streams(oracle):
    """Streams of about 1e-3 before the first block, where an eps of 1e-6 matters."""
    for linear in (oracle.x_embedder, oracle.context_embedder):
        linear.weight.data *= 1e-3
        linear.bias.data.zero_()


@torch.no_grad()
def test_layer_norm_has_an_eps_of_1e_minus_6(tmp_path):  # trap 8
    oracle, ours = both(tmp_path, change=small_streams)
    given = flux_inputs(ours.config)
    expected = run_flux(oracle, **given)
    assert error(ours(**given), expected) < 1e-5
    for module in ours.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    assert error(ours(**given), expected) > 1e-3


def test_rms_norm_of_queries_has_an_eps_of_1e_minus_6():  # trap 8
    norm, x = flux_module.RMSNorm(8), 1e-3 * random(3, 8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert error(norm(x), expected) < 1e-6


def halves_not_swapped(flux, given, patch):  # trap 1
    for tensor in (flux.final_layer.adaLN_modulation[1].weight, flux.final_layer.adaLN_modulation[1].bias):
        tensor.data = torch.cat(tensor.data.chunk(2)[::-1])


def guidance_not_times_1000(flux, given, patch):  # trap 4
    given["guidance"] = given["guidance"] / 1000


def time_times_1000_twice(flux, given, patch):  # trap 4
    given["timesteps"] = given["timesteps"] * 1000


def sine_before_cosine(flux, given, patch):  # trap 4
    patch.setattr(flux_module, "timestep_embedding", lambda s: timestep_embedding(s).roll(128, -1))


def erf_gelu(flux, given, patch):  # trap 8
    for module in flux.modules():
        if isinstance(module, torch.nn.GELU):
            module.approximate = "none"


def rotate_half(flux, given, patch):  # trap 11
    def rotated(x, pe):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * pe.real - second * pe.imag, first * pe.imag + second * pe.real], dim=-1)

    patch.setattr(flux_module, "apply_rope", rotated)


def heads_outside_qkv(flux, given, patch):  # trap 12
    for block in flux.double_blocks:
        rows = block.img_attn.qkv.weight.data.unflatten(0, (3, flux.config.num_heads, -1))
        block.img_attn.qkv.weight.data = rows.transpose(0, 1).reshape(block.img_attn.qkv.weight.shape)


def mlp_before_qkv(flux, given, patch):  # trap 12
    for block in flux.single_blocks:
        block.linear1.weight.data = block.linear1.weight.data.roll(flux.config.mlp_hidden, 0)


def reference_ids_of_the_target(flux, given, patch):  # trap 2
    given["img_ids"] = given["img_ids"] * torch.tensor([0, 1, 1])


MISTAKES = {
    halves_not_swapped: 0.1, guidance_not_times_1000: 0.1, time_times_1000_twice: 0.1, sine_before_cosine: 0.1,
    erf_gelu: 5e-5, rotate_half: 0.01, heads_outside_qkv: 0.01, mlp_before_qkv: 0.1, reference_ids_of_the_target: 0.01,
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
@torch.no_grad()
def test_parity_would_notice(mistake, tmp_path, monkeypatch):
    oracle, ours = both(tmp_path)
    given = flux_inputs(ours.config)
    expected = run_flux(oracle, **given)
    mistake(ours, given, monkeypatch)
    assert error(ours(**given), expected) > MISTAKES[mistake]


def test_timestep_embedding_is_the_golden_one():  # trap 4
    golden = torch.tensor([-0.883849, 0.945946, 0.998557, -0.467772, 0.324325, 0.053705])
    for half in (torch.tensor([0.5]), torch.tensor([0.5], dtype=torch.bfloat16)):
        assert torch.allclose(timestep_embedding(half)[0, [0, 1, 127, 128, 129, 255]], golden, atol=2e-6)


def test_rope_angles_are_the_golden_ones():  # trap 11
    pe = rope_angles(torch.tensor([[1.0, 97.0, 41.0]]), (16, 56, 56), 10_000)
    index = [0, 1, 7, 8, 9, 36, 37, 63]
    golden_cos = [0.540302, 0.950415, 1.0, -0.925148, 0.768392, -0.987339, -0.331618, 0.999984]
    golden_sin = [0.841471, 0.310984, 0.000316, 0.379608, 0.63998, -0.158623, -0.943414, 0.005697]
    assert torch.allclose(pe.real[0, index], torch.tensor(golden_cos), atol=1e-6)
    assert torch.allclose(pe.imag[0, index], torch.tensor(golden_sin), atol=1e-6)


def test_rope_angles_are_computed_in_fp64():  # trap 11
    """In fp32 the cosines would be off by up to 5e-6 at far positions."""
    position = torch.arange(256.0)
    cos = rope_angles(torch.stack([position] * 3, dim=1), (16, 56, 56), 10_000).real
    omega = torch.tensor([math.pow(10_000, -2 * j / 56) for j in range(28)], dtype=torch.float64)
    assert (cos[:, 8:36] - torch.cos(position.double()[:, None] * omega)).abs().max() < 2e-7


def test_rotated_query_is_the_golden_one():  # trap 11
    q = (torch.arange(128) / 128).view(1, 1, 1, 128)
    rotated = apply_rope(q, rope_angles(torch.tensor([[1.0, 97.0, 41.0]]), (16, 56, 56), 10_000)).flatten()
    golden = {0: [-0.006574, 0.004221, 0.007562, 0.027134], 16: [-0.16606, -0.07542, 0.013058, 0.204055],
              72: [-0.464914, -0.652317, 0.361065, -0.739718]}  # fmt: skip
    for start, values in golden.items():
        assert torch.allclose(rotated[start : start + 4], torch.tensor(values), atol=1e-6)


def test_text_tokens_are_not_rotated():
    q = random(1, 2, 3, 32)
    assert torch.equal(apply_rope(q, rope_angles(torch.zeros(3, 3), (4, 14, 14), 10_000)), q)


def test_gelu_is_the_tanh_form():
    x = torch.linspace(-4, 4, 101)
    block = flux_module.feed_forward(1, 1)
    assert torch.equal(block[1](x), F.gelu(x, approximate="tanh"))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="sum.axes_dim"):
        FluxConfig(axes_dim=(16, 56, 64))


def test_kontext_has_11_901_408_320_parameters_in_780_tensors():
    with torch.device("meta"):
        flux = Flux(FluxConfig())
    assert (sum(p.numel() for p in flux.parameters()), len(flux.state_dict())) == (11_901_408_320, 780)
