"""The Euler loop and true classifier-free guidance."""

import pytest
import tiny
import torch
from tiny import CPU, FP32, random

from kontext_min import flow
from kontext_min.checkpoints.load import load_flux
from kontext_min.flow import Condition
from kontext_min.sampler import Sampling, euler, guided


@pytest.fixture(scope="module")
def flux(kontext):
    return load_flux(tiny.part(kontext, "transformer"), CPU, FP32)


def text(seed: int) -> Condition:
    return Condition(random(1, 7, 48, seed=seed), random(1, 64, seed=seed + 1), [random(1, 16, 4, 4, seed=9)])


def test_straight_paths_are_integrated_exactly_in_any_number_of_steps():
    noise, target = random(1, 16, 4, 4), random(1, 16, 4, 4, seed=2)
    for steps in (1, 2, 7):
        *_, x = euler(lambda x, t, progress: noise - target, noise, flow.schedule(steps, 4096))
        assert torch.allclose(x, target, atol=1e-5)


def test_euler_yields_every_step_and_calls_the_field_at_its_beginning():
    seen = []
    field = lambda x, t, progress: seen.append((float(t[0]), progress)) or x  # noqa: E731
    times = torch.tensor([1.0, 0.5, 0.25, 0.0])
    states = list(euler(field, torch.ones(2, 16, 2, 2), times))
    assert len(states) == 3 and seen == [(1.0, 0.0), (0.5, 1 / 3), (0.25, 2 / 3)]
    assert float(states[-1].mean()) == pytest.approx(0.5 * 0.75 * 0.75)


def test_state_stays_in_fp32(flux):
    half = flux.bfloat16()
    c = Condition(text(1).txt.bfloat16(), text(1).vec.bfloat16(), text(1).references)
    states = list(euler(guided(half, c, None, Sampling(steps=2)), random(1, 16, 4, 6), flow.schedule(2, 6)))
    flux.float()
    assert {x.dtype for x in states} == {torch.float32}


@torch.no_grad()
def test_true_cfg_leads_away_from_the_negative(flux):
    x, t, sampling = random(1, 16, 4, 6), torch.tensor([0.6]), Sampling(guidance=2.0, cfg_scale=3.0)
    positive, negative = text(1), text(5)
    v = flow.velocity(flux, x, t, positive, torch.tensor([2.0]))
    v_negative = flow.velocity(flux, x, t, negative, torch.tensor([2.0]))
    expected = v_negative + 3.0 * (v - v_negative)
    assert torch.allclose(guided(flux, positive, negative, sampling)(x, t, 0.0), expected, atol=1e-5)


@torch.no_grad()
def test_true_cfg_acts_only_inside_its_range(flux):
    x, t = random(1, 16, 4, 6), torch.tensor([0.6])
    field = guided(flux, text(1), text(5), Sampling(cfg_scale=3.0, cfg_range=(0.25, 0.5)))
    plain = guided(flux, text(1), None, Sampling())(x, t, 0.0)
    on = [not torch.equal(field(x, t, progress), plain) for progress in (0, 0.2, 0.25, 0.4, 0.5, 0.9)]
    assert on == [False, False, True, True, False, False]


@torch.no_grad()
def test_the_whole_range_is_every_step(flux):
    """progress is at most (steps - 1) / steps, so that the half-open range 0-1 holds all."""
    x, t = random(1, 16, 4, 6), torch.tensor([0.6])
    field = guided(flux, text(1), text(5), Sampling(cfg_scale=3.0))
    assert torch.equal(field(x, t, 0.99), field(x, t, 0.0))
