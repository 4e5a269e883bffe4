"""Schedules against their formulae and libraries, optimizers against fp64 references written from their papers."""

import io
import math
import subprocess
import sys
from typing import get_args

import pytest
import torch

from kontext_min.config import Config
from kontext_min.training.optim import OPTIMIZERS, make_optimizer, rate_factor, set_rate

STEPS, LR = 50, 1e-2


def gradient(step: int, count: int) -> torch.Tensor:
    """Noise around a slope, so that moments have something to remember."""
    generator = torch.Generator().manual_seed(step)
    return 0.3 * torch.randn(count, generator=generator) + torch.linspace(-1, 1, count)


def run(name, count=20, lr=LR, steps=range(STEPS), **options):
    """A matrix of one column under known gradients: where it starts, where it ends, and its optimizer."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, count).bfloat16().float()[:, None])
    optimizer = make_optimizer(name, [parameter], lr, **options)
    start = parameter.detach().double().flatten()
    drive(parameter, optimizer, steps)
    return start, parameter.detach().flatten(), optimizer


def drive(parameter, optimizer, steps):
    for step in steps:
        parameter.grad = gradient(step, len(parameter)).to(parameter.dtype).view_as(parameter)
        optimizer.step()


def adam(x, lr=LR, betas=(0.9, 0.999), decay=0.01, eps=1e-8, steps=STEPS):
    """AdamW (arXiv 1711.05101), in fp64."""
    m = v = torch.zeros_like(x)
    for t in range(1, steps + 1):
        g = gradient(t - 1, len(x)).double()
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        x = x * (1 - lr * decay) - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return x


def stableadamw(x, betas=(0.9, 0.99), decay=0.01, eps=1e-6):
    """AdamW whose rate is divided by the RMS of g / sqrt(v) where that is above 1 (arXiv 2304.13013)."""
    m = v = torch.zeros_like(x)
    for t in range(1, STEPS + 1):
        g = gradient(t - 1, len(x)).double()
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas)  # debiased
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        lr = LR / max(1, float((g * g / v.clamp(min=eps**2)).mean().sqrt()))
        x = x * (1 - lr * decay) - lr * m / (v.sqrt() + eps)
    return x


def adan(x, betas=(0.98, 0.92, 0.99), decay=0.02, eps=1e-6):
    """Adan (arXiv 2208.06677), with Adam's bias corrections of its three moments."""
    m = d = n = torch.zeros_like(x)
    last = None
    for t in range(1, STEPS + 1):
        g = gradient(t - 1, len(x)).double()
        change = torch.zeros_like(x) if last is None else g - last
        m = betas[0] * m + (1 - betas[0]) * g
        d = betas[1] * d + (1 - betas[1]) * change
        n = betas[2] * n + (1 - betas[2]) * (g + betas[1] * change) ** 2
        first, second, third = (k / (1 - b**t) for k, b in zip((m, d, n), betas, strict=True))
        x = (x - LR * (first + betas[1] * second) / (third.sqrt() + eps)) / (1 + LR * decay)
        last = g
    return x


def radam(x, betas=(0.9, 0.99), eps=1e-6, k=0, alpha=0.5):
    """RAdam (arXiv 1908.03265); with k, a step of Lookahead (arXiv 1907.08610) every k steps: Ranger."""
    m = v = torch.zeros_like(x)
    slow, longest = x, 2 / (1 - betas[1]) - 1
    for t in range(1, STEPS + 1):
        g = gradient(t - 1, len(x)).double()
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        rho = longest - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
        update = m / (1 - betas[0] ** t)
        if rho > 5:
            r = ((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)) ** 0.5
            update = r * update / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        x = x - LR * update
        if k and t % k == 0:
            slow = slow + alpha * (x - slow)
            x = slow
    return x


def lion(x):
    """Lion (arXiv 2302.06675) with betas 0.9 and 0.99."""
    m = torch.zeros_like(x)
    for step in range(STEPS):
        g = gradient(step, len(x)).double()
        x = x - LR * (0.9 * m + 0.1 * g).sign()
        m = 0.99 * m + 0.01 * g
    return x


def sgd(x):
    """Plain gradient descent."""
    return x - LR * sum(gradient(step, len(x)).double() for step in range(STEPS))


