"""LoRA files: what peft writes works here, what we write works in diffusers, and nothing is used by half."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from tiny import CPU, FP32, add_lora, detach_all, error, run_flux

from kontext_min.adapters.inject import apply_updates, updates
from kontext_min.adapters.read import read_adapter
from kontext_min.adapters.write import write_adapter
from kontext_min.checkpoints.keys import flux_linears
from kontext_min.checkpoints.load import load_flux
from kontext_min.models.flux import FluxConfig

TINY = FluxConfig(hidden_size=64, num_heads=2, axes_dim=(4, 14, 14), depth=2, depth_single_blocks=2)
LINEARS = [part.name for parts in flux_linears(TINY).values() for part in parts]
KINDS = [name for name in LINEARS if "blocks.0" not in name]  # one of every kind: the top level and the last blocks
WRITERS = ("pipeline", "transformer", "peft")


@pytest.fixture(scope="module")
def flux(kontext):
    """Ours; every test takes its updates off again."""
    return load_flux(tiny.part(kontext, "transformer"), CPU, FP32)


@pytest.fixture(autouse=True)
def clean(flux):
    yield
    detach_all(flux)


@pytest.fixture
def oracle(kontext):
    """diffusers' model of the same weights, without adapters."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FluxTransformer2DModel.from_pretrained(kontext / "transformer", dtype=FP32)


def add_random_lora(oracle, **settings):
    """Give diffusers' model an adapter by peft, with random A and B."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": LINEARS, **settings})
    oracle.add_adapter(config)
    fill_adapter(oracle)
    return config


def fill_adapter(oracle):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in oracle.named_parameters():
        if "lora_" in name:
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)


def save(oracle, config, folder: Path, writer: str = "pipeline", metadata: bool = True) -> Path:
    """The adapter's file, written in one of three ways."""
    from diffusers import FluxKontextPipeline
    from peft import get_peft_model_state_dict

    if writer == "pipeline":
        settings = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        layers = get_peft_model_state_dict(oracle)
        FluxKontextPipeline.save_lora_weights(
            folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=settings if metadata else None
        )
    else:
        oracle.save_lora_adapter(folder)
    return folder / "pytorch_lora_weights.safetensors"


def weaken(oracle, strength: float):
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in oracle.modules():
        if isinstance(module, BaseTunerLayer):
            module.scale_layer(strength)


@torch.no_grad()
def outputs(flux, oracle, path: Path, strength: float = 1.0):
    """(ours with the file, diffusers' with its adapter at that strength, ours without)."""
    given = tiny.flux_inputs(flux.config)
    base = flux(**given)
    apply_updates(flux, read_adapter(path).updates, strength, FP32)
    weaken(oracle, strength)
    return flux(**given), run_flux(oracle, **given), base


@pytest.mark.parametrize("name", KINDS)
def test_lora_of_peft_works_on_any_linear(name, flux, oracle, tmp_path):  # trap 14
    config = add_random_lora(oracle, target_modules=name.replace(".", r"\."), lora_alpha=2)
    ours, theirs, base = outputs(flux, oracle, save(oracle, config, tmp_path))
    assert [update.name for update in updates(flux)] == [name]
    assert error(ours, theirs) < 1e-5
    assert error(ours, base) > 1e-4


