"""Training that resumes: Muon for matrices and kernels, Adam for the rest (Jordan et al. 2024; Adam's step size)."""

import time
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
LOG_EVERY, SAVE_EVERY = 50, 250  # steps


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: a quintic Newton-Schulz iteration on (rows, columns)."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.mT, steps).mT
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, to an RMS of 0.2 x lr. torch's own takes two axes only, and bfloat16, slow on CPUs."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                update = orthogonalise(p.grad.lerp(momentum, MOMENTUM).flatten(1))
                scale = 0.2 * max(update.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)


class Training:
    """A network and its optimizers: Muon for matrices, Adam for vectors and names in `adam`; it goes on from `file`."""

    def __init__(self, file: Path, name: str, network: nn.Module, rates: tuple[float, float], adam: tuple = ()):
        self.file, self.name, self.network, self.rates = file, name, network, rates
        self.step, self.losses, matrices, others = 0, [], [], []
        for parameter_name, p in network.named_parameters():
            matrix = p.ndim >= 2 and not any(part in parameter_name for part in adam)
            (matrices if matrix else others).append(p)
        muon = Muon(matrices, {"lr": rates[0], "weight_decay": 0.01})
        self.optims = [muon, torch.optim.Adam(others, rates[1], betas=(0.9, 0.98), fused=True)]
        if file.exists():
            state = torch.load(file, weights_only=True)
            network.load_state_dict(state[name])
            for optim, saved in zip(self.optims, state["optims"], strict=True):
                optim.load_state_dict(saved)
            self.step = state["step"]

    def update(self, loss: Tensor, share: float) -> None:
        """One step of both optimizers at `share` of their learning rates; at times a line, or a save."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optim, full in zip(self.optims, self.rates, strict=True):
            optim.param_groups[0]["lr"] = full * share
            optim.step()
            optim.zero_grad()
        self.step += 1
        self.losses.append(loss.item())
        if self.step % LOG_EVERY == 0:
            recent, minutes = mean(self.losses[-LOG_EVERY:]), time.process_time() / 60
            print(f"{self.name} step {self.step} loss {recent:.4f} cpu {minutes:.2f} min", flush=True)
        if self.step % SAVE_EVERY == 0:
            self.save()

    def save(self) -> None:
        """Replace the file."""
        optims = [optim.state_dict() for optim in self.optims]
        save_whole({self.name: self.network.state_dict(), "optims": optims, "step": self.step}, self.file)


def save_whole(content, file: Path) -> None:
    """torch.save under another name first, so that a file is never half written."""
    torch.save(content, file.with_name(file.name + ".tmp"))
    file.with_name(file.name + ".tmp").rename(file)
