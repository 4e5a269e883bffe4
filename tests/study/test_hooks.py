"""Recording changes nothing, attention is softmax(q k^T / sqrt(D)), ablations are what the algebra says."""

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import add_lora, random
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kontext_min import flow
from kontext_min.adapters.inject import muted, updates
from kontext_min.flow import Condition
from kontext_min.models.flux import Flux, FluxConfig
from kontext_min.study import hooks

CONFIG = FluxConfig(vec_in_dim=64, context_in_dim=48, hidden_size=64, num_heads=2, depth=2, depth_single_blocks=2,
                    axes_dim=(4, 14, 14))  # fmt: skip
SITES = ["double_blocks.0.attend", "double_blocks.1.attend", "single_blocks.0.attend", "single_blocks.1.attend"]
LORA = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_out"]


@pytest.fixture
def flux():
    return tiny.randomise(Flux(CONFIG))


@torch.no_grad()
def velocity(flux, seed: int = 4, references: int = 1, pooled: int = 5, t: float = 0.6):
    given = [random(2, 16, 8, 10, seed=9)][:references]
    condition = Condition(random(2, 7, 48, seed=seed), random(2, 64, seed=pooled), given)
    return flow.velocity(flux, random(2, 16, 6, 8, seed=3), torch.full((2,), t), condition, torch.full((2,), 2.5))


def sizes(call: hooks.Call) -> Tensor:  # of every token of what a block gives, text first. (B, L)
    x = torch.cat(call.output[::-1], dim=1) if isinstance(call.output, tuple) else call.output
    return x.norm(dim=-1)


CONTEXTS = {
    "record": lambda flux: hooks.record(flux, "*_blocks.*"),
    "average": lambda flux: hooks.average(flux, "*_blocks.*", sizes),
    "attention": lambda flux: hooks.record(flux, "*_blocks.*.attend", hooks.attention(chunk=5)),
    "replace": lambda flux: hooks.replace(flux, "double_blocks.1", lambda call: tuple(2 * x for x in call.output)),
    "skip": lambda flux: hooks.skip(flux, "*_blocks.*"),
    "zero head": lambda flux: hooks.zero_head(flux, "*_blocks.*.attend", 1),
    "without reference": hooks.without_reference,
    "muted": lambda flux: muted(flux, "single_blocks"),
}


def hooked(flux) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in flux.modules())


@pytest.mark.parametrize("name", CONTEXTS)
def test_outputs_are_bit_identical_after_a_context(flux, name):
    """And within it, where it only records."""
    for parameter in add_lora(flux, LORA, rank=2, alpha=2):
        parameter.data = random(*parameter.shape)
    plain = velocity(flux)
    with CONTEXTS[name](flux):
        within = velocity(flux)
    assert torch.equal(within, plain) == (name in ("record", "average", "attention"))
    assert torch.equal(velocity(flux), plain) and hooked(flux) == 0


@pytest.mark.parametrize("name", CONTEXTS)
def test_nothing_is_left_behind_after_an_error(flux, name):
    plain = velocity(flux)
    with pytest.raises(KeyError), CONTEXTS[name](flux):
        raise KeyError
    assert torch.equal(velocity(flux), plain) and hooked(flux) == 0


def test_a_pattern_stands_for_whole_words(flux):
    assert hooks.sites(flux, "*_blocks.*.attend") == SITES
    assert hooks.sites(flux, "double_blocks.*") == ["double_blocks.0", "double_blocks.1"]
    with pytest.raises(ValueError, match=r"no module is called 'blocks\.0'; names begin with img_in, .* one word"):
        hooks.sites(flux, "blocks.0")


# ------------------------------------------------------------------------------------------------ attention


def explicit(q, k, pe):
    """softmax(q k^T / sqrt(D)) in fp64, the rotation of every pair by cosines and sines."""
    cos, sin = pe.real.double(), pe.imag.double()
    pairs = ((x.double()[..., 0::2], x.double()[..., 1::2]) for x in (q, k))
    q, k = (torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1) for even, odd in pairs)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    return (scores / q.shape[-1] ** 0.5).softmax(-1)


