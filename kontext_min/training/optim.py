"""Optimizers by the names that users know, the learning rate over time, and the average of what they train."""

import importlib.util
import inspect
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

OPTIMI = ("Adam", "AdamW", "StableAdamW", "Adan", "Lion", "RAdam", "Ranger", "SGD")
OPTIMIZERS = {  # name -> library, class, what differs from the library's defaults
    "adamw": ("torch.optim", "AdamW", {}),
    "adamw_bf16": ("optimi", "AdamW", {"kahan_sum": True}),
    "ao-adamw8bit": ("torchao.optim", "AdamW8bit", {}),
} | {f"optimi-{kind.lower()}": ("optimi", kind, {}) for kind in OPTIMI}


def make_optimizer(name: str, parameters: list[nn.Parameter], lr: float, /, **options) -> torch.optim.Optimizer:
    """An optimizer of OPTIMIZERS. options: arguments of its class, or beta1 and beta2 alone; ValueError on others.
    adamw_bf16 turns matrices to bf16, moments too, and keeps what bf16 rounds away of an update (Kahan). Its beta2 is
    0.99: bf16 cannot decay by 0.999. DoRA's magnitudes stay in fp32: rounded, they would change the untrained model.
    ao-adamw8bit keeps moments in 8 bits, where a parameter has 4096 values or more; it needs no compiler.
    """
    library, kind, special = OPTIMIZERS[name]
    logging.disable(logging.WARNING)  # torchao tells of kernels that it cannot load; none of them is used here
    make = getattr(importlib.import_module(library), kind)
    logging.disable(logging.NOTSET)
    known = {key: value.default for key, value in inspect.signature(make).parameters.items()}
    takes = known.keys() - {"params", "lr", "betas"} | ({"beta1", "beta2"} if "betas" in known else set())
    if unknown := sorted(options.keys() - takes):
        raise ValueError(f"optimizer {name} does not take {', '.join(unknown)}; it takes {', '.join(sorted(takes))}")
    settings = special | {key: value for key, value in options.items() if key in known}
    if "betas" in known:
        first, second, *more = known["betas"]
        settings["betas"] = (options.get("beta1", first), options.get("beta2", second), *more)
    if name == "adamw_bf16":
        for matrix in (parameter for parameter in parameters if parameter.ndim > 1):
            matrix.data = matrix.data.bfloat16()
    optimizer = make(parameters, lr=lr, **settings)
    if library == "torchao.optim" and not (parameters[0].is_cuda and importlib.util.find_spec("triton")):
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr


def rate_factor(name: str, step: int, total: int, warmup=0, end=0.0, power=1.0, cycles=1) -> float:
    """The factor of the learning rate in a step, counted from 0: up linearly in `warmup` steps, then by a curve.
    name: of lr_scheduler; end: what the curve comes down to; power: of polynomial; cycles: of cosines and sines.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    wave = math.pi * (cycles * done % 1.0)
    heights = {  # of the curve between the end's and the full rate; that of the constants is 1
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "cosine_with_restarts": 0.5 * (1.0 + math.cos(wave)),
        "polynomial": (1.0 - done) ** power,
        "sine": math.sin(wave),  # up and down in every cycle
    }
    return end + (1 - end) * heights.get(name, 1.0)


class EMA(nn.Module):
    """An fp32 average of parameters. Its decay warms up: after n updates it is min(decay, (1 + n) / (10 + n))."""

    def __init__(self, averaged: list[nn.Parameter], decay: float):
        super().__init__()
        self.averaged, self.decay = averaged, decay
        self.register_buffer("updates", torch.tensor(0))
        self.shadow = nn.ParameterList(nn.Parameter(p.detach().float().clone(), requires_grad=False) for p in averaged)

    @torch.no_grad()
    def update(self):
        decay = min(self.decay, (1 + self.updates.item()) / (10 + self.updates.item()))
        for average, parameter in zip(self.shadow, self.averaged, strict=True):
            average.lerp_(parameter.float(), 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            for average, parameter in zip(self.shadow, self.averaged, strict=True):
                stack.callback(setattr, parameter, "data", parameter.data)
                parameter.data = average.to(parameter.dtype)
            yield
