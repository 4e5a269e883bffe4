"""Which modules are adapted, and that the base model comes back untouched."""

import pytest
import tiny
import torch
from tiny import CPU, FP32

from kontext_min.adapters.inject import TARGETS, add_lora, attach, detach_all, matching_modules, muted, updates
from kontext_min.adapters.layers import LoRA
from kontext_min.checkpoints.load import load_flux
from kontext_min.models.flux import FluxConfig

COUNTS = {
    "all": 266, "context": 76, "context+ffs": 114, "all+ffs": 419, "all+ffs+embedder": 420, "ai-toolkit": 495,
    "tiny": 2, "nano": 1, "mmdit": 228,
}  # fmt: skip


@pytest.fixture
def flux(kontext):
    return load_flux(tiny.part(kontext, "transformer"), CPU, FP32)


def spoilt(flux, target: str = "ai-toolkit"):
    """With updates that are not zero."""
    for parameter in add_lora(flux, matching_modules(flux.config, TARGETS[target]), 4, 4):
        parameter.data = 0.1 * tiny.random(*parameter.shape)
    return flux


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


def test_a_fresh_update_changes_nothing(flux):
    given = tiny.flux_inputs(flux.config)
    with torch.no_grad():
        before = flux(**given)
        add_lora(flux, matching_modules(flux.config, TARGETS["all"]), 4, 4)
        assert torch.equal(flux(**given), before)


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
def test_muted_model_is_the_base_model_to_the_last_bit(flux):
    given = tiny.flux_inputs(flux.config)
    before = flux(**given)
    adapted = spoilt(flux)(**given)
    assert tiny.error(adapted, before) > 0.05
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
