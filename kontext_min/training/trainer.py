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
from tqdm import tqdm

from kontext_min import flow
from kontext_min.adapters.inject import muted
from kontext_min.config import Config
from kontext_min.data.cache import digest
from kontext_min.data.examples import Batch, Examples, Use
from kontext_min.models.flux import Flux
from kontext_min.training import state
from kontext_min.training.optim import Schedule, set_rate
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
        generator = torch.Generator().manual_seed(seed_of("noise", config.seed, number, use.index, use.repeat))
        t = flow.shift_time(density(config)(generator), factor)
        noise = flow.draw_noise((1, *batch.target.shape[1:]), generator)
        columns.append((noise, t, guidance(config, generator)))
    return Draw(*(torch.cat(column).to(device) for column in zip(*columns, strict=True)))


def seed_of(*parts: str | int) -> int:
    """A seed made of all the parts together."""
    return int(digest(*map(str, parts))[:15], 16)


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


LOSSES = {  # loss_type -> mean over everything, or each error; c is where huber and smooth_l1 turn linear
    "l2": lambda v, wanted, c, how="mean": F.mse_loss(v, wanted, reduction=how),
    "huber": lambda v, wanted, c, how="mean": F.huber_loss(v, wanted, delta=c, reduction=how),
    "smooth_l1": lambda v, wanted, c, how="mean": F.smooth_l1_loss(v, wanted, beta=c, reduction=how),
}


def flow_loss(flux: Flux, batch: Batch, drawn: Draw, loss_type: str = "l2", c: float = 0.1) -> Tensor:
    """The loss of the velocity over the target's latents, in fp32.

    The velocity to learn is noise - target; of regularisation data it is the base model's own, at the same x_t and t.
    With masks it is the mean, over the uses, of each one's weighted mean.
    """
    noise, t, guidance = drawn
    x_t, wanted = flow.mix(batch.target, noise, t), noise - batch.target
    if batch.regularise:
        with torch.no_grad(), muted(flux):
            wanted = flow.velocity(flux, x_t, t, batch.condition, guidance).float()
    v = flow.velocity(flux, x_t, t, batch.condition, guidance).float()
    if batch.weight is None:
        return LOSSES[loss_type](v, wanted, c)
    return (LOSSES[loss_type](v, wanted, c, "none") * batch.weight).mean()


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

    Raises ValueError when a loss or gradient is no longer finite: the parameters are then still those before it. Up to
    skip_nonfinite_steps such steps are left out instead, counted in metrics.jsonl.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device
    schedule = schedule_of(config)
    numbered = islice(enumerate(batches(examples, config)), start * config.gradient_accumulation_steps, None)
    with Tracker(config, device, start) as tracker:
        for step in range(start, config.max_train_steps):
            began = time.perf_counter()
            loss, seen = 0.0, []
            for number, uses in islice(numbered, config.gradient_accumulation_steps):
                batch = examples.batch(uses, device)
                drawn = draw(batch, uses, number, config, shift)
                torch.manual_seed(seed_of("dropout", config.seed, number))
                part = flow_loss(flux, batch, drawn, config.loss_type, config.huber_c)
                part = part / config.gradient_accumulation_steps
                part.backward()
                loss += part.item()
                seen += zip(uses, drawn.t, strict=True)
            norm = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
            values = {"loss": loss, "grad_norm": norm, "lr": config.learning_rate * schedule.at(step)}
            if math.isfinite(loss) and math.isfinite(norm):
                set_rate(optimizer, values["lr"])
                optimizer.step()
            else:
                skip(config, step + 1, values, seen, tracker)
            optimizer.zero_grad()
            tracker.log(step + 1, **values, seconds=time.perf_counter() - began)
            stop = each_step(step + 1)
            tracker.validated(step + 1)
            if stop:
                return


def schedule_of(config: Config) -> Schedule:
    """The learning rate's curve over this run."""
    end = config.lr_end / config.learning_rate
    steps = (config.max_train_steps, config.lr_warmup_steps)
    return Schedule(config.lr_scheduler, *steps, end, config.lr_power, config.lr_num_cycles)


def skip(config: Config, step: int, values: dict, seen: list[tuple[Use, Tensor]], tracker: Tracker):
    """Turn the values of a step that is not finite into those of a skipped one; ValueError if it is one too many."""
    items = ", ".join(f"{use.example.name} at t = {float(t):.4f}" for use, t in seen)
    what = f"step {step}: the loss is {values['loss']} and the gradient's norm {values['grad_norm']}, of {items}"
    if tracker.skipped >= config.skip_nonfinite_steps:
        kept = state.checkpoints(config.output_dir)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise ValueError(f"{what}; {last}; lower learning_rate, or let a few such steps go by: skip_nonfinite_steps=3")
    values |= {"loss": None, "grad_norm": None, "skipped": True}
    tqdm.write(f"{what}; skipped, {tracker.skipped + 1} of {config.skip_nonfinite_steps}")
