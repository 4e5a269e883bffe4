"""How fast a training step and an evaluation are beside diffusers + peft: python tests/benchmarks/step.py [--help].

Both run in one process on one thread, in turn, and the ratio of a pair's process CPU times is taken: what else the
machine does cancels out. The peer trains with its own gradient checkpointing, and evaluates with its LoRA not merged;
ours evaluates so too (none), and with the LoRA in its weights (merged).
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import arms
import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
POLICIES = ("block", "keep_attn", "keep_gemm", "none")


def work(name: str, dtype: torch.dtype) -> Callable[[], None]:
    """One step of an arm; `NAME lora` is an evaluation without gradients."""
    given = arms.inputs(arms.SMALL, dtype)
    torch.set_default_dtype(dtype)
    model = arms.arm(name.removesuffix(" lora"), arms.SMALL.config)
    torch.set_default_dtype(torch.float32)
    if name.endswith(" lora"):
        return torch.no_grad()(lambda: arms.run(model, given))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True)

    def step():
        arms.loss(model, given).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ratios(names: list[str], dtype: torch.dtype, pairs: int) -> dict[str, list[float]]:
    """The first arm's CPU seconds over each other's, of steps that follow each other; the first round warms up."""
    steps, times = {name: work(name, dtype) for name in names}, {name: [] for name in names}
    for _ in range(pairs + 1):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            times[name].append(time.process_time() - begun)
    first = times[names[0]][1:]
    print(f"{names[0]}: {statistics.median(first):.2f} s")
    return {name: [a / b for a, b in zip(first, times[name][1:], strict=True)] for name in names[1:]}


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def grown(name: str, dtype: torch.dtype, steps: int = 4) -> float:
    """By how many MB this process grows over the model in some steps."""
    step = work(name, dtype)
    before, peak, done = anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.004):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(steps):
        step()
    done.set()
    watcher.join()
    return (peak - before) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--grown", metavar="ARM", help="only by how many MB a process of this arm grows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dtype = DTYPES[given.dtype]
    if given.grown:
        return print(grown(given.grown, dtype))
    for name in ("peer", *given.policies):  # each in a process of its own
        asked = [sys.executable, __file__, "--dtype", given.dtype, "--grown", name]
        answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[-1]
        print(f"{name:10} grows by {float(answer):.0f} MB in training", flush=True)
    for names in (["peer", *given.policies], ["peer lora", "none lora", "merged lora"]):
        for name, values in ratios(names, dtype, given.pairs).items():
            low, middle, high = min(values), statistics.median(values), max(values)
            print(f"{name:10} {middle:.3f} times as fast as the peer ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
