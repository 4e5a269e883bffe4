"""Which modules are adapted, and that the base model comes back untouched."""

import pytest
import tiny
import torch
from tiny import CPU, FP32, add_lokr, add_lora, detach_all

from kontext_min.adapters.inject import (
    TARGETS,
    apply_updates,
    attach,
    matching_modules,
    muted,
    updates,
)
from kontext_min.adapters.layers import Kronecker, LoRA
from kontext_min.adapters.write import write_adapter
from kontext_min.checkpoints.load import load_flux
from kontext_min.memory import apply_checkpointing
from kontext_min.models.flux import FluxConfig
from kontext_min.quantize import QuantisedLinear

COUNTS = {
    "all": 266, "context": 76, "context+ffs": 114, "all+ffs": 419, "all+ffs+embedder": 420, "ai-toolkit": 495,
    "tiny": 2, "nano": 1, "mmdit": 228,
}  # fmt: skip


@pytest.fixture
def flux(kontext):
    return load_flux(tiny.part(kontext, "transformer"), CPU, FP32)


KINDS = {  # what puts fresh updates on named modules
    "LoRA": lambda flux, names: add_lora(flux, names, 4, 4),
    "DoRA": lambda flux, names: add_lora(flux, names, 4, 6, dora=True),
    "LoKr": lambda flux, names: add_lokr(flux, names, Kronecker(4, full_matrix=True)),
    "LoKr of a rank": lambda flux, names: add_lokr(flux, names, Kronecker(8, dim=2, alpha=20, decompose_both=True)),
}


def spoilt(flux, target: str = "ai-toolkit", kind: str = "LoRA"):
    """With updates that are not zero."""
    for i, parameter in enumerate(KINDS[kind](flux, matching_modules(flux.config, TARGETS[target]))):
        noise = 0.1 * tiny.random(*parameter.shape, seed=i)
        parameter.data = noise if parameter.ndim > 1 else parameter.data * (1 + noise)
    return flux


def gradient(flux) -> dict[str, torch.Tensor]:
    """Of every parameter, under a fixed loss, by the updates' names."""
    output = flux(**tiny.flux_inputs(flux.config))
    named = {f"{u.name}.{name}": value for u in updates(flux) for name, value in u.named_parameters()}
    found = torch.autograd.grad((output * tiny.random(*output.shape, seed=8)).sum(), list(named.values()))
    return {"output": output.detach()} | dict(zip(named, found, strict=True))


@pytest.mark.parametrize("target", COUNTS)
def test_targets_of_the_full_model_are_as_many_as_simpletuner_has(target):
    names = matching_modules(FluxConfig(), TARGETS[target])
    assert len(names) == len(set(names)) == COUNTS[target]
    assert COUNTS.keys() == TARGETS.keys()


def test_targets_are_those_that_peft_finds_on_diffusers_model():
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    with torch.device("meta"):
        oracle = diffusers.FluxTransformer2DModel(guidance_embeds=True, num_layers=2, num_single_layers=3)
    config = peft.LoraConfig(target_modules=list(TARGETS["ai-toolkit"]), r=1)
    oracle.add_adapter(config)
    theirs = {name.rpartition(".lora_A")[0] for name, _ in oracle.named_parameters() if "lora_A" in name}
    assert theirs == set(matching_modules(FluxConfig(depth=2, depth_single_blocks=3), TARGETS["ai-toolkit"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"then": tiny.quantise("int8")}], ids=["plain", "int8"])
def test_a_fresh_update_changes_nothing(kontext, kind, options):
    flux = load_flux(tiny.part(kontext, "transformer"), CPU, FP32, **options)
    given = tiny.flux_inputs(flux.config)
    with torch.no_grad():
        before = flux(**given)
        parameters = KINDS[kind](flux, matching_modules(flux.config, TARGETS["ai-toolkit"]))
        assert torch.equal(flux(**given), before)
    assert {id(p) for p in flux.parameters() if p.requires_grad} == {id(p) for p in parameters}


@pytest.mark.parametrize("kind", ["DoRA", "LoKr", "LoKr of a rank"])
def test_gradients_are_the_same_through_checkpointing_and_over_int8(flux, kontext, kind):
    expected = gradient(spoilt(flux, kind=kind))
    assert all(value.abs().max() > 0 for value in expected.values())

    def same(changed, tolerance=1e-5):
        for name, value in gradient(changed).items():
            assert tiny.error(value, expected[name]) < tolerance, name

    apply_checkpointing(flux)
    same(flux)
    int8 = load_flux(tiny.part(kontext, "transformer"), CPU, FP32, then=tiny.quantise("int8"))
    twin = load_flux(tiny.part(kontext, "transformer"), CPU, FP32)
    for name, module in int8.named_modules():
        if isinstance(module, QuantisedLinear):
            twin.get_submodule(name).weight.data = module.dequantised()
    expected = gradient(spoilt(twin, kind=kind))
    same(spoilt(int8, kind=kind))


