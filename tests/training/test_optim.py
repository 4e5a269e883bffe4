"""Schedules against their formulae, optimizers against the libraries' own and a written-out reference."""

import math

import pytest
import torch

from kontext_min.training.optim import make_optimizer, rate


def test_warm_up_rises_linearly_and_every_schedule_goes_its_way():
    assert [rate("constant", step, 100, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [rate("linear", step, 104, 4) for step in (4, 54, 103)] == pytest.approx([1, 0.5, 0.01])
    assert [rate("cosine", step, 100, 0) for step in (0, 50, 99)] == pytest.approx(
        [1, 0.5, (1 + math.cos(0.99 * math.pi)) / 2]
    )


def run(name, steps=50):
    """A parameter under known gradients."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(20))
    optimizer = make_optimizer(name, [parameter], 1e-2, (0.9, 0.95), 0.1, 1e-8)
    start, gradients = parameter.detach().clone(), [torch.randn(20) for _ in range(steps)]
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return start.double(), [g.double() for g in gradients], parameter.detach()


def test_adamw_is_the_paper_s():
    x, gradients, result = run("adamw")
    m = v = torch.zeros(20, dtype=torch.float64)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        x = x * (1 - 1e-2 * 0.1) - 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    torch.testing.assert_close(result, x.float(), rtol=1e-5, atol=1e-6)


def test_lion_is_the_paper_s():
    x, gradients, result = run("optimi-lion")
    m = torch.zeros(20, dtype=torch.float64)
    for g in gradients:
        x = x - 1e-2 * (0.9 * m + 0.1 * g).sign()
        m = 0.99 * m + 0.01 * g
    torch.testing.assert_close(result, x.float(), rtol=1e-5, atol=1e-6)
