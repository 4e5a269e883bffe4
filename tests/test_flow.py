"""The arithmetic of Kontext: golden numbers, formulae and symmetries."""

import math

import pytest
import tiny
import torch
from tiny import CPU, FP32, error, random

from kontext_min import flow
from kontext_min.checkpoints.load import load_flux
from kontext_min.flow import Condition, Shift


@pytest.fixture(scope="module")
def flux(kontext):
    return load_flux(tiny.part(kontext, "transformer"), CPU, FP32)


def condition(*references, text: int = 7) -> Condition:
    return Condition(random(1, text, 48, seed=4), random(1, 64, seed=5), list(references))


def test_velocity_is_the_derivative_of_mix():
    target, noise, t = random(2, 16, 4, 6), random(2, 16, 4, 6, seed=2), torch.tensor([0.25, 0.5])
    step = torch.full_like(t, 0.125)
    slope = (flow.mix(target, noise, t + step) - flow.mix(target, noise, t)) / 0.125
    assert torch.allclose(slope, noise - target, atol=1e-5)
    assert torch.equal(flow.mix(target, noise, torch.zeros(2)), target)
    assert torch.equal(flow.mix(target, noise, torch.ones(2)), noise)


def test_a_token_is_channel_then_row_then_column():
    tokens = flow.pack(torch.arange(16 * 4 * 6.0).view(1, 16, 4, 6))
    assert tokens[0, 0, :8].tolist() == [0, 1, 6, 7, 24, 25, 30, 31]


def test_unpack_is_the_inverse_of_pack():
    x = random(2, 16, 6, 10)
    assert torch.equal(flow.unpack(flow.pack(x), 6, 10), x)


def test_pack_equals_diffusers():
    pipelines = pytest.importorskip("diffusers").FluxKontextPipeline
    x = random(1, 16, 6, 10)
    assert torch.equal(flow.pack(x), pipelines._pack_latents(x, 1, 16, 6, 10))


