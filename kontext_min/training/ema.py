"""The exponential moving average of the adapter: smoother than its last step, and often what one ships."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class EMA(nn.Module):
    """An fp32 average of parameters. Its decay warms up: after n updates it is min(decay, (1 + n) / (10 + n))."""

    def __init__(self, averaged: list[nn.Parameter], decay: float):
        super().__init__()
        self.averaged, self.decay = averaged, decay
        self.register_buffer("updates", torch.tensor(0))
        self.shadow = nn.ParameterList(nn.Parameter(p.detach().float().clone(), requires_grad=False) for p in averaged)

    @torch.no_grad()
    def update(self):
        """Take in the parameters as they are now."""
        decay = min(self.decay, (1 + self.updates.item()) / (10 + self.updates.item()))
        for average, parameter in zip(self.shadow, self.averaged, strict=True):
            average.lerp_(parameter.float(), 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the parameters are the average."""
        kept = [(parameter, parameter.data) for parameter in self.averaged]
        for average, parameter in zip(self.shadow, self.averaged, strict=True):
            parameter.data = average.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data
