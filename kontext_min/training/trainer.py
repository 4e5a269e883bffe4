"""The training loop: mix a target with noise, predict the velocity, compare, step.

Every random draw is a function of (seed, batch number, example), so that a run can be repeated to the last bit.
"""

import math
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, count, islice, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from kontext_min import flow, parallel
from kontext_min.adapters.inject import muted
from kontext_min.config import Config
from kontext_min.data.cache import digest
from kontext_min.data.examples import Batch, Examples, Use
from kontext_min.edit import Editor
from kontext_min.models.flux import Flux
from kontext_min.training.optim import rate_factor, set_rate


def train(
    config: Config, editor: Editor, optimizer: Optimizer, examples: Examples, start: int = 0, skipped: int = 0
) -> Iterator[tuple[int, dict]]:
    """Optimizer steps start + 1 to max_train_steps, each yielded with its numbers when it is done.
    A step takes gradient_accumulation_steps batches on every rank. ValueError says when a loss or gradient is no longer
    finite: the parameters are then still those before it. Up to skip_nonfinite_steps such steps, `skipped` of them
    before the start, are left out instead: their loss is None.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own, share = config.gradient_accumulation_steps, config.gradient_accumulation_steps * parallel.world()
    curve = (config.lr_end / config.learning_rate, config.lr_power, config.lr_num_cycles)
    ready = (one for one, _ in pairwise(prepared(config, editor, examples, start * share)))
    for step in range(start + 1, config.max_train_steps + 1):
        began = time.perf_counter()
        losses, seen = zip(*(learn(config, editor.flux, *one, share) for one in islice(ready, own)), strict=True)
        loss = parallel.total(sum(losses))
        parallel.summed([parameter.grad for parameter in parameters])
        norm = float(parallel.whole(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)))
        factor = rate_factor(config.lr_scheduler, step - 1, config.max_train_steps, config.lr_warmup_steps, *curve)
        values = {"loss": loss, "grad_norm": norm, "lr": config.learning_rate * factor}
        if math.isfinite(loss) and math.isfinite(norm):
            set_rate(optimizer, values["lr"])
            optimizer.step()
        else:
            shown = ", ".join(name for names in parallel.gathered(seen) for name in names)
            what = f"step {step}: the loss is {loss} and the gradient's norm {norm}, of {shown}"
            if skipped >= config.skip_nonfinite_steps:
                raise ValueError(f"{what}; lower learning_rate, or let a few such steps go by: skip_nonfinite_steps=3")
            skipped += 1
            tqdm.write(f"{what}; skipped, {skipped} of {config.skip_nonfinite_steps}")
            values |= {"loss": None, "grad_norm": None, "skipped": True}
        optimizer.zero_grad()
        yield step, {**values, "seconds": time.perf_counter() - began}


def prepared(config: Config, editor: Editor, examples: Examples, first: int) -> Iterator[tuple]:
    """This rank's batches from number `first` on, without end: number, uses, the batch on its device, and its draw."""
    for number, uses in islice(enumerate(batches(examples, config)), first + parallel.rank(), None, parallel.world()):
        batch = examples.batch(uses, parallel.place(editor.flux))
        drawn = draw(batch, uses, number, config, editor.shift)
        editor.ahead(drawn.t, batch.condition.vec, drawn.guidance)
        yield number, uses, batch, drawn


def learn(
    config: Config, flux: Flux, number: int, uses: list[Use], batch: Batch, drawn: "Draw", share: int
) -> tuple[float, str]:
    """Add the gradient of batch `number`, one of `share`, to what there is. -> its part of the loss, and what it is."""
    torch.manual_seed(seeded("dropout", config.seed, number).initial_seed())
    loss = flow_loss(flux, batch, drawn, config.loss_type, config.huber_c) / share
    loss.backward()
    seen = [f"{use.example.name} at t = {t:.4f}" for use, t in zip(uses, drawn.t.tolist(), strict=True)]
    return loss.item(), ", ".join(seen)


def batches(examples: Examples, config: Config) -> Iterator[list[Use]]:
    return chain.from_iterable(examples.epoch(epoch, config.train_batch_size) for epoch in count())


class Draw(NamedTuple):
    """What is random in one batch, on its device."""

    noise: Tensor  # (B, 16, h, w)
    t: Tensor  # (B,)
    guidance: Tensor  # (B,)


def draw(batch: Batch, uses: list[Use], number: int, config: Config, shift: flow.Shift) -> Draw:
    factor, columns = shift_factor(config, shift, batch), []
    for use in uses:
        generator = seeded("noise", config.seed, number, use.index, use.repeat)
        t = flow.shift_time(time_of(config, generator), factor)
        noise = flow.draw_noise((1, *batch.target.shape[1:]), generator)
        columns.append((noise, t, guidance(config, generator)))
    return Draw(*(torch.cat(column).to(batch.target.device) for column in zip(*columns, strict=True)))


def seeded(*parts: str | int) -> torch.Generator:  # a generator whose seed is made of all the parts together
    return torch.Generator().manual_seed(int(digest(*map(str, parts))[:15], 16))


def time_of(config: Config, generator: torch.Generator) -> Tensor:  # (1,) of one use, before the shift
    if config.flow_use_uniform_schedule:
        return flow.uniform(generator)
    if config.flow_use_beta_schedule:
        return flow.beta(generator, config.flow_beta_schedule_alpha, config.flow_beta_schedule_beta)
    return flow.logit_normal(generator, config.flow_sigmoid_scale)


def shift_factor(config: Config, shift: flow.Shift, batch: Batch) -> float:
    """The time shift of a batch: the config's number, or by the target's tokens as the sampler has it."""
    fixed = config.flow_schedule_shift
    return shift.factor(flow.token_count(*batch.target.shape[-2:])) if fixed == "auto" else fixed


def guidance(config: Config, generator: torch.Generator) -> Tensor:  # (1,) the distilled guidance of one use
    if config.flux_guidance_mode == "constant":
        return torch.tensor([config.flux_guidance_value])
    low, high = config.flux_guidance_min, config.flux_guidance_max
    return low + (high - low) * torch.rand(1, generator=generator)


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
    kinds = {"l2": F.mse_loss, "huber": partial(F.huber_loss, delta=c), "smooth_l1": partial(F.smooth_l1_loss, beta=c)}
    errors = kinds[loss_type](v, wanted, reduction="none")
    return (errors if batch.weight is None else errors * batch.weight).mean()
