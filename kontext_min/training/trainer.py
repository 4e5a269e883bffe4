"""The training loop: mix a target with noise, predict the velocity, compare, step.

Every random draw is a function of (seed, batch number, example), so that a run can be repeated to the last bit.
"""

import math
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext_min import flow
from kontext_min.adapters.inject import muted
from kontext_min.config import Config
from kontext_min.data.cache import digest
from kontext_min.data.examples import Batch, Examples, Use
from kontext_min.models.flux import Flux
from kontext_min.training.optim import rate
from kontext_min.training.track import Tracker


def batches(examples: Examples, config: Config) -> Iterator[list[Use]]:
    """Batch 0, 1, 2, …: epoch after epoch."""
    for epoch in count():
        yield from examples.epoch(epoch, config.train_batch_size)


class Draw(NamedTuple):
    """What is random in one batch, on its device."""

    noise: Tensor  # (B, 16, h, w)
    t: Tensor  # (B,)
    guidance: Tensor  # (B,)


def draw(batch: Batch, uses: list[Use], number: int, config: Config, shift: flow.Shift) -> Draw:
    """The noise, times and guidance of batch `number`, each use's by a generator of its own."""
    factor, device = shift_factor(config, shift, batch), batch.target.device
    columns = []
    for use in uses:
        seed = digest("noise", str(config.seed), str(number), str(use.index), str(use.repeat))
        generator = torch.Generator().manual_seed(int(seed[:15], 16))
        t = flow.shift_time(density(config)(generator), factor)
        noise = flow.draw_noise((1, *batch.target.shape[1:]), generator)
        columns.append((noise, t, guidance(config, generator)))
    return Draw(*(torch.cat(column).to(device) for column in zip(*columns, strict=True)))


def density(config: Config) -> flow.Density:
    """How times are drawn."""
    if config.flow_use_uniform_schedule:
        return flow.uniform()
    if config.flow_use_beta_schedule:
        return flow.beta(config.flow_beta_schedule_alpha, config.flow_beta_schedule_beta)
    return flow.logit_normal(config.flow_sigmoid_scale)


def guidance(config: Config, generator: torch.Generator) -> Tensor:
    """(1,) the distilled guidance of one use."""
    if config.flux_guidance_mode == "constant":
        return torch.tensor([config.flux_guidance_value])
    low, high = config.flux_guidance_min, config.flux_guidance_max
    return low + (high - low) * torch.rand(1, generator=generator)


LOSSES = {  # loss_type -> mean over everything; c is where huber and smooth_l1 turn linear
    "l2": lambda v, wanted, c: F.mse_loss(v, wanted),
    "huber": lambda v, wanted, c: F.huber_loss(v, wanted, delta=c),
    "smooth_l1": lambda v, wanted, c: F.smooth_l1_loss(v, wanted, beta=c),
}


def flow_loss(flux: Flux, batch: Batch, drawn: Draw, loss_type: str = "l2", c: float = 0.1) -> Tensor:
    """The loss of the velocity over the target's latents, in fp32.

    The velocity to learn is noise - target; of regularisation data it is the base model's own, at the same x_t and t.
    """
    noise, t, guidance = drawn
    x_t, wanted = flow.mix(batch.target, noise, t), noise - batch.target
    if batch.regularise:
        with torch.no_grad(), muted(flux):
            wanted = flow.velocity(flux, x_t, t, batch.condition, guidance).float()
    return LOSSES[loss_type](flow.velocity(flux, x_t, t, batch.condition, guidance).float(), wanted, c)


def shift_factor(config: Config, shift: flow.Shift, batch: Batch) -> float:
    """The time shift of a batch: the config's number, or by the target's tokens as the sampler has it."""
    if config.flow_schedule_shift == "auto":
        return shift.factor(flow.token_count(*batch.target.shape[-2:]))
    return config.flow_schedule_shift


def train(
    config: Config,
    flux: Flux,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    shift: flow.Shift,
    start: int = 0,
    each_step: Callable[[int], bool | None] = lambda step: None,
):
    """Optimizer steps start + 1 to max_train_steps; each_step(n) is called after the n-th and ends the run with True.

    Raises ValueError when a loss or gradient is no longer finite: the parameters are then still those before it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device
    numbered = islice(enumerate(batches(examples, config)), start * config.gradient_accumulation_steps, None)
    with Tracker(config, device, start) as tracker:
        for step in range(start, config.max_train_steps):
            began = time.perf_counter()
            loss = 0.0
            for number, uses in islice(numbered, config.gradient_accumulation_steps):
                batch = examples.batch(uses, device)
                drawn = draw(batch, uses, number, config, shift)
                part = flow_loss(flux, batch, drawn, config.loss_type, config.huber_c)
                part = part / config.gradient_accumulation_steps
                part.backward()
                loss += part.item()
            norm = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise ValueError(
                    f"step {step + 1}: the loss is {loss} and the gradient's norm {norm}; lower learning_rate"
                )
            share = rate(config.lr_scheduler, step, config.max_train_steps, config.lr_warmup_steps)
            lr = config.learning_rate * share
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            tracker.log(step + 1, loss=loss, grad_norm=norm, lr=lr, seconds=time.perf_counter() - began)
            stop = each_step(step + 1)
            tracker.validated(step + 1)
            if stop:
                return
