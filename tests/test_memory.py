"""What memory a run takes: counted before, measured while it goes."""

from functools import partial

import pytest
import tiny
import torch
from benchmarks import arms
from benchmarks.arms import FULL
from tiny import CPU, FP32, add_lokr, add_lora
from torch import nn
from torch.nn.attention import SDPBackend, _registry

from kontext_min.adapters.inject import TARGETS, matching_modules
from kontext_min.adapters.layers import Kronecker
from kontext_min.checkpoints.load import load_flux
from kontext_min.memory import (
    FUSED,
    FUSED_BACKWARD,
    GB,
    POLICIES,
    Counted,
    apply_checkpointing,
    attention_kernels,
    counted,
    held,
    in_use,
    size_of,
)  # fmt: skip
from kontext_min.models.flux import Flux
from kontext_min.offload import Inputs
from kontext_min.quantize import open_flux


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


def test_what_is_held_is_what_the_files_hold_and_what_training_adds(kontext):
    flux = load_flux(tiny.part(kontext, "transformer"), CPU, FP32).requires_grad_(False)
    file = sum(tensor.numel() * 4 for tensor in tiny.read_part(kontext / "transformer").values())
    parameters = sum(p.numel() for p in add_lora(flux, ["transformer_blocks.0.attn.to_q"], 16, 16))
    assert [*held(flux, 1000, FP32).values()] == [file, parameters * 1000]


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
    for policy, less in [
        ("none", 0),
        ("block", 0),
        ("keep_attn", 0),
        ("keep_gemm", 0),
        ("keep_attn", 2),
        ("keep_gemm", 9),
    ]:
        flux = open_flux(tiny.part(kontext, "transformer"), CPU, FP32, base, tmp_path)
        flux.requires_grad_(False)
        torch.manual_seed(0)
        names = matching_modules(flux.config, patterns)
        lokr = kind.get("lokr")
        add = add_lokr(flux, names, Kronecker(4, dim=3)) if lokr else add_lora(flux, names, 4, 4, dora=bool(kind))
        for i, parameter in enumerate(add):
            parameter.data += 0.1 * tiny.random(*parameter.shape, seed=i)
        apply_checkpointing(flux, policy, less=less)
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
    for name in ("peer", *POLICIES):
        with torch.device("meta"):
            model = arms.arm(name, arms.SMALL.config)
        given = {key: value.to("meta") for key, value in arms.inputs(arms.SMALL, FP32).items()}
        counts[name] = arms.gemm_flops(model, given)
    return {name: count / counts["peer"] for name, count in counts.items()}


def test_a_step_has_fewer_flops_than_diffusers_and_pefts(flops):
    assert flops["block"] <= 0.86 and flops["keep_attn"] == flops["block"]
    assert flops["none"] < flops["keep_gemm"] <= 0.66


