"""What a GPU need not hold changes no bit: modulation elsewhere and ahead, weights and inputs that come and go."""

import pytest
import tiny
import torch
from tiny import CPU, FP32, add_lora

from kontext_min import offload
from kontext_min.adapters.inject import TARGETS, matching_modules
from kontext_min.memory import apply_checkpointing
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.quantize import is_modulation, is_quantised, open_flux


def gradients(kontext, cache, precision, target, policy, parts, dora=False) -> list[torch.Tensor]:
    """Of three steps of a model with these parts of it elsewhere; their outputs, too."""
    flux = open_flux(tiny.part(kontext, "transformer"), CPU, FP32, precision, cache)
    made = {}
    if "modulation" in parts:
        made["modulation"] = offload.Modulation(flux, CPU)
    if "blocks" in parts:
        made["blocks"] = offload.Ring(flux, CPU)
    torch.manual_seed(0)
    for i, parameter in enumerate(add_lora(flux, matching_modules(flux.config, TARGETS[target]), 4, 4, dora=dora)):
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
        assert made["inputs"].count and not made["inputs"].hosts and not made["inputs"].there
    if "blocks" in parts:
        assert len(made["blocks"].hosts) == 4 > len(made["blocks"].there)
    return found + [p.grad for p in flux.parameters() if p.requires_grad]


PARTS = [("modulation",), ("inputs",), ("blocks",), ("modulation", "inputs", "blocks")]


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


def test_a_dora_on_modulation_that_is_elsewhere_gives_what_it_gives_in_its_place(kontext, tmp_path):
    plain, other = (
        gradients(kontext, tmp_path, "no_change", "ai-toolkit", "block", parts, dora=True)
        for parts in ((), ("modulation",))
    )
    assert len(plain) == len(other) and max(tiny.error(a, b) for a, b in zip(other, plain, strict=True)) < 1e-5


def test_modulation_is_all_that_sees_no_tokens_by_the_published_shapes():
    with torch.device("meta"):
        named = dict(Flux(FluxConfig()).named_parameters())
    modulation = sum(p.numel() for name, p in named.items() if is_modulation(name))
    tokens = sum(p.numel() for name, p in named.items() if is_quantised(name))
    assert modulation == pytest.approx(3.247e9 + 0.0305e9, rel=1e-3) and tokens == pytest.approx(8.608e9, rel=1e-3)


def test_what_is_computed_ahead_is_computed_once_and_is_the_same(kontext, tmp_path):
    flux = open_flux(tiny.part(kontext, "transformer"), CPU, FP32, "no_change", tmp_path)
    given, times = tiny.flux_inputs(flux.config), torch.linspace(1, 0.1, 5)
    y, guidance = given["y"][:1], given["guidance"][:1]
    one = {key: value[:1] if key in ("img", "txt") else value for key, value in given.items()} | {"y": y}
    plain = [flux(**{**one, "timesteps": t[None], "guidance": guidance}) for t in times]
    modulation, made = offload.Modulation(flux, CPU), []
    compute = modulation.compute
    modulation.compute = lambda rows: made.append(len(rows)) or compute(rows)
    modulation.ahead(times, y.expand(5, -1), guidance.expand(5))
    ahead = [flux(**{**one, "timesteps": t[None], "guidance": guidance}) for t in times]
    assert made == [5] and not modulation.made
    for a, b in zip(plain, ahead, strict=True):
        assert tiny.error(a, b) < 1e-6
    again = flux(**{**one, "timesteps": times[:1], "guidance": guidance})  # nobody told of this one
    assert made == [5, 1] and tiny.error(again, plain[0]) < 1e-6
    told = modulation.ahead(torch.linspace(0, 1, 300), y.expand(300, -1), guidance.expand(300))
    assert [*modulation.made] == told[: offload.KEPT]  # what comes last is let go


def test_updates_on_what_embeds_time_are_refused_where_it_is_computed_ahead(kontext, tmp_path):
    flux = open_flux(tiny.part(kontext, "transformer"), CPU, FP32, "no_change", tmp_path)
    offload.Modulation(flux, CPU)
    add_lora(flux, ["time_text_embed.timestep_embedder.linear_1"], 4, 4)
    with pytest.raises(ValueError, match="time_in, guidance_in, vector_in need modulation_on_cpu=false"):
        flux(**tiny.flux_inputs(flux.config))


@pytest.mark.parametrize("policy", [None, "block", "keep_gemm"])
def test_compiled_blocks_give_the_same_without_a_break_and_one_graph_more_a_size(kontext, tmp_path, policy):
    """By the compiler's front end; the plan's parts are all in force."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = []
    for compiled in (False, True):
        flux, _ = offload.open_apart(CPU, False, tiny.part(kontext, "transformer"), CPU, FP32, "int8-torchao", tmp_path)
        torch.manual_seed(0)
        for i, parameter in enumerate(add_lora(flux, matching_modules(flux.config, TARGETS["all+ffs"]), 4, 4)):
            parameter.data += 0.1 * tiny.random(*parameter.shape, seed=i)
        if policy:
            apply_checkpointing(flux, policy)
        for block in (*flux.double_blocks, *flux.single_blocks) if compiled else ():
            block.compile(dynamic=False, backend="aot_eager")
        counters = torch._dynamo.utils.counters
        found, graphs = [], []
        for fewer in (0, 0, 4, 4):
            given = tiny.flux_inputs(flux.config)
            given |= {"img": given["img"][:, fewer:], "img_ids": given["img_ids"][fewer:]}
            out = flux(**given, wanted=12)
            out.square().sum().backward()
            found.append(out.detach())
            graphs.append(counters["stats"]["unique_graphs"])
        made.append(found + [p.grad for p in flux.parameters() if p.requires_grad])
    assert not counters["graph_break"]
    first, again, other, last = graphs
    assert first == again <= 4  # of kinds of blocks, the last one is another: not a graph for each place of modulation
    assert other == last <= 2 * first  # each kind of block once more for another size
    assert max(tiny.error(a, b) for a, b in zip(*made, strict=True)) < 1e-5
