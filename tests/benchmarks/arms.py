"""A training step of ours and of diffusers + peft on the same shapes, and what is counted of it: FLOPs and live bytes.

Weights are random: nothing that is measured here depends on them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kontext_min import flow
from kontext_min.adapters.inject import TARGETS, adapt, matching_modules, updates
from kontext_min.adapters.merge import merging
from kontext_min.memory import Counted, apply_checkpointing
from kontext_min.models.flux import Flux, FluxConfig

RANK = 16  # on every linear of the blocks but the modulation


class Shape(NamedTuple):
    """A transformer with heads of 128 channels, and the tokens that it sees."""

    config: FluxConfig
    text: int
    target: tuple[int, int]  # rows and columns of tokens; the reference has as many


def sized(heads: int, double: int, single: int, text_width: int) -> FluxConfig:
    """A transformer of so many heads and blocks."""
    return FluxConfig(
        hidden_size=128 * heads, num_heads=heads, depth=double, depth_single_blocks=single, context_in_dim=text_width
    )


SMALL = Shape(sized(6, 2, 4, 512), 128, (20, 20))
FULL = Shape(FluxConfig(), 512, (64, 64))  # 1024 px with a reference of 1024 px


def inputs(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the transformer takes, batch 1."""
    generator, latents = torch.Generator().manual_seed(1), torch.zeros(1, 16, *(2 * side for side in shape.target))
    ids = flow.sequence_ids(latents, [latents])
    sizes = {"img": (len(ids), 64), "txt": (shape.text, shape.config.context_in_dim), "y": (shape.config.vec_in_dim,)}
    random = {name: torch.randn(1, *size, generator=generator).to(dtype) for name, size in sizes.items()}
    times = {"timesteps": torch.tensor([0.5]), "guidance": torch.tensor([1.0])}
    return random | times | {"img_ids": ids, "txt_ids": torch.zeros(shape.text, 3)}


def names(config: FluxConfig) -> list[str]:
    """The adapted modules, in diffusers' words."""
    return [name for name in matching_modules(config, TARGETS["all+ffs"]) if "blocks" in name]


def ours(config: FluxConfig) -> Flux:
    """Our transformer in the default dtype, with a LoRA."""
    flux = Flux(config).requires_grad_(False)
    adapt(flux, dict.fromkeys(names(config), (RANK, RANK)))
    return flux


def merged(config: FluxConfig) -> Flux:
    """Ours with a LoRA that is a part of the weights."""
    flux = Flux(config).requires_grad_(False)
    then = merging(list(updates(ours(config))), flux)
    for name, _ in flux.named_parameters():
        then(flux, name)
    return flux


def peer(config: FluxConfig) -> nn.Module:
    """diffusers' transformer with peft's LoRA, both in the default dtype."""
    import diffusers
    import peft

    model = diffusers.FluxTransformer2DModel(
        num_layers=config.depth, num_single_layers=config.depth_single_blocks, num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_in_dim, guidance_embeds=True,
    ).requires_grad_(False)  # fmt: skip
    model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names(config)))
    return model.train()


def run(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """What either model says of the target's tokens, (1, L, 64)."""
    target = len(given["img_ids"]) // 2
    if isinstance(model, Flux):
        return model(**given, wanted=target)
    img, txt, y = given["img"], given["txt"], given["y"]
    ids, guidance = (given["img_ids"], given["txt_ids"]), given["guidance"].to(img.dtype)
    return model(img, txt, y, given["timesteps"].to(img.dtype), *ids, guidance, return_dict=False)[0][:, :target]


def loss(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """A number to differentiate."""
    out = run(model, given)
    return F.mse_loss(out.float(), torch.ones_like(out, dtype=torch.float32))


def gemm_flops(model: nn.Module, given: dict[str, Tensor]) -> int:
    """2 * multiply-adds of all matrix products, forward and backward; attention is not among them."""
    with FlopCounterMode(display=False) as counter:
        loss(model, given).backward()
    aten = torch.ops.aten
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in (aten.mm, aten.addmm))


def step_bytes(model: nn.Module, given: dict[str, Tensor]) -> int:
    """The most bytes that live at once in a step beside weights and inputs; gradients of the LoRA are among them."""
    with Counted() as counted:
        loss(model, given).backward()
    return counted.peak


def arm(name: str, config: FluxConfig) -> nn.Module:
    """What trains: `peer`, with its gradient checkpointing, or ours by a policy of `apply_checkpointing`.

    merged: ours for evaluations, with the LoRA in its weights.
    """
    if name == "peer":
        model = peer(config)
        model.enable_gradient_checkpointing()
        return model
    if name == "merged":
        return merged(config)
    flux = ours(config)
    apply_checkpointing(flux, name)
    return flux