def both(flux, *whats):
    """What records keep of one evaluation, and the calls themselves."""
    with ExitStack() as stack:
        kept = [stack.enter_context(hooks.record(flux, "*_blocks.*.attend", w)) for w in (*whats, lambda call: call)]
        velocity(flux)
    return kept


def test_recorded_attention_is_the_explicit_softmax_that_the_model_uses(flux):
    found, calls = both(flux, hooks.attention())
    for site in SITES:
        call = calls[site][0]
        q, k, v, pe = call.inputs
        a = found[site][0]
        expected = explicit(q, k, pe)
        assert a.shape == expected.shape == (2, 2, 39, 39) and a.dtype == torch.float32
        assert torch.allclose(a.double(), expected, atol=1e-6)
        assert torch.allclose(a.sum(-1), torch.ones(2, 2, 39), atol=1e-5)
        assert torch.allclose((a @ v).transpose(1, 2).flatten(2), call.output, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 39, 64])
def test_chunks_and_parts_equal_the_whole(flux, chunk):
    q, k = slice(7, 19), slice(19, 39)
    kinds = hooks.attention(chunk=chunk), hooks.attention(q, k, chunk=chunk), hooks.attention(q, k, True, chunk)
    *found, calls = both(flux, *kinds, hooks.emphasis(q, k))
    for site in SITES:
        whole, part, mean, emphasis = (kept[site][0] for kept in found)
        expected = explicit(*calls[site][0].inputs[:2], calls[site][0].inputs[3]).float()
        assert torch.allclose(whole, expected, atol=1e-6)
        assert torch.allclose(part, expected[:, :, q, k], atol=1e-6)
        assert torch.allclose(mean, expected[:, :, q, k].mean(2), atol=1e-6)
        assert torch.allclose(emphasis, part / expected[:, :, q, k].mean(2, keepdim=True), rtol=1e-4)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
        self.most = max(self.most, *(x.untyped_storage().nbytes() // x.element_size() for x in made), 0)
        return out


def test_the_whole_matrix_is_never_held():
    length, chunk, heads = 700, 16, 2
    q, k, angles = random(1, heads, length, 8), random(1, heads, length, 8, seed=2), random(length, 4)
    call = hooks.Call("", 0, (q, k, k, torch.polar(torch.ones_like(angles), angles)), None)
    with Largest() as seen:
        hooks.attention(keys=slice(9, 12), chunk=chunk)(call)
    assert heads * length * 8 <= seen.most <= heads * chunk * length < heads * length * length / 40


# ------------------------------------------------------------------------------------------------ record, replace


def test_records_are_by_site_and_step_and_averages_are_their_means(flux):
    pattern = "single_blocks.*"
    with (
        hooks.record(flux, pattern) as each,
        hooks.record(flux, pattern, steps={0, 2}) as some,
        hooks.average(flux, pattern, lambda call: call.output) as means,
    ):
        for t in (0.9, 0.5, 0.1):
            velocity(flux, t=t)
    assert list(each) == list(means) == ["single_blocks.0", "single_blocks.1"]
    for site, values in each.items():
        assert list(values) == [0, 1, 2] and list(some[site]) == [0, 2]
        assert torch.equal(some[site][2], values[2]) and not torch.equal(values[0], values[2])
        assert torch.allclose(means[site], torch.stack([*values.values()]).mean(0), atol=1e-6)


def test_a_double_block_gives_target_and_reference_then_text(flux):
    with hooks.record(flux, "double_blocks.0") as raw, hooks.record(flux, "double_blocks.0", sizes) as made:
        velocity(flux)
    img, txt = raw["double_blocks.0"][0]
    found = made["double_blocks.0"][0]
    assert torch.allclose(found[:, :7], txt.norm(dim=-1)) and torch.allclose(found[:, 7:], img.norm(dim=-1))


@pytest.mark.parametrize("site", ["double_blocks.0", "single_blocks.1", *SITES, "img_in", "double_blocks.1.img_mlp.0"])
def test_patching_a_run_into_itself_changes_nothing(flux, site):
    with hooks.record(flux, site) as kept:
        plain = velocity(flux)
    with hooks.replace(flux, site, lambda call: kept[call.site][call.step]):
        assert torch.equal(velocity(flux), plain)


def test_patching_carries_one_run_over_into_another(flux):
    """The last block's output is all that the result has of the text tokens; at other steps nothing changes."""
    with hooks.record(flux, "single_blocks.1") as kept:
        a = velocity(flux, seed=4)
    b = velocity(flux, seed=14)
    with hooks.replace(flux, "single_blocks.1", lambda call: kept[call.site][0], steps={1}):
        assert torch.equal(velocity(flux, seed=14), b)
        assert torch.equal(velocity(flux, seed=14), a)
    assert not torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ ablation


@torch.no_grad()
def test_skipping_every_block_leaves_the_residual_stream_alone(flux):
    x, vec = (
        random(2, 16, 6, 8, seed=3),
        flux.embed(torch.full((2,), 0.6), random(2, 64, seed=5), torch.full((2,), 2.5)),
    )
    w = flux.state_dict()
    tokens = x.unflatten(3, (4, 2)).unflatten(2, (3, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    h = tokens @ w["img_in.weight"].T + w["img_in.bias"]
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    shift, scale = F.linear(F.silu(vec), *(w[f"final_layer.adaLN_modulation.1.{n}"] for n in ("weight", "bias"))).chunk(
        2, 1
    )
    h = h * (1 + scale[:, None]) + shift[:, None]
    expected = h @ w["final_layer.linear.weight"].T + w["final_layer.linear.bias"]  # (2, 12, 64)
    with hooks.skip(flux, "*_blocks.*"):
        assert torch.allclose(flow.pack(velocity(flux)), expected, atol=1e-5)


@pytest.mark.parametrize("block", ["double_blocks.0", "single_blocks.1"])
def test_a_zero_head_is_one_whose_output_weights_are_zero(flux, block):
    other = deepcopy(flux)
    outputs = ["img_attn.proj", "txt_attn.proj"] if "double" in block else ["linear2"]
    for name in outputs:
        other.get_submodule(f"{block}.{name}").weight.data[:, 32:64] = 0
    with hooks.zero_head(flux, f"{block}.attend", 1):
        assert tiny.error(velocity(flux), velocity(other)) < 1e-6
    assert tiny.error(velocity(flux), velocity(other)) > 1e-3


def test_without_reference_is_text_to_image_at_these_steps(flux):
    alone, beside = velocity(flux, references=0), velocity(flux)
    with hooks.without_reference(flux):
        assert torch.equal(velocity(flux), alone)
    with hooks.without_reference(flux, steps=range(1, 2)):
        assert [torch.equal(velocity(flux), v) for v in (beside, alone, beside)] == [True] * 3


def test_a_lora_is_muted_in_chosen_blocks(flux):
    base = velocity(flux)
    for parameter in add_lora(flux, LORA, rank=2, alpha=2):
        parameter.data = random(*parameter.shape)
    with muted(flux, "double_blocks"):
        assert [update.name for update in updates(flux)] == LORA[1:]
    with muted(flux, "single_blocks.1"), muted(flux, "double_blocks.0.img_attn.qkv"):
        assert not list(updates(flux)) and torch.equal(velocity(flux), base)
    with muted(flux):
        assert torch.equal(velocity(flux), base)


def test_muting_block_1_is_not_muting_block_10():
    flux = Flux(replace(CONFIG, depth_single_blocks=11))
    names = [f"single_transformer_blocks.{i}.proj_out" for i in (1, 10)]
    add_lora(flux, names, rank=1, alpha=1)
    with muted(flux, "single_blocks.1"):
        assert [update.name for update in updates(flux)] == names[1:]