ALPHAS = {
    "alpha r": {"lora_alpha": 4},
    "alpha r/2": {"lora_alpha": 2},
    "alpha 4r": {"lora_alpha": 16},
    "rslora": {"lora_alpha": 4, "use_rslora": True},
    "ranks": {"rank_pattern": {"attn.to_q": 2, r"transformer_blocks\.1\.ff\..*": 3}},
    "alphas": {"rank_pattern": {"proj_mlp": 6},
               "alpha_pattern": {"proj_mlp": 1, r".*norm1\.linear": 9, "^proj_out": 2}},
}  # fmt: skip


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("writer", ["pipeline", "transformer"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_lora_of_peft_has_its_strength(alpha, writer, strength, flux, oracle, tmp_path):  # trap 13
    config = add_random_lora(oracle, **ALPHAS[alpha])
    ours, theirs, base = outputs(flux, oracle, save(oracle, config, tmp_path, writer), strength)
    assert error(ours, theirs) < 1e-5 and error(ours, base) > 0.05


@pytest.mark.parametrize("alpha", ["alpha r", "alpha r/2", "alphas", "rslora"])
def test_raw_save_of_peft_is_read_with_its_config(alpha, flux, oracle, tmp_path):  # trap 13, trap 14
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(oracle, peft.LoraConfig(r=4, target_modules=LINEARS, **ALPHAS[alpha]))
    fill_adapter(oracle)
    model.save_pretrained(tmp_path)
    ours, theirs, _ = outputs(flux, oracle, tmp_path / "adapter_model.safetensors", 0.5)
    assert error(ours, theirs) < 1e-5


def test_file_without_alpha_has_strength_1(flux, oracle, tmp_path):  # trap 13
    path = save(oracle, add_random_lora(oracle, lora_alpha=4), tmp_path, metadata=False)
    ours, theirs, _ = outputs(flux, oracle, path)
    assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_tensors_are_read(shape, flux, oracle, tmp_path):  # trap 13
    path = save(oracle, add_random_lora(oracle, lora_alpha=2), tmp_path, metadata=False)
    alphas = {f"transformer.{name}.alpha": torch.full(shape, 2.0, dtype=torch.bfloat16) for name in LINEARS}
    tiny.rewrite(path, lambda tensors: {**tensors, **alphas})
    ours, theirs, _ = outputs(flux, oracle, path)
    assert error(ours, theirs) < 1e-5


def test_two_files_add_up(flux, oracle, tmp_path):
    path = save(oracle, add_random_lora(oracle), tmp_path)
    given = tiny.flux_inputs(flux.config)
    with torch.no_grad():
        for strength in (0.75, -0.25):
            apply_updates(flux, read_adapter(path).updates, strength, FP32)
        weaken(oracle, 0.5)
        assert error(flux(**given), run_flux(oracle, **given)) < 1e-5


# ------------------------------------------------------------------------------------------------ ours


def trained(flux, names: list[str], rank: int = 4, alpha: float = 4):
    """As if `names` had been trained: B is no longer zero."""
    parameters = add_lora(flux, names, rank, alpha)
    for i, parameter in enumerate(parameters):
        parameter.data = 0.15 * tiny.random(*parameter.shape, seed=i)


@pytest.mark.parametrize("alpha", [4, 2, 32])
@torch.no_grad()
def test_diffusers_reads_what_we_write(alpha, flux, oracle, tmp_path):  # trap 13
    trained(flux, LINEARS, alpha=alpha)
    write_adapter(tmp_path / "pytorch_lora_weights.safetensors", list(updates(flux)), {}, FP32)
    oracle.load_lora_adapter(tmp_path, prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
    given = tiny.flux_inputs(flux.config)
    assert error(flux(**given), run_flux(oracle, **given)) < 1e-5


@torch.no_grad()
def test_diffusers_reads_mixed_ranks_even_where_one_name_ends_another(flux, oracle, tmp_path):  # trap 13
    """The top-level `proj_out` and the blocks' have different ranks; a loose pattern would mix them up."""
    trained(flux, ["proj_out"], rank=2)
    trained(flux, [name for name in LINEARS if name.endswith("s.0.proj_out")], rank=6)
    trained(flux, ["transformer_blocks.0.attn.to_q", "norm_out.linear", "x_embedder"], rank=6)
    write_adapter(tmp_path / "pytorch_lora_weights.safetensors", list(updates(flux)), {}, FP32)
    oracle.load_lora_adapter(tmp_path, prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
    given = tiny.flux_inputs(flux.config)
    assert error(flux(**given), run_flux(oracle, **given)) < 1e-5


@torch.no_grad()
def test_reader_that_is_blind_to_the_header_sees_the_same_strength(flux, oracle, tmp_path):  # trap 13
    """As ComfyUI does it: no alpha in the tensors, so W + B A."""
    trained(flux, LINEARS, alpha=3)
    write_adapter(tmp_path / "lora.safetensors", list(updates(flux)), {}, FP32)
    tensors = tiny.load_file(tmp_path / "lora.safetensors")
    assert len(tensors) == 2 * len(LINEARS)
    for name in LINEARS:
        a, b = (tensors[f"transformer.{name}.lora_{half}.weight"] for half in "AB")
        oracle.get_submodule(name).weight += b @ a
    given = tiny.flux_inputs(flux.config)
    assert error(flux(**given), run_flux(oracle, **given)) < 1e-5


@torch.no_grad()
def test_we_read_what_we_write_with_its_recipe(flux, tmp_path):
    trained(flux, LINEARS, alpha=2)
    given = tiny.flux_inputs(flux.config)
    expected = flux(**given)
    write_adapter(tmp_path / "lora.safetensors", list(updates(flux)), {"prompt": ["turn it into night"]}, FP32)
    detach_all(flux)
    file = read_adapter(tmp_path / "lora.safetensors")
    apply_updates(flux, file.updates, 1.0, FP32)
    assert error(flux(**given), expected) < 1e-6
    assert file.recipe == {"prompt": ["turn it into night"]}
    assert not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------ refused


def pair(name: str, rank: int = 4, inputs: int = 64, rows: int = 64) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(rank, inputs), f"{name}.lora_B.weight": torch.ones(rows, rank)}


GOOD = pair("transformer.transformer_blocks.0.attn.to_q")
K = "transformer.transformer_blocks.0.attn.to_k"
REFUSED = {
    "garbage prefix": (pair("garbage.transformer_blocks.0.attn.to_q"), "garbage.transformer_blocks.0.attn.to_q"),
    "one garbage prefix": (GOOD | pair("garbage.x"), "garbage.x"),
    "unknown block": (GOOD | pair("transformer.transformer_blocks.9.attn.to_q"), "transformer_blocks.9.attn.to_q"),
    "fused name": (pair("transformer.double_blocks.0.img_attn.qkv"), "double_blocks.0.img_attn.qkv"),
    "left-over key": (GOOD | {f"{K}.dora_scale": torch.ones(1)}, "attn.to_k has dora_scale; it needs"),
    "bias": (GOOD | {f"{K}.lora_B.bias": torch.ones(64)}, f"{K}.lora_B.bias"),
    "half a lokr": (GOOD | {f"{K}.lokr_w1": torch.ones(2, 2)}, "attn.to_k has lokr_w1; it needs"),
    "kohya": ({"lora_unet_double_blocks_0_txt_mlp_2.lora_down.weight": torch.ones(4, 64)}, "lora_unet_double_blocks"),
    "only A": (GOOD | {f"{K}.lora_A.weight": torch.ones(4, 64)}, "attn.to_k has lora_A; it needs"),
    "only B": (GOOD | {f"{K}.lora_B.weight": torch.ones(64, 4)}, "attn.to_k has lora_B; it needs"),
    "only alpha": (GOOD | {f"{K}.alpha": torch.ones(1)}, "attn.to_k"),
    "NaN": (GOOD | pair(K) | {f"{K}.lora_B.weight": torch.full((64, 4), float("nan"))}, "attn.to_k holds NaN"),
    "infinite alpha": (GOOD | pair(K) | {f"{K}.alpha": torch.tensor(float("inf"))}, "attn.to_k has an alpha of inf"),
    "inputs": (GOOD | pair(K, inputs=32), "attn.to_k maps 32 to 64 channels, the model's 64 to 64"),
    "rows": (GOOD | pair(K, rows=32), "attn.to_k maps 64 to 32 channels, the model's 64 to 64"),
    "empty": ({}, "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_file_that_cannot_be_used_whole_is_refused_by_name(case, flux, tmp_path):  # trap 14
    tensors, names = REFUSED[case]
    tiny.save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=names) as refusal:
        apply_updates(flux, read_adapter(tmp_path / "lora.safetensors").updates, 1.0, FP32)
    assert "\n" not in str(refusal.value)
    assert not list(updates(flux)) or case in ("inputs", "rows")


def test_ranks_of_the_halves_must_agree(flux, tmp_path):
    tiny.save_file({**pair(K), f"{K}.lora_B.weight": torch.ones(64, 5)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="attn.to_k has .*do not share a rank"):
        apply_updates(flux, read_adapter(tmp_path / "lora.safetensors").updates, 1.0, FP32)


def test_dora_is_refused(tmp_path):
    config = json.dumps({"transformer.use_dora": True, "transformer.r": 4, "transformer.lora_alpha": 4})
    tiny.save_file(GOOD, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": config})
    with pytest.raises(ValueError, match="use_dora"):
        read_adapter(tmp_path / "lora.safetensors")


def test_absent_file_and_pickle_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="lora.safetensors does not exist"):
        read_adapter(tmp_path / "lora.safetensors")
    torch.save({}, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match="lora.bin is a pickle"):
        read_adapter(tmp_path / "lora.bin")