def test_dora_on_the_transformer_is_pefts_and_so_is_its_file_in_diffusers(flux, kontext, tmp_path):
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    folder = kontext / "transformer"
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(folder, dtype=FP32).requires_grad_(False)
    ours = gradient(spoilt(flux, kind="DoRA"))
    named = {update.name: update for update in updates(flux)}
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=list(named)))
    parts = {"lora_A.default.weight": "A", "lora_B.default.weight": "B"}
    parts["lora_magnitude_vector.default.weight"] = "magnitude"
    found = {}
    for name, parameter in theirs.named_parameters():
        ending = next((ending for ending in parts if name.endswith(f".{ending}")), None)
        if ending:
            module = name.removesuffix(f".{ending}")
            parameter.data = getattr(named[module], parts[ending]).detach().clone()
            found[f"{module}.{parts[ending]}"] = parameter
    output = tiny.run_flux(theirs, **tiny.flux_inputs(flux.config))
    assert tiny.error(ours.pop("output"), output) < 1e-6 and found.keys() == ours.keys()
    expected = torch.autograd.grad((output * tiny.random(*output.shape, seed=8)).sum(), list(found.values()))
    for name, value in zip(found, expected, strict=True):
        assert tiny.error(ours[name], value) < 1e-4, name

    write_adapter(tmp_path / "dora.safetensors", list(updates(flux)), {}, FP32)
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(folder, dtype=FP32)
    pipe = diffusers.FluxKontextPipeline(None, None, None, None, None, None, transformer)
    pipe.load_lora_weights(tmp_path, weight_name="dora.safetensors")
    with torch.no_grad():
        assert tiny.error(tiny.run_flux(transformer, **tiny.flux_inputs(flux.config)), output) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_applied_at_a_strength_is_on_the_way_from_the_base_to_it(flux, kind):
    given = tiny.flux_inputs(flux.config)
    base = flux(**given)
    trained = list(updates(spoilt(flux, kind=kind)))
    full = flux(**given)
    detach_all(flux)
    for strength, expected in ((0.0, base), (1.0, full)):
        apply_updates(flux, trained, strength, FP32)
        assert torch.equal(flux(**given), expected)
        detach_all(flux)


def test_a_lokr_that_no_file_could_hold_is_refused_before_it_is_trained(flux):
    with pytest.raises(ValueError, match="norm_out.linear: .* odd number of rows"):
        add_lokr(flux, ["norm_out.linear"], Kronecker(1, full_matrix=True))
    assert not list(updates(flux))


def test_fresh_updates_are_of_the_size_that_peft_draws():
    lora = LoRA.fresh("x", (64, 4096), rank=16, alpha=16)
    assert lora.A.abs().max().item() == pytest.approx(4096**-0.5, rel=1e-3) and not lora.B.any()


def test_parameters_do_not_depend_on_the_order_of_names_and_alone_are_trained(flux):
    names = matching_modules(flux.config, TARGETS["all"])
    torch.manual_seed(0)
    parameters = add_lora(flux, names, 4, 4)
    assert {id(p) for p in flux.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert sorted(update.name for update in updates(flux)) == sorted(names)
    detach_all(flux)
    torch.manual_seed(0)
    again = add_lora(flux, list(reversed(names)), 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("wanted", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_muted_model_is_the_base_model_to_the_last_bit(flux, kind, wanted):
    given = tiny.flux_inputs(flux.config) | {"wanted": wanted}
    before = flux(**given)
    adapted = spoilt(flux, kind=kind)(**given)
    assert tiny.error(adapted, before) > 0.03
    with muted(flux):
        assert torch.equal(flux(**given), before)
    assert torch.equal(flux(**given), adapted)


@torch.no_grad()
def test_updates_come_back_when_the_muted_block_fails(flux):
    given = tiny.flux_inputs(flux.config)
    adapted = spoilt(flux)(**given)
    with pytest.raises(KeyError), muted(flux):
        raise KeyError
    assert torch.equal(flux(**given), adapted)


@torch.no_grad()
def test_detached_model_is_the_very_one_that_it_was(flux):
    given = tiny.flux_inputs(flux.config)
    before, names = flux(**given), list(flux.state_dict())
    detach_all(spoilt(flux))
    assert torch.equal(flux(**given), before) and list(flux.state_dict()) == names


@torch.no_grad()
def test_update_of_a_slice_touches_only_its_rows(flux):
    x = tiny.random(3, 64)
    before = flux.single_blocks[0].linear1(x)
    attach(flux, "single_blocks.0.linear1", LoRA("v", tiny.random(2, 64), tiny.random(64, 2), 1.0, start=128))
    changed = flux.single_blocks[0].linear1(x) != before
    assert changed[:, 128:192].all() and not changed[:, :128].any() and not changed[:, 192:].any()
