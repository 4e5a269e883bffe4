"""The exponential moving average of the adapter: smoother than its last step, and often what one ships."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """An fp32 average of parameters. Its decay warms up: after n updates it is min(decay, (1 + n) / (10 + n))."""

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.shadow = [parameter.detach().float().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self):
        """Take in the parameters as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self.shadow, self.parameters, strict=True):
            average.lerp_(parameter.float(), 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the parameters are the average."""
        kept = [(parameter, parameter.data) for parameter in self.parameters]
        for average, parameter in zip(self.shadow, self.parameters, strict=True):
            parameter.data = average.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict):
        """Go on from a checkpoint."""
        self.updates = state["updates"]
        for average, saved in zip(self.shadow, state["shadow"], strict=True):
            average.copy_(saved)
