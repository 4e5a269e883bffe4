"""From noise to a picture's latents: the Euler method over any velocity field, with true classifier-free guidance.

Pure functions of callables: `guided` makes a velocity field of a transformer and conditions, `euler` integrates one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kontext_min import flow
from kontext_min.models.flux import Flux

Field = Callable[[Tensor, Tensor, float], Tensor]  # (x_t, t, progress from 0 to 1) -> velocity


@dataclass(frozen=True)
class Sampling:
    """How to sample: `guidance` is the distilled embedding, `cfg_scale` true CFG (twice the work, off at 1)."""

    steps: int = 28
    guidance: float = 2.5
    cfg_scale: float = 1.0
    cfg_range: tuple[float, float] = (0.0, 1.0)  # the share of the steps, from first to last, with true CFG
    seed: int = 0


def guided(flux: Flux, condition: flow.Condition, negative: flow.Condition | None, sampling: Sampling) -> Field:
    """The velocity field of a condition; with a negative one, v_neg + cfg_scale * (v - v_neg) inside cfg_range."""
    first, last = sampling.cfg_range

    def field(x: Tensor, t: Tensor, progress: float) -> Tensor:
        guidance = torch.full_like(t, sampling.guidance)
        v = flow.velocity(flux, x, t, condition, guidance).float()
        if negative is None or sampling.cfg_scale == 1 or not first <= progress < last:
            return v
        v_negative = flow.velocity(flux, x, t, negative, guidance).float()
        return v_negative + sampling.cfg_scale * (v - v_negative)

    return field


@torch.no_grad()
def euler(field: Field, x: Tensor, times: Tensor) -> Iterator[Tensor]:
    """Integrate dx/dt = field from times[0] to times[-1], yielding x after every step.
    x (B, 16, h, w) fp32, noise at t = 1; times (steps + 1,), falling. The state stays in fp32.
    """
    for i, (t, after) in enumerate(pairwise(times.to(x.device))):
        x = x + (after - t) * field(x, t.expand(x.shape[0]), i / (len(times) - 1))
        yield x
