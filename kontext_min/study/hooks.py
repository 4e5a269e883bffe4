"""Record, replace and ablate what flows through named modules of the plain model, with nothing left behind.

Context managers that put hooks on the modules whose names fit a pattern: a dotted name in which `*` stands for one
word. `*_blocks.*` are all blocks, `*_blocks.*.attend` their attention. Steps count the evaluations of the model since
the `with`, from 0 (true CFG takes two a step); `steps` are those that matter, without it all of them.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kontext_min.models.flux import Flux, apply_rope

Steps = Collection[int] | None


class Call(NamedTuple):
    """One call of a named module: `attend` takes q, k, v (B, H, L, D) and pe, and gives (B, L, H*D), text first.
    A double block takes img, txt, vec, pe and gives (img, txt); a single one x, vec, pe and x (B, L, hidden).
    """

    site: str
    step: int
    inputs: tuple
    output: Any


def sites(flux: Flux, pattern: str) -> list[str]:
    """Names of the modules that fit a pattern. Raises ValueError where there are none."""
    words, names = pattern.split("."), [name.split(".") for name, _ in flux.named_modules()]
    found = [".".join(own) for own in names if len(own) == len(words) and all(map(fnmatchcase, own, words))]
    if not found:
        some = ", ".join(name for name, _ in flux.named_children())
        raise ValueError(f"no module is called {pattern!r}; names begin with {some}, and * stands for one word")
    return found


@contextmanager
def replace(flux: Flux, pattern: str, fn: Callable[[Call], Any], steps: Steps = None) -> Iterator[None]:
    """Within the context fn(call) is the output of every module that fits; None leaves an output as it is."""
    step = -1

    def advance(_, args: tuple, inputs: dict) -> tuple[tuple, dict]:
        nonlocal step
        step += 1
        return args, inputs | {"wanted": None}  # the last block's tokens too are all of them

    def called(site: str, _, inputs: tuple, output: Any) -> Any:
        return fn(Call(site, step, inputs, output)) if steps is None or step in steps else None

    with ExitStack() as stack:
        stack.enter_context(flux.register_forward_pre_hook(advance, with_kwargs=True))
        for site in sites(flux, pattern):
            stack.enter_context(flux.get_submodule(site).register_forward_hook(partial(called, site)))
        yield


@contextmanager
def record(
    flux: Flux, pattern: str, what: Callable[[Call], Any] = lambda call: call.output, steps: Steps = None
) -> Iterator[dict[str, dict[int, Any]]]:
    """Within the context what(call) of every module that fits is kept: site -> step -> value. Outputs do not change."""
    kept = {site: {} for site in sites(flux, pattern)}
    with replace(flux, pattern, lambda call: kept[call.site].update({call.step: what(call)}), steps):
        yield kept


@contextmanager
def average(flux: Flux, pattern: str, what: Callable[[Call], Tensor]) -> Iterator[dict[str, Tensor]]:
    """As `record`, but only the mean over all steps is kept, as it grows: site -> mean."""
    means = {}

    def keep(call: Call):
        mean = means.get(call.site, 0)
        means[call.site] = mean + (what(call) - mean) / (call.step + 1)

    with replace(flux, pattern, keep):
        yield means


def attention(queries=slice(None), keys=slice(None), mean: bool = False, chunk: int = 64) -> Callable[[Call], Tensor]:
    """What `attend` looks at: softmax(q k^T / sqrt(D)) of some queries at some keys, (B, H, Q, K) fp32.
    mean: of the queries, (B, H, K). The softmax is over all L keys, for `chunk` queries at a time: exact, and beside
    the result at most two arrays of B * H * chunk * L numbers are held (and fp32 copies of q and k). At 1024 px with
    one reference (L = 8,704, 24 heads) that is 107 MB, where the whole matrix has 7.3 GB.
    """

    def what(call: Call) -> Tensor:
        q, k, _, pe = call.inputs
        q, k = apply_rope(q, pe)[:, :, queries].float(), apply_rope(k, pe).float().transpose(-1, -2)
        parts = []
        for some in (q * q.shape[-1] ** -0.5).split(chunk, dim=2):
            rows = (some @ k).softmax(dim=-1)[..., keys]  # (B, H, chunk, K)
            parts.append(rows.sum(2, keepdim=True) / q.shape[2] if mean else rows.clone())
        return sum(parts).squeeze(2) if mean else torch.cat(parts, dim=2)

    return what


def emphasis(queries: slice, keys: slice) -> Callable[[Call], Tensor]:
    """Which queries look most at a key: attention divided by its mean over the queries, (B, H, Q, K); 1 is average."""
    look = attention(queries, keys)
    return lambda call: (found := look(call)) / found.mean(2, keepdim=True)


def skip(flux: Flux, pattern: str, steps: Steps = None) -> AbstractContextManager:
    """Within the context these blocks pass their tokens on as they are: only the residual stream is left of them."""
    return replace(flux, pattern, lambda call: call.inputs[:2] if "double" in call.site else call.inputs[0], steps)


def zero_head(flux: Flux, pattern: str, head: int, steps: Steps = None) -> AbstractContextManager:
    def without(call: Call) -> Tensor:
        kept = torch.arange(call.inputs[0].shape[1], device=call.output.device) != head
        return call.output * kept.repeat_interleave(call.inputs[0].shape[-1])

    return replace(flux, pattern, without, steps)


@contextmanager
def without_reference(flux: Flux, steps: Steps = None) -> Iterator[None]:
    evaluations = count()

    def drop(_, args: tuple, inputs: dict) -> tuple[tuple, dict] | None:
        if steps is not None and next(evaluations) not in steps:
            return None
        target = inputs["img_ids"][:, 0] == 0
        return args, inputs | {"img": inputs["img"][:, target], "img_ids": inputs["img_ids"][target]}

    with flux.register_forward_pre_hook(drop, with_kwargs=True):
        yield