def test_ids_are_index_row_column():  # trap 2
    ids = flow.sequence_ids(torch.zeros(1, 16, 4, 6), [torch.zeros(1, 16, 6, 4)])
    target = [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    reference = [[1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1], [1, 2, 0], [1, 2, 1]]
    assert ids.tolist() == target + reference


@pytest.mark.parametrize(
    "sizes, offsets",
    [
        ([(128, 128)] * 4, [(0, 0), (64, 0), (0, 64), (128, 0)]),
        ([(156, 104)] * 2, [(0, 0), (0, 52)]),
        ([(104, 156), (156, 104)], [(0, 0), (52, 0)]),
    ],
)
def test_reference_offsets_are_the_golden_ones(sizes, offsets):
    assert flow.reference_offsets(sizes) == offsets


def test_no_two_tokens_of_several_references_share_a_place():
    references = [torch.zeros(1, 16, h, w) for h, w in [(6, 8), (10, 4), (4, 4), (8, 8)]]
    ids = flow.sequence_ids(torch.zeros(1, 16, 6, 6), references)
    assert len(ids.unique(dim=0)) == len(ids)


@torch.no_grad()
def test_reference_index_matters(flux, monkeypatch):  # trap 2
    x, reference, t, guidance = (
        random(1, 16, 6, 8),
        random(1, 16, 8, 6, seed=2),
        torch.tensor([0.7]),
        torch.tensor([2.5]),
    )
    right = flow.velocity(flux, x, t, condition(reference), guidance)
    ids = flow.sequence_ids(x, [reference])
    monkeypatch.setattr(flow, "sequence_ids", lambda *_: ids * torch.tensor([0, 1, 1]))
    assert error(flow.velocity(flux, x, t, condition(reference), guidance), right) > 1e-2


@torch.no_grad()
def test_order_of_target_and_reference_is_irrelevant_when_ids_follow(flux):  # trap 2
    x, reference, c = random(1, 16, 6, 8), random(1, 16, 8, 6, seed=2), condition()
    t, guidance = torch.tensor([0.7]), torch.tensor([2.5])
    ids, txt_ids, split = flow.sequence_ids(x, [reference]), torch.zeros(7, 3), 12
    tokens = torch.cat([flow.pack(x), flow.pack(reference)], dim=1)
    turned = flux(tokens.roll(-split, 1), ids.roll(-split, 0), c.txt, txt_ids, timesteps=t, y=c.vec, guidance=guidance)
    right = flow.velocity(flux, x, t, condition(reference), guidance)
    assert error(flow.unpack(turned[:, -split:], 6, 8), right) < 1e-6


@torch.no_grad()
def test_every_reference_changes_the_velocity(flux):
    x, t, guidance = random(1, 16, 6, 8), torch.tensor([0.7]), torch.tensor([2.5])
    references = [random(1, 16, 4, 6, seed=i) for i in (2, 3, 4)]
    outputs = [flow.velocity(flux, x, t, condition(*references[:n]), guidance) for n in range(4)]
    assert all(error(b, a) > 1e-2 for a, b in zip(outputs, outputs[1:], strict=False))


@torch.no_grad()
def test_a_batch_is_its_members_one_by_one(flux):
    x, reference, t = random(2, 16, 6, 8), random(2, 16, 4, 4, seed=2), torch.tensor([0.2, 0.9])
    txt, vec, guidance = random(2, 7, 48, seed=4), random(2, 64, seed=5), torch.tensor([1.0, 3.0])
    together = flow.velocity(flux, x, t, Condition(txt, vec, [reference]), guidance)
    for i in range(2):
        one = slice(i, i + 1)
        alone = flow.velocity(flux, x[one], t[one], Condition(txt[one], vec[one], [reference[one]]), guidance[one])
        assert error(together[one], alone) < 1e-5


@pytest.mark.parametrize("tokens, mu", [(256, 0.5), (1024, 0.63), (4096, 1.15), (8192, 1.15 + 0.65 * 4096 / 3840)])
def test_shift_is_linear_in_the_targets_tokens(tokens, mu):
    assert math.log(Shift().factor(tokens)) == pytest.approx(mu, abs=1e-9)


SCHEDULES = {
    (4, 4096): [1, 0.90453076, 0.75951093, 0.51284409, 0],
    (8, 4096): [1, 0.95672369, 0.90453076, 0.84034878, 0.75951093, 0.65456682, 0.51284409, 0.31090108, 0],
    (4, 1024): [1, 0.849235, 0.652489, 0.384945, 0],
}


@pytest.mark.parametrize("steps, tokens", SCHEDULES)
def test_schedule_is_the_golden_one(steps, tokens):  # trap 3
    """4096 tokens are a target of 1024 x 1024, with a reference or without."""
    assert torch.allclose(flow.schedule(steps, tokens), torch.tensor(SCHEDULES[steps, tokens]), atol=1e-6)


def test_schedule_of_28_steps_is_the_golden_one():
    times = flow.schedule(28, 4096)
    assert torch.allclose(times[:4], torch.tensor([1, 0.988409, 0.976222, 0.963394]), atol=1e-6)
    assert torch.allclose(times[-4:], torch.tensor([0.274828, 0.195455, 0.104721, 0]), atol=1e-6)


@pytest.mark.parametrize("steps, tokens", [(1, 12), (28, 4096), (50, 9999)])
def test_schedule_equals_diffusers(steps, tokens):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    sigmas = torch.linspace(1, 1 / steps, steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=0.5 + (tokens - 256) * 0.65 / 3840)
    assert torch.allclose(flow.schedule(steps, tokens), scheduler.sigmas, atol=3e-7)


def test_static_shift_of_1_leaves_time_alone():
    times = flow.schedule(10, 4096, Shift(static=1.0))
    assert torch.allclose(times, torch.linspace(1, 0, 11))


def test_training_times_follow_the_shifted_logit_normal():
    generator = torch.Generator().manual_seed(0)
    t = flow.shift_time(torch.cat([flow.logit_normal(generator) for _ in range(20_000)]), 3.0)
    logits = torch.logit(t.double())  # a shift by a factor adds its logarithm to the logit
    assert float(logits.mean()) == pytest.approx(math.log(3), abs=0.02)
    assert float(logits.std()) == pytest.approx(1, abs=0.02)


def test_noise_of_seed_42_is_the_golden_one():
    noise = flow.draw_noise((1, 16, 128, 128), torch.Generator().manual_seed(42))
    golden = [1.9296875, 1.484375, 0.90234375, -2.109375]
    assert noise.dtype == torch.float32 and noise.flatten()[:4].bfloat16().tolist() == golden