REFERENCES = {
    "adamw": adam,
    "optimi-adam": lambda x: adam(x, betas=(0.9, 0.99), decay=0, eps=1e-6),
    "optimi-adamw": lambda x: adam(x, betas=(0.9, 0.99), eps=1e-6),
    "optimi-stableadamw": stableadamw,
    "optimi-adan": adan,
    "optimi-lion": lion,
    "optimi-radam": radam,
    "optimi-ranger": lambda x: radam(x, k=6),
    "optimi-sgd": sgd,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_fifty_steps_are_the_paper_s(name):
    start, end, _ = run(name)
    torch.testing.assert_close(end.double(), REFERENCES[name](start), rtol=1e-5, atol=2e-6)


def test_every_optimizer_has_a_reference():
    assert set(REFERENCES) | {"adamw_bf16", "ao-adamw8bit"} == set(OPTIMIZERS)


def moved_wrongly(start, end, expected) -> float:
    return float((end - expected).norm() / (expected - start).norm())


def test_adamw_in_bf16_keeps_what_bf16_rounds_away():
    start, end, optimizer = run("adamw_bf16", 2000, lr=1e-4)
    expected = adam(start, 1e-4, (0.9, 0.99), 0.01, 1e-6)
    assert end.dtype == torch.bfloat16
    (state,) = optimizer.state.values()
    assert moved_wrongly(start, end.double() + state["kahan_comp"].double().flatten(), expected) < 0.02
    start, end, _ = run("adamw_bf16", 2000, lr=1e-4, kahan_sum=False)
    assert moved_wrongly(start, end.double(), expected) > 0.9  # plain bf16 hardly moves
    # over a longer run the parameter itself follows
    start, end, _ = run("adamw_bf16", 2000, lr=1e-4, steps=range(1000))
    assert moved_wrongly(start, end.double(), adam(start, 1e-4, (0.9, 0.99), 0.01, 1e-6, steps=1000)) < 0.06


def test_adamw_in_bf16_leaves_magnitudes_in_fp32_and_moves_them_as_adamw_does():
    matrix, magnitude = torch.nn.Parameter(torch.zeros(20, 2)), torch.nn.Parameter(torch.linspace(0.5, 2, 20))
    start = magnitude.detach().double()
    optimizer = make_optimizer("adamw_bf16", [matrix, magnitude], LR)
    for step in range(STEPS):
        matrix.grad, magnitude.grad = torch.ones_like(matrix), gradient(step, 20)
        optimizer.step()
    assert (matrix.dtype, magnitude.dtype) == (torch.bfloat16, torch.float32) and (matrix < 0).all()
    expected = adam(start, LR, (0.9, 0.99), 0.01, 1e-6)
    torch.testing.assert_close(magnitude.detach().double(), expected, rtol=1e-5, atol=2e-6)


def test_adamw_with_moments_in_8_bits_stays_near_the_exact_one():
    start, end, optimizer = run("ao-adamw8bit", 8192)
    (state,) = optimizer.state.values()
    kept = sum(part.numel() * part.element_size() for part in (state["exp_avg"].codes, state["exp_avg_sq"].codes))
    assert kept == 2 * 8192
    assert moved_wrongly(start, end.double(), adam(start)) < 0.03


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_goes_on_bit_for_bit_at_another_rate(name):
    def half(name, steps):
        _, parameter, optimizer = run(name, 4096, steps=steps)
        set_rate(optimizer, LR / 2)
        return torch.nn.Parameter(parameter.clone()[:, None]), optimizer

    parameter, first = half(name, range(20))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    (original,) = first.param_groups[0]["params"]
    drive(original, first, range(20, 40))
    second = make_optimizer(name, [parameter], LR)
    second.load_state_dict(torch.load(file, weights_only=True))
    drive(parameter, second, range(20, 40))
    assert torch.equal(parameter, original)


def test_options_reach_the_optimizer_and_unknown_ones_are_named():
    start, end, _ = run("optimi-adamw", beta2=0.95, weight_decay=0.1)
    torch.testing.assert_close(end.double(), adam(start, betas=(0.9, 0.95), decay=0.1, eps=1e-6), rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match="adamw does not take lr; it takes amsgrad, beta1, beta2, .*weight_decay$"):
        make_optimizer("adamw", [torch.zeros(1)], LR, lr=LR)
    with pytest.raises(ValueError, match="optimi-lion does not take k; it takes "):
        run("optimi-lion", k=3)
    with pytest.raises(ValueError, match="optimi-sgd does not take beta1"):
        run("optimi-sgd", beta1=0.5)


def test_nothing_is_written_to_the_screen_when_torchao_is_loaded():
    code = (
        "import torch; from kontext_min.training.optim import make_optimizer as make\n"
        "p = torch.nn.Parameter(torch.ones(5)); o = make('ao-adamw8bit', [p], 0.1); p.grad = torch.ones(5); o.step()\n"
        "import logging; assert not logging.root.manager.disable"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_warm_up_rises_linearly_and_every_curve_goes_its_way():
    assert [rate_factor("constant", step, 100, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    linear = [rate_factor("linear", step, 104, 4, end=0.2) for step in (3, 4, 54, 104)]
    assert linear == pytest.approx([1, 1, 0.6, 0.2])
    sine = [rate_factor("sine", step, 100, cycles=2, end=0.1) for step in (0, 25, 60, 50)]
    assert sine == pytest.approx([0.1 + 0.9 * math.sin(math.pi * share) for share in (0, 0.5, 0.2, 0)])


SCHEDULES = set(get_args(Config.model_fields["lr_scheduler"].annotation))


@pytest.mark.parametrize("name", sorted(SCHEDULES - {"sine", "constant"}))
def test_curves_are_those_of_diffusers(name):
    optimization = pytest.importorskip("diffusers.optimization")
    end = 1e-7 / LR if name == "polynomial" else 0.0
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    steps = {"num_warmup_steps": 10, "num_training_steps": 100}
    theirs = optimization.get_scheduler(name, optimizer, **steps, num_cycles=3, power=0.8)
    for step in range(100):
        if step >= 10:  # theirs begins at 0, which is a step without effect, and ours at 1 / warmup
            assert LR * rate_factor(name, step, 100, 10, end, power=0.8, cycles=3) == pytest.approx(
                optimizer.param_groups[0]["lr"], abs=1e-9
            )
        optimizer.step()
        theirs.step()