def on_meta(name: str, shape: arms.Shape, dtype: torch.dtype) -> tuple[nn.Module, dict]:
    """An arm of the benchmark and its inputs, of tensors that have a shape and no values."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = arms.arm(name, shape.config)
    finally:
        torch.set_default_dtype(FP32)
    return model, {key: value.to("meta") for key, value in arms.inputs(shape, dtype).items()}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_that_is_counted_takes_what_one_that_is_computed_takes(policy):
    """And by torch's own counter of FLOPs, which knows no attention of the CPU's."""
    shape = arms.Shape(arms.sized(2, 2, 3, 64), 40, (12, 12))
    model, given = on_meta(policy, shape, FP32)
    found = counted(lambda: arms.loss(model, given))
    torch.manual_seed(0)
    real, given = arms.arm(policy, shape.config), arms.inputs(shape, FP32)
    with Counted() as computed:
        arms.loss(real, given).backward()
    assert found.flops == computed.flops
    assert found.peak == pytest.approx(computed.peak, abs=40_000)  # of at least 11 MB; a kernel of the CPU's wants more
    attention = [found.flops[op] for op in (FUSED, FUSED_BACKWARD)]
    assert found.flops.total() - sum(attention) == arms.gemm_flops(real, given)
    tokens, again = 40 + 2 * 144, 5 - 1 if policy == "block" else 0  # the last block is never computed again
    once, last = 4 * tokens**2 * 256, 4 * tokens * 144 * 256  # of whose tokens only the target's ask
    assert attention == [4 * once + last + again * once, 2.5 * (4 * once + last)]


def test_bytes_that_are_moved_are_those_read_and_written_but_by_products_and_views():
    x, w = torch.zeros(8, 16), torch.zeros(16, 4)  # 512 and 256 bytes
    with Counted() as found:
        y = (x @ w).t().unflatten(0, (2, 2))  # a product and two views
        assert found.moved == 0
        x + x.view(16, 8).view(8, 16)
        assert found.moved == 3 * 512
        y.mul_(2)
        assert found.moved == 3 * 512 + 2 * 128
    assert found.flops.total() == 2 * 8 * 16 * 4


def test_the_forward_pass_at_1024_px_has_the_known_flops():
    with torch.device("meta"):
        flux = Flux(FULL.config)
    given = {key: value.to("meta") for key, value in arms.inputs(FULL, FP32).items()}
    with torch.no_grad():
        found = counted(lambda: flux(**given))
    assert found.flops.total() == pytest.approx(165.458e12, rel=1e-3)  # 2 a multiply-add, by hand from the shapes


PEER = 4.672  # GB of diffusers' and peft's step beside its weights, by fake tensors


def test_at_full_size_a_step_takes_no_more_memory_than_diffusers_and_pefts():
    found = counted(partial(arms.loss, *on_meta("block", FULL, torch.bfloat16)))
    assert found.peak / GB <= 4.57 < PEER
    assert found.flops.total() == pytest.approx(531.4e12, rel=1e-3)  # the peer's: 578.8, by hand from the shapes


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
        assert first == (int(SDPBackend.CUDNN_ATTENTION) if capability == (9, 0) else before[0])
        assert torch._C._get_sdp_priority_order() == before


def test_on_hopper_flash_attention_3_comes_first_where_it_is_installed(monkeypatch, tmp_path):
    """By torch's own registry, with a package of that name that has no kernels."""
    (tmp_path / "flash_attn_interface.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(RuntimeError, match="flash_attn_interface.* does not expose"):
        attention_kernels(torch.device("cuda"))
    used = []
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", lambda: used.append("FA3"))
    with attention_kernels(torch.device("cuda")):
        order = torch._C._get_sdp_priority_order()
    assert used == ["FA3"] and order[0] == int(SDPBackend.FLASH_ATTENTION) != order[1]


class Away(Inputs):
    """What is away takes no bytes: on meta it cannot be told from what is not."""

    def away(self, key, *tensors):
        self.hosts[key] = [(x.shape, x.dtype) for x in tensors]

    def come(self, key, *following):
        for one in {key, *following} & self.hosts.keys() - self.there.keys():
            self.there[one] = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in self.hosts[one]]
        return self.there[key]


def test_at_full_size_a_step_takes_little_with_the_inputs_of_blocks_away():
    model, given = on_meta("block", FULL, torch.bfloat16)
    away = Away(model, torch.device("meta"))
    assert counted(lambda: arms.loss(model, given)).peak / GB <= 1.7
    assert away.count == 2 * 19 + 37 and not away.hosts and not away.there


def test_at_full_size_a_step_moves_half_the_bytes_of_the_peers():
    """By all but products and attention: what eager kernels of a GPU read and write, whatever GPU it is."""
    moved = {}
    for name in ("peer", "block", "keep_gemm"):
        model, given = on_meta(name, FULL, torch.bfloat16)
        moved[name] = counted(lambda model=model, given=given: arms.loss(model, given)).moved
    assert max(moved["block"], moved["keep_gemm"]) <= 0.52 * moved["peer"]


def test_of_two_policies_a_step_takes_its_shares_of_both():
    """As `training/plan.py` counts it: blocks that keep more, the last ones, let go of it before the others begin."""
    shape = arms.Shape(arms.sized(4, 8, 3, 64), 64, (24, 24))

    def step(policy: str, less: int) -> Counted:
        model, given = on_meta("none", shape, FP32)
        apply_checkpointing(model, policy, less=less)
        return counted(lambda: arms.loss(model, given))

    for policy in POLICIES[:-1]:
        none, some, every = (step(policy, less) for less in (0, 4, 11))
        shares = none.peak + 4 / 11 * (every.peak - none.peak)
        assert some.peak == pytest.approx(shares, rel=0.05) and none.peak < every.peak
        assert every.flops.total() < some.flops.total() < none.flops.total()
    assert step("none", 0).flops == step("keep_gemm", 11).flops
