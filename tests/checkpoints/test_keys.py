"""Names and shapes of the full-size models, on `meta`, against the tables of the published files."""

import json

import pytest
import tiny
import torch

from kontext_min.checkpoints import keys
from kontext_min.models.clip import CLIPConfig, CLIPText
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.models.t5 import T5Config, T5Encoder
from kontext_min.models.vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def full():
    """The full-size models: no memory, only names and shapes."""
    with torch.device("meta"):
        return {
            "flux": Flux(FluxConfig()),
            "vae": VAE(VAEConfig()),
            "t5": T5Encoder(T5Config()),
            "clip": CLIPText(CLIPConfig()),
        }


def shapes(tensors) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def column(name: str, kind: str) -> dict[str, list[int]]:
    return {row[f"{kind}_name"]: json.loads(row[f"{kind}_shape"]) for row in tiny.table(name)}


def in_diffusers(module, table) -> dict:
    return {n: t for ours, tensor in module.state_dict().items() for n, t in table[ours].disassemble(tensor).items()}


def test_transformer_is_that_of_the_single_file(full):
    assert shapes(full["flux"].state_dict()) == column("transformer_map", "bfl")


def test_transformer_is_that_of_the_diffusers_folder(full):
    found = in_diffusers(full["flux"], keys.flux_diffusers(FluxConfig()))
    assert shapes(found) == column("transformer_map", "diffusers") and len(found) == 1160


def test_autoencoder_is_that_of_the_single_file(full):
    assert shapes(full["vae"].state_dict()) == column("vae_map", "bfl")


def test_autoencoder_is_that_of_the_diffusers_folder(full):
    table = keys.vae_diffusers(VAEConfig(), list(full["vae"].state_dict()))
    assert shapes(in_diffusers(full["vae"], table)) == column("vae_map", "diffusers")


def test_t5_is_that_of_both_layouts(full):
    rows = tiny.table("t5_tensors")
    assert all(row["in_comfy_t5xxl"] == "yes" for row in rows)
    in_folder = {row["name"]: json.loads(row["shape"]) for row in rows if row["in_hf_sharded"] == "yes"}
    assert shapes(full["t5"].state_dict()) == in_folder
    assert {row["name"] for row in rows} - set(in_folder) == {"encoder.embed_tokens.weight"}


def test_clip_is_that_of_both_layouts(full):
    table = {row["name_in_file"]: json.loads(row["shape"]) for row in tiny.table("clip_l_tensors")}
    assert shapes(full["clip"].state_dict()) == table


def test_every_slice_of_a_fused_linear_lands_where_the_table_says():  # trap 12
    """Every diffusers tensor is filled with its own number; the fused one must hold these numbers in these rows."""
    config = FluxConfig(hidden_size=32, num_heads=2, axes_dim=(4, 6, 6), depth=1, depth_single_blocks=1)
    tensors, number = {}, 0.0
    for source in keys.flux_diffusers(config).values():
        for name, rows in zip(source.names, source.rows or (16,), strict=True):
            tensors[name] = torch.full((rows,), number := number + 1)
    expected = tiny.single_file(tensors, tiny.table("transformer_map"))
    for ours, source in keys.flux_diffusers(config).items():
        if source.form == "same":
            assert torch.equal(source.assemble([tensors[name] for name in source.names]), expected[ours]), ours


def test_halves_of_the_last_modulation_change_places():  # trap 1
    source = keys.flux_diffusers(FluxConfig())["final_layer.adaLN_modulation.1.bias"]
    theirs = torch.arange(6144)
    assert torch.equal(source.assemble([theirs]), torch.cat([theirs[3072:], theirs[:3072]]))
    assert [name for name, s in keys.flux_diffusers(FluxConfig()).items() if s.form == "swapped"] == [
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.bias",
    ]


def test_assemble_is_the_inverse_of_disassemble():  # trap 1
    config = FluxConfig(hidden_size=32, num_heads=2, axes_dim=(4, 6, 6), depth=1, depth_single_blocks=1)
    flux, vae = tiny.randomise(Flux(config)), tiny.randomise(VAE(VAEConfig(channels=(32, 64), layers_per_block=1)))
    tables = (keys.flux_diffusers(config), keys.vae_diffusers(vae.config, list(vae.state_dict())))
    for module, table in zip((flux, vae), tables, strict=True):
        for name, tensor in module.state_dict().items():
            parts = table[name].disassemble(tensor)
            assert torch.equal(table[name].assemble([parts[n] for n in table[name].names]), tensor), name


def test_no_linear_of_the_transformer_is_missing_from_the_table(full):
    linears = [name for name, module in full["flux"].named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(linears) == sorted(keys.flux_linears(FluxConfig()))
